"""Every value of the choices between instances of the attention forward: as right as the default, on the same packs.

Which instances run is the business of compute capability 9.0: elsewhere these choices change nothing.
"""

import pytest
import torch
from attention_cases import Pack

import illada
from illada.ops.variants import use_variants, variants

TILES = [
    pytest.param(dim, {f"attention_forward_d{dim}": value}, id=f"d{dim}-{value}")
    for dim, values in ((128, ("128x2x3", "128x2x2", "176x2x2")), (64, ("192x96", "192x128")))
    for value in values
]
OTHERS = [
    pytest.param({name: value}, id=f"{name}-{value}")
    for name, value in (("attention_cluster", "1"), ("l2_hints", "on"))
]
EDGES = [0, 1, 95, 96, 97, 127, 129, 175, 176, 177, 193]
# Enough tiles and few enough sequences that pairs of CTAs share their keys; one tile has no second one, one item no keys.
PAIRS = {"lengths": [245, 0, 6, 4], "keys": [20, 5, 200, 0], "heads": 128, "kv_heads": 2}


def run(pack: Pack, plan=None):
    return illada.varlen_attention(*pack.on_device(), **pack.on_device_lengths(), plan=plan, return_lse=True)


def plan_of(pack: Pack):
    (tokens, heads, dim), kv_heads = pack.q.shape, pack.k.shape[1]
    return illada.attention_plan(
        **pack.on_device_lengths(), num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, total_q=tokens,
        total_k=len(pack.k),
    )  # fmt: skip


def test_no_value_is_left_out():
    tested = {(name, value) for tile in TILES for name, value in tile.values[1].items()}
    tested |= {(name, value) for other in OTHERS for name, value in other.values[0].items()}
    named = {
        c.name: c
        for c in variants()
        if c.name.startswith("attention_forward_d") or c.name in ("attention_cluster", "l2_hints")
    }
    assert {name for name, _ in tested} == named.keys()
    for name, choice in named.items():
        assert set(choice.values) - {choice.default} <= {value for known, value in tested if known == name}


@pytest.mark.parametrize("dim, chosen", TILES)
class TestTiles:
    @pytest.fixture(autouse=True)
    def choose(self, chosen):
        with use_variants(**chosen):
            yield

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_tile_edges(self, dim, dtype, device):
        Pack(EDGES, device, heads=2, dim=dim, dtype=dtype).check()

    @pytest.mark.parametrize("heads, kv_heads", [(2, 2), (7, 1), (16, 2)])
    def test_groups(self, heads, kv_heads, dim, device):
        Pack([37, 0, 130, 1], device, heads=heads, kv_heads=kv_heads, dim=dim).check()

    def test_splits_over_a_cache(self, dim, device):
        Pack([3, 32, 2], device, keys=[1500, 177, 40], room=20, dim=dim).check()

    def test_pairs(self, dim, device):
        Pack(device=device, dim=dim, **PAIRS).check()

    def test_without_pairs(self, dim, device):
        """The same to the bit as with them."""
        pack = Pack(device=device, dim=dim, **PAIRS)
        want = run(pack)
        with use_variants(attention_cluster="1"):
            assert all(map(torch.equal, run(pack), want))

    def test_scores_that_outgrow_the_first_tile(self, dim, device):
        pack = Pack([40], device, keys=[600], dim=dim, scale=6.0)
        first = pack.lengths["cu_seqlens_k"][0]
        growth = torch.linspace(3, 0.1, 600)[:, None, None]  # the kernels begin with the last keys
        pack.k[first : first + 600] = (pack.k[first : first + 600] * growth).to(pack.k.dtype)
        pack.check()

    def test_neighbours_in_the_pack_are_not_seen(self, dim, device):
        pack = Pack([65, 130, 33], device, room=0, dim=dim)
        lengths = pack.on_device_lengths()
        want = illada.varlen_attention(*pack.on_device(), **lengths)
        for start, end in ((0, 65), (65, 195), (195, 228)):
            poisoned = [torch.full_like(x, torch.nan) for x in pack.on_device()]
            for x, source in zip(poisoned, pack.on_device(), strict=True):
                x[start:end] = source[start:end]
            assert torch.equal(illada.varlen_attention(*poisoned, **lengths)[start:end], want[start:end])

    def test_hints_change_no_bit(self, dim, device):
        for pack in (Pack([5, 300], device, dim=dim), Pack([3], device, keys=[900], dim=dim)):
            with use_variants(l2_hints="off"):
                want = run(pack)
            with use_variants(l2_hints="on"):
                assert all(map(torch.equal, run(pack), want))

    def test_a_plan_of_another_tile(self, dim, device):
        """Splits fall between other tiles then; every key counts once all the same."""
        pack = Pack([3, 20], device, keys=[1500, 900], dim=dim)
        name = f"attention_forward_d{dim}"
        for choice in variants():
            for value in choice.values if choice.name == name else ():
                with use_variants(**{name: value}):
                    plan = plan_of(pack)
                pack.check(plan=plan)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("made, used", [("auto", "1"), ("1", "auto")])
def test_a_plan_from_before_the_choice(made, used, dim, device):
    """Forward, and the backward that takes the forward's items: the same to the bit as with a plan of its own."""
    pack = Pack(device=device, dim=dim, **PAIRS)
    q, k, v = pack.on_device()

    def gradients(plan):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k.nan_to_num(), v.nan_to_num())]
        out = illada.varlen_attention(*leaves, **pack.on_device_lengths(), plan=plan)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(x.grad for x in leaves)]

    with use_variants(attention_cluster=made):
        old = plan_of(pack)
    with use_variants(attention_cluster=used):
        want, got = gradients(plan_of(pack)), gradients(old)
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)
    pack.check(plan=old)


@pytest.mark.parametrize(
    "lengths, clusters",
    [
        ([128] * 64, {128: 2, 64: 1}),
        ([192] * 44, {128: 2, 64: 2}),
        ([100] * 64, {128: 1, 64: 1}),
        ([40], {128: 1, 64: 1}),
    ],
)
def test_pairs_are_for_sequences_of_several_tiles(lengths, clusters, device):
    """A tile of head dim 64 has three blocks of rows: two pairs of them would waste every fourth one of 128 tokens."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    has_pairs = torch.cuda.get_device_capability(device) == (9, 0)
    for dim, cluster in clusters.items():
        arguments = {"num_heads": 32, "num_kv_heads": 8, "head_dim": dim, "total_q": sum(lengths)}
        for choice, want in (("auto", cluster if has_pairs else 1), ("1", 1)):
            with use_variants(attention_cluster=choice):
                assert illada.attention_plan(starts, **arguments).work[0, 3].item() >> 16 == want
