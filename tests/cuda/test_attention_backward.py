"""The attention backward on CUDA tensors against float64, in units of the error of plain torch at the same dtype.

As in the tests of the forward, every key, value and query that a sequence must not see is NaN. Each pack goes all ways
that there are for its head dim. Several ways exist only on compute capability 9.0.
"""

from contextlib import contextmanager

import pytest
import torch
from packs import TILE_EDGES, Pack
from test_registration import tracing
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import illada
from illada.ops import raw, reference
from illada.testing import assert_close_like, relative_error

NAMES = ("dq", "dk", "dv")
# How dq is made: by sums in any order or in that of the tiles, or from recomputed scores. The values: deterministic,
# recompute_scores_for_dq.
WAYS = {"any order": (False, False), "in order": (True, False), "recompute": (True, True)}
DIMS = [64, 96, 128, 256]


def ways_of(dim: int) -> tuple[str, ...]:
    """The ways in which dq can be made on this device: the portable kernels always recompute scores."""
    return tuple(WAYS) if torch.cuda.get_device_capability() == (9, 0) and dim in (64, 128) else ("recompute",)


def dims_and_ways(ways: list[str]) -> list[tuple[int, str]]:
    """Each of these ways for the dims that have them, and the one way of the other dims."""
    return [*((dim, way) for dim in (64, 128) for way in ways), (96, "recompute"), (256, "recompute")]


@pytest.fixture(autouse=True)
def _sums_in_short_packs(monkeypatch):
    """Packs this small would all recompute scores."""
    monkeypatch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 0)


@contextmanager
def going(way: str):
    """Gives the argument `deterministic` for this way."""
    deterministic, recompute = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        if recompute:
            patch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 1 << 20)
        yield deterministic


def gradients(attention, tensors, lengths, grads, **keywords) -> tuple[Tensor, ...]:
    """Of q, k and v, from those of out and lse, either of which may be None."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = attention(*leaves, **lengths, return_lse=True, **keywords)
    pairs = [(x, grad.to(x.dtype)) for x, grad in zip(results, grads, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


def random_grads(pack: Pack, *, out=True, lse=True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens, heads, _ = pack.q.shape
    dout = torch.randn(pack.q.shape, generator=generator).to(pack.q.dtype)
    dlse = torch.randn(heads, tokens, generator=generator)
    return [dout if out else None, dlse if lse else None]


def to_device(pack: Pack, grads) -> list[Tensor | None]:
    return [None if grad is None else grad.to(pack.device) for grad in grads]


def idle(pack: Pack) -> tuple[Tensor, Tensor]:
    """Which queries have no keys, and which keys no queries."""
    queries, keys = torch.ones(len(pack.q), dtype=torch.bool), torch.ones(len(pack.k), dtype=torch.bool)
    starts = pack.lengths["cu_seqlens"].tolist()
    key_starts = pack.lengths.get("cu_seqlens_k", pack.lengths["cu_seqlens"]).tolist()
    used = pack.lengths.get("seqused_k", pack.lengths["cu_seqlens"].diff()).tolist()
    for s, count in enumerate(used):
        if starts[s + 1] > starts[s] and count:
            queries[starts[s] : starts[s + 1]] = False
            keys[key_starts[s] : key_starts[s] + count] = False
    return queries, keys


def check(pack: Pack, *, out=True, lse=True, ways=None, softmax_scale=None) -> None:
    grads = random_grads(pack, out=out, lse=lse)
    tensors, keywords = (pack.q, pack.k, pack.v), {"softmax_scale": softmax_scale}
    exact = [x.double() for x in tensors]
    want = gradients(reference.varlen_attention, exact, pack.lengths, grads, **keywords)
    baseline = gradients(reference.varlen_attention, tensors, pack.lengths, grads, **keywords)
    on_device = (pack.on_device(), pack.on_device_lengths(), to_device(pack, grads))
    for way in ways or ways_of(pack.q.shape[-1]):
        with going(way) as deterministic:
            got = gradients(illada.varlen_attention, *on_device, deterministic=deterministic, **keywords)
        queries, keys = idle(pack)
        for name, g, w, b, none in zip(NAMES, got, want, baseline, (queries, keys, keys), strict=True):
            try:
                assert_close_like(g.cpu(), w, b)
            except AssertionError as error:
                raise AssertionError(f"{name}, {way}: {error}") from None
            assert (g.cpu()[none] == 0).all(), f"{name} of what has no counterpart"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tile_edges_in_one_pack(dim, dtype, device):
    check(Pack(TILE_EDGES[:8], device, dim=dim, dtype=dtype))


@pytest.mark.parametrize("length", [1, 64, 127, 129, 177])
@pytest.mark.parametrize("dim", DIMS)
def test_one_sequence(length, dim, device):
    check(Pack([length], device, room=0, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize("length", [*TILE_EDGES[1:], 1025])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_length(length, dim, dtype, device):
    check(Pack([length], device, dim=dim, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (14, 2), (16, 2)])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_lengths(heads, kv_heads, dim, dtype, device):
    check(Pack([300, 0, 1, 65, 176, 129, 64, 31], device, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1), (16, 2), (3, 1), (64, 1)])
@pytest.mark.parametrize("dim", DIMS)
def test_groups(heads, kv_heads, dim, device):
    check(Pack([37, 0, 70, 1], device, heads=heads, kv_heads=kv_heads, dim=dim))


@pytest.mark.parametrize("dim", DIMS)
def test_queries_and_keys_of_different_lengths(dim, device):
    """Among them queries without keys and keys without queries."""
    check(Pack([5, 100, 0, 33, 7], device, keys=[200, 3, 50, 129, 0], dim=dim))


@pytest.mark.parametrize("block", [1, 33])
def test_block_against_a_long_cache(block, device):
    """The forward splits these keys; dq is summed over all of them."""
    check(Pack([block, block, 2], device, keys=[1100, 129, 40], room=20))


@pytest.mark.parametrize("dim", DIMS)
def test_more_sequences_than_multiprocessors(dim, device):
    """Items of one tile of queries each; some multiprocessors have several."""
    check(Pack([1 + i % 5 for i in range(140)], device, room=1, dim=dim, heads=1, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_more_tiles_of_keys_than_multiprocessors(dim, device):
    """In smaller packs the queries of a tile of keys are shared by several CTAs, and dk and dv are sums in memory."""
    check(Pack([150, 0, 65, 129], device, heads=60, kv_heads=30, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_that_are_held_back(dim, device):
    """So many steps of few tiles of keys that a multiprocessor has more sums of its own than it reports late."""
    check(Pack([257], device, room=0, heads=184, kv_heads=23, dim=dim), ways=ways_of(dim)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_of_tiles(dim, device):
    """So many tiles that the forward's items are pairs of them where there are clusters."""
    check(Pack([520], device, room=0, heads=52, kv_heads=52, dim=dim))


@pytest.mark.parametrize("out, lse", [(True, False), (False, True)])
@pytest.mark.parametrize("dim", DIMS)
def test_gradient_of_one_result(out, lse, dim, device):
    check(Pack([70, 5], device, dim=dim), out=out, lse=lse)


def test_scale(device):
    check(Pack([70], device, room=0), softmax_scale=0.3)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_far_from_zero(sign, dim, device):
    """All near -300, where the 0 of a key that is not there would have a probability beyond all bounds; or near 300."""
    pack = Pack([37, 20], device, keys=[45, 150], dim=dim)
    pack.q[..., 0] = 40
    pack.k[..., 0] = sign * 300 * dim**0.5 / 40
    check(pack)
    grads = random_grads(pack)
    exact = [x.double() for x in (pack.q, pack.k, pack.v)]
    want = gradients(reference.varlen_attention, exact, pack.lengths, grads)
    got = gradients(illada.varlen_attention, pack.on_device(), pack.on_device_lengths(), to_device(pack, grads))
    for g, w in zip(got, want, strict=True):  # without the large elements, in which plain torch loses more
        assert relative_error(g.cpu()[..., 1:], w[..., 1:]) < 0.01


@pytest.mark.parametrize("dim", DIMS)
def test_sharp_scores(dim, device):
    """A softmax of nearly one key, by scores of some dozens to either side."""
    check(Pack([70, 130], device, dim=dim, scale=12.0, dtype=torch.float16))


def test_layouts_of_the_gradient(device):
    """The same numbers in any layout: a slice of something wider, heads first, one number for all."""
    pack = Pack([70, 3], device)
    tensors, lengths = pack.on_device(), pack.on_device_lengths()
    dout, dlse = random_grads(pack)
    wide = torch.full((len(dout), 4, 264), torch.nan, dtype=dout.dtype)
    wide[..., 8:136] = dout
    heads_first = dout.transpose(0, 1).contiguous().to(device)

    def call(dout, dlse):
        return gradients(illada.varlen_attention, tensors, lengths, (dout, dlse), deterministic=True)

    want = call(dout.to(device), dlse.to(device))
    last_first = dlse.t().contiguous().to(device).t()
    for got in (
        call(wide.to(device)[..., 8:136], last_first),
        call(heads_first.transpose(0, 1), dlse.to(device)),
        call(dout.to(device).transpose(1, 2).contiguous().transpose(1, 2), dlse.to(device)),
    ):
        assert all(map(torch.equal, got, want))
    leaves = [x.detach().requires_grad_() for x in tensors]
    total = illada.varlen_attention(*leaves, **lengths, deterministic=True).sum()
    ones = torch.ones_like(dout).to(device)
    assert all(map(torch.equal, torch.autograd.grad(total, leaves), call(ones, None)))


@pytest.mark.parametrize("dim, way", dims_and_ways(["in order", "recompute"]))
def test_neighbours_in_the_pack_are_not_seen(dim, way, device):
    """One sequence keeps its numbers while all others are NaN, on both sides; and its results are the same to the bit."""
    pack = Pack([65, 130, 33], device, room=0, dim=dim)
    lengths, grads = pack.on_device_lengths(), to_device(pack, random_grads(pack))
    with going(way):
        want = gradients(illada.varlen_attention, pack.on_device(), lengths, grads, deterministic=True)
    for start, end in ((0, 65), (65, 195), (195, 228)):

        def poisoned(x, tokens, start=start, end=end):
            alone = torch.full_like(x, torch.nan)
            alone.narrow(tokens, start, end - start).copy_(x.narrow(tokens, start, end - start))
            return alone

        tensors = [poisoned(x, 0) for x in pack.on_device()]
        call = (tensors, lengths, (poisoned(grads[0], 0), poisoned(grads[1], 1)))
        with going(way):
            alone = gradients(illada.varlen_attention, *call, deterministic=True)
        for got, expected in zip(alone, want, strict=True):
            assert torch.equal(got[start:end], expected[start:end])
        for got in gradients(illada.varlen_attention, *call):
            assert got[start:end].isfinite().all()


@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [
        (2, 2, 128),
        (4, 1, 64),
        (7, 1, 64),
        (7, 1, 96),
        (4, 1, 256),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 2, 128), (60, 30, 64))),
    ],
)
def test_order_of_the_tiles(heads, kv_heads, dim, device):
    """The same bits in every run, wherever in the pack a sequence lies. With 30 key-value heads a multiprocessor has more
    than one tile of keys; with fewer, two share the rows of one."""
    lengths = [300, 0, 1, 65, 176, 150, 64, 31]
    pack = Pack(lengths, device, room=0, heads=heads, kv_heads=kv_heads, dim=dim)
    q, k, v = pack.on_device()
    dout, dlse = to_device(pack, random_grads(pack))
    out, lse = illada.varlen_attention(q, k, v, pack.lengths["cu_seqlens"].to(device), return_lse=True)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "total_q": len(q)}

    def call(order):
        """By sequence, in the order of `lengths`."""

        def moved(x, axis=0):
            parts = x.split(lengths, axis)
            return torch.cat([parts[s] for s in order], axis).contiguous()

        moved_lengths = [lengths[s] for s in order]
        starts = torch.tensor([0, *moved_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        plan = illada.attention_plan(starts, **sizes)
        grads = torch.ops.illada.varlen_attention_bwd(
            *(moved(dout), moved(dlse, 1), moved(q), moved(k), moved(v), moved(out), moved(lse, 1)),
            *(plan.work, len(lengths), dim**-0.5, True),
        )
        parts = [x.split(moved_lengths) for x in grads]
        return [torch.cat([x[order.index(s)] for s in range(len(lengths))]) for x in parts]

    order = list(range(len(lengths)))
    want = call(order)
    for other in (order, order[::-1], [3, 7, 0, 1, 6, 4, 5, 2]):
        assert all(map(torch.equal, call(other), want))


def test_order_of_lengths_that_overlap(device):
    """They end: a tile that the plan has no room for is not waited for. What comes out is nobody's business."""
    pack = Pack([300], device, room=0, heads=8, kv_heads=2, dim=64)
    starts = torch.tensor([0, 300, 0, 300, 100, 300, 100, 300, 0, 300], dtype=torch.int32).to(device)
    grads = to_device(pack, random_grads(pack))
    for got in gradients(illada.varlen_attention, pack.on_device(), {"cu_seqlens": starts}, grads, deterministic=True):
        assert got.shape[0] == 300


@pytest.mark.parametrize("dim, way", [(128, "in order"), (128, "recompute"), (256, "recompute")])
def test_deterministic(dim, way, device):
    """Two runs agree to the bit, and neither knows what else is in the pack (as long as the way is the same)."""
    pack = Pack([200, 40, 131], device, room=0, heads=8, kv_heads=2, dim=dim)
    (q, k, v), starts = pack.on_device(), pack.lengths["cu_seqlens"]
    dout, dlse = to_device(pack, random_grads(pack))
    out, lse = illada.varlen_attention(q, k, v, starts.to(device), return_lse=True)

    def call(first, last):
        part, lengths = slice(starts[first], starts[last]), (starts[first : last + 1] - starts[first]).to(device)
        sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": dim, "total_q": part.stop - part.start}
        plan = illada.attention_plan(lengths, **sizes)
        return torch.ops.illada.varlen_attention_bwd(
            *(dout[part], dlse[:, part].contiguous(), q[part], k[part], v[part], out[part], lse[:, part].contiguous()),
            *(plan.work, last - first, dim**-0.5, True),
        )

    with going(way):
        want = call(0, 3)
        assert all(map(torch.equal, call(0, 3), want))
        for s in range(3):
            for got, expected in zip(call(s, s + 1), want, strict=True):
                assert torch.equal(got, expected[starts[s] : starts[s + 1]])


@pytest.mark.parametrize("lengths, recompute", [([256], True), ([257], False), ([500, 0, 1], True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_short_sequences_recompute_the_scores(lengths, recompute, deterministic, device, monkeypatch):
    monkeypatch.undo()
    asked = []

    def backward(*_, deterministic, recompute_scores_for_dq, **__):
        asked.append((deterministic, recompute_scores_for_dq))

    monkeypatch.setattr(raw, "varlen_attention_backward", backward)
    pack = Pack(lengths, device, room=0, dim=64)
    call = (pack.on_device(), pack.on_device_lengths(), to_device(pack, random_grads(pack)))
    gradients(illada.varlen_attention, *call, deterministic=deterministic)
    assert asked == [(deterministic, recompute)]


class RawCall:
    """Arguments of the raw call for one pack, ready to be changed."""

    def __init__(self, pack: Pack, *, way="any order"):
        device, (tokens, heads, dim), (keys, kv_heads, _) = pack.device, pack.q.shape, pack.k.shape
        lengths = pack.on_device_lengths()
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "total_q": tokens}
        plan = illada.attention_plan(**lengths, **sizes, total_k=keys)
        q, k, v = pack.on_device()
        out, lse = illada.varlen_attention(q, k, v, **lengths, return_lse=True)
        dout, dlse = to_device(pack, random_grads(pack))
        shape = (tokens, keys, plan.num_sequences, heads, kv_heads, dim)
        size = raw.varlen_attention_backward_workspace(*shape, *WAYS[way], q.device.index)
        self.inputs = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
        self.plan, self.num_sequences = plan.work, plan.num_sequences
        self.deterministic, self.recompute_scores_for_dq = WAYS[way]
        self.outputs = {
            name: torch.full(shape, torch.nan, dtype=q.dtype).to(device)
            for name, shape in (("dq", q.shape), ("dk", k.shape), ("dv", v.shape))
        }
        self.workspace = torch.empty(size, dtype=torch.uint8).to(device)

    def __call__(self) -> None:
        raw.varlen_attention_backward(
            **self.outputs, **self.inputs, plan=self.plan, num_sequences=self.num_sequences,
            softmax_scale=self.inputs["q"].shape[-1] ** -0.5, workspace=self.workspace,
            deterministic=self.deterministic, recompute_scores_for_dq=self.recompute_scores_for_dq,
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_queries_without_keys_whatever_their_lse(way, device):
    """Who spreads the keys over several devices passes the lse of all of them: here may be none of a sequence's."""
    call = RawCall(Pack([70, 3, 9], device, keys=[200, 30, 0], dim=64), way=way)
    call.inputs["lse"][:, 73:] = 1.5
    call()
    assert (call.outputs["dq"][73:] == 0).all() and call.outputs["dq"].isfinite().all()


@pytest.mark.parametrize("dim, way", dims_and_ways(list(WAYS)))
def test_nothing_is_written_beside_the_results(way, dim, device):
    call = RawCall(Pack([70, 3, 9], device, keys=[200, 30, 0], dim=dim), way=way)
    inputs = {name: x.clone() for name, x in call.inputs.items()}
    guarded = {}
    for name, x in [*call.outputs.items(), ("workspace", call.workspace)]:
        room = 256 // x.element_size()
        wide = torch.full((x.numel() + 2 * room,), 7.0).to(x.dtype).to(device)
        guarded[name] = (wide[:room], wide[-room:])
        inner = wide[room:-room].view(x.shape)
        if name == "workspace":
            call.workspace = inner
        else:
            inner.fill_(torch.nan)
            call.outputs[name] = inner
    call()
    for before, behind in guarded.values():
        assert (before == 7).all() and (behind == 7).all()
    for x in call.outputs.values():
        assert x.isfinite().all()  # all of it is written
    for name, x in call.inputs.items():
        assert torch.equal(x.nan_to_num(nan=7), inputs[name].nan_to_num(nan=7))


@pytest.mark.parametrize("dim, way", dims_and_ways(["any order", "in order"]))
def test_calls_share_a_workspace(dim, way, device):
    """What one call has counted and summed up there is nothing to the next one, whose sequences lie elsewhere."""
    packs = [Pack([70, 200, 5], device, keys=[300, 3, 0], dim=dim), Pack([300, 1, 65], device, dim=dim)]
    calls = [RawCall(pack, way=way) for pack in packs]
    workspace = torch.full((max(len(call.workspace) for call in calls),), 255, dtype=torch.uint8).to(device)
    for pack, call in [*zip(packs, calls, strict=True), (packs[0], calls[0])]:
        call.workspace = workspace
        for x in call.outputs.values():
            x.fill_(torch.nan)
        call()
        tensors, grads = (pack.q, pack.k, pack.v), random_grads(pack)
        want = gradients(reference.varlen_attention, [x.double() for x in tensors], pack.lengths, grads)
        baseline = gradients(reference.varlen_attention, tensors, pack.lengths, grads)
        for name, w, b in zip(NAMES, want, baseline, strict=True):
            assert_close_like(call.outputs[name].cpu(), w, b)


def misaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def fails_by_size(call: RawCall) -> None:
    call.workspace = call.workspace[:-16]


def fails_by_rows(call: RawCall) -> None:
    call.plan = call.plan[:5]


def fails_by_overlap(call: RawCall) -> None:
    call.outputs["dq"] = call.inputs["dout"]


def fails_by_outputs(call: RawCall) -> None:
    call.outputs["dk"] = call.outputs["dv"]


def fails_by_alignment(call: RawCall) -> None:
    call.outputs["dk"] = misaligned(call.outputs["dk"])


def fails_by_input(call: RawCall) -> None:
    call.inputs["dout"] = misaligned(call.inputs["dout"])


def fails_by_stride(call: RawCall) -> None:
    call.inputs["dout"] = call.inputs["dout"][:, :1].expand(-1, 4, -1)


ERRORS = [
    (fails_by_size, ValueError, "workspace must have [0-9]+ bytes, got"),
    (fails_by_rows, ValueError, "plan must have at least .* got 5; was it made with total_k?"),
    (fails_by_overlap, ValueError, "dq overlaps dout"),
    (fails_by_outputs, ValueError, "dv overlaps dk|dk overlaps dv"),
    (fails_by_alignment, ValueError, "dq, dk, dv and workspace must be 16-byte aligned"),
    (fails_by_input, NotImplementedError, "dout must have positive strides .* and 16-byte aligned data"),
    (fails_by_stride, NotImplementedError, "dout must have positive strides"),
]


@pytest.mark.parametrize("change, error, message", ERRORS)
def test_errors_of_the_raw_call(change, error, message, device):
    call = RawCall(Pack([6, 2], device))
    change(call)
    with pytest.raises(error, match=message):
        call()


def test_raw_call_refuses_the_host(device):
    call = RawCall(Pack([6], device))
    call.inputs["q"] = call.inputs["q"].cpu()
    with pytest.raises(ValueError, match="varlen_attention_backward: q is on the CPU, but the plan is on cuda"):
        call()


def test_plan_without_keys_has_no_gradients(device):
    pack = Pack([6], device, keys=[9])
    lengths = pack.on_device_lengths()
    sizes = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "total_q": 6}
    plan = illada.attention_plan(**lengths, **sizes)
    with pytest.raises(ValueError, match="was it made with total_k?"):
        gradients(illada.varlen_attention, pack.on_device(), lengths, (None, torch.ones(4, 6).to(device)), plan=plan)


def test_empty_packs(device):
    """No queries; no keys; neither."""
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        tensors = [
            torch.zeros(n, h, 64, dtype=torch.float16).to(device) for n, h in ((queries, 4), (keys, 2), (keys, 2))
        ]
        lengths = {
            "cu_seqlens": torch.tensor([0, queries], dtype=torch.int32).to(device),
            "cu_seqlens_k": torch.tensor([0, keys], dtype=torch.int32).to(device),
        }
        grads = (torch.ones(queries, 4, 64).to(device), torch.ones(4, queries).to(device))
        for deterministic in (False, True):
            call = gradients(illada.varlen_attention, tensors, lengths, grads, deterministic=deterministic)
            for got, x in zip(call, tensors, strict=True):
                assert got.shape == x.shape and (got == 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_in_a_graph_with_other_lengths(deterministic, device):
    """What depends on the lengths is on the device: replays see what they have become."""
    packs = [
        Pack(lengths, device, keys=keys)
        for lengths, keys in [([9, 5], [300, 30]), ([2, 12], [0, 330]), ([14, 0], [200, 130])]
    ]
    tensors = [x.clone() for x in packs[0].on_device()]
    lengths, grads = packs[0].on_device_lengths(), to_device(packs[0], random_grads(packs[0]))

    def call():
        return gradients(illada.varlen_attention, tensors, lengths, grads, deterministic=deterministic)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for pack in packs:
        for old, new in zip(tensors, pack.on_device(), strict=True):
            old.copy_(new)
        for name, new in pack.on_device_lengths().items():
            lengths[name].copy_(new)
        graph.replay()
        exact = [x.double() for x in (pack.q, pack.k, pack.v)]
        want = gradients(reference.varlen_attention, exact, pack.lengths, random_grads(pack))
        baseline = gradients(reference.varlen_attention, (pack.q, pack.k, pack.v), pack.lengths, random_grads(pack))
        for g, w, b in zip(results, want, baseline, strict=True):
            assert_close_like(g.cpu(), w, b)


@pytest.mark.parametrize("dim", DIMS)
def test_an_infinite_gradient_of_the_last_token_reaches_every_value_in_its_column_alone(dim, device):
    """As inf; in the portable kernels it may be NaN: there the last token's row fills the tile, with probabilities of
    0, and 0 times inf is NaN. Zeros would be worse, since scores of -inf make NaN of them."""
    pack = Pack([5], device, dim=dim, scale=0.1)
    dout, _ = to_device(pack, random_grads(pack, lse=False))
    dout[-1, -1, 3] = torch.inf
    _, _, dv = gradients(illada.varlen_attention, pack.on_device(), pack.on_device_lengths(), (dout, None))
    used = dv[3:8].cpu()  # keys in a slot, with room before and behind
    reached = used[..., 3]
    portable = ways_of(dim) == ("recompute",)
    assert ((reached == torch.inf) | (reached.isnan() & portable)).all()
    assert used[..., :3].isfinite().all() and used[..., 4:].isfinite().all()


def test_activation_checkpointing(device):
    pack = Pack([70, 3], device, room=0)
    lengths, (dout, _) = pack.on_device_lengths(), to_device(pack, random_grads(pack))
    want = gradients(illada.varlen_attention, pack.on_device(), lengths, (dout, None), deterministic=True)
    leaves = [x.detach().requires_grad_() for x in pack.on_device()]

    def attention(q, k, v):
        return illada.varlen_attention(q, k, v, **lengths, deterministic=True)

    out = checkpoint(attention, *leaves, use_reentrant=False, preserve_rng_state=False)
    assert all(map(torch.equal, torch.autograd.grad(out, leaves, dout), want))


def test_autocast(device):
    """float32 leaves get float32 gradients, those of the call at autocast's dtype."""
    pack = Pack([70, 3], device, room=0)
    lengths, grads = pack.on_device_lengths(), to_device(pack, random_grads(pack))
    want = gradients(illada.varlen_attention, pack.on_device(), lengths, grads, deterministic=True)
    with torch.autocast("cuda", torch.bfloat16):
        wide = [x.float() for x in pack.on_device()]
        got = gradients(illada.varlen_attention, wide, lengths, grads, deterministic=True)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, w.float())


def test_compiles_in_one_graph(device):
    pack = Pack([70, 3], device, room=0)
    lengths, (dout, dlse) = pack.on_device_lengths(), to_device(pack, random_grads(pack))
    tensors = [x.contiguous() for x in pack.on_device()]
    want = gradients(illada.varlen_attention, tensors, lengths, (dout, dlse), deterministic=True)
    compiled = torch.compile(illada.varlen_attention, fullgraph=True, backend="aot_eager")
    with _disable_current_modes():  # nothing but our own kernels run
        got = gradients(compiled, tensors, lengths, (dout, dlse), deterministic=True)
    assert all(map(torch.equal, got, want))


def test_compiles_with_what_surrounds_it(device):
    tracing()
    pack = Pack([70, 3], device, room=0)
    lengths, (dout, _) = pack.on_device_lengths(), to_device(pack, random_grads(pack))

    def block(q, k, v):
        return 2 * illada.varlen_attention(q + 1, k, v, **lengths, deterministic=True)

    leaves = [x.detach().requires_grad_() for x in pack.on_device()]
    want = torch.autograd.grad(block(*leaves), leaves, dout)
    got = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(*leaves), leaves, dout)
    assert all(map(torch.equal, got, want))


def test_second_derivative_raises(device):
    pack = Pack([6], device, room=0)
    leaves = [x.detach().requires_grad_() for x in pack.on_device()]
    out, lse = illada.varlen_attention(*leaves, **pack.on_device_lengths(), return_lse=True)
    dout, dlse = to_device(pack, random_grads(pack))
    (dq,) = torch.autograd.grad([out, lse], leaves[:1], [dout, dlse], create_graph=True)
    with pytest.raises(RuntimeError, match="varlen_attention_bwd has no second derivative"):
        torch.autograd.grad(dq, leaves[:1], dout)
