"""The gradients of varlen_attention on every device against float64, in units of the error of plain torch at the same dtype.

As in test_ops_attention.py, every key, value and query that a sequence must not see is NaN. On CUDA each pack goes all
ways that there are for its head dim. Several ways exist only on compute capability 9.0.
"""

import pytest
import torch
from attention_cases import (
    BFLOAT16_OR_CPU_FLOAT32,
    CASES,
    DIMS,
    DTYPES,
    GROUPS,
    ON_CPU,
    ON_CUDA,
    SLOTS,
    TILE_EDGES,
    Pack,
    dims_and_ways,
    going,
    gradients,
    random_grads,
    sums_in_short_packs,  # noqa: F401
    to_device,
)
from attention_cases import check_gradients as check
from attention_properties import fill_with_nan, run
from devices import tracing
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import illada
from illada.ops import reference
from illada.testing import relative_error

pytestmark = pytest.mark.usefixtures("sums_in_short_packs")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, kv_heads, dim", CASES)
def test_matches_fp64(lengths, heads, kv_heads, dim, dtype, device):
    room = 3 if lengths == TILE_EDGES[:8] else 0
    check(Pack(lengths, device, room=room, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype))


@pytest.mark.parametrize("length", [1, 64, 127, 129, 177])
@pytest.mark.parametrize("dim", DIMS)
def test_one_sequence(length, dim, device):
    check(Pack([length], device, room=0, dim=dim))


@pytest.mark.parametrize("heads, kv_heads", GROUPS)
@pytest.mark.parametrize("dim", DIMS)
def test_groups(heads, kv_heads, dim, device):
    check(Pack([37, 0, 70, 1], device, heads=heads, kv_heads=kv_heads, dim=dim))


@pytest.mark.parametrize("dtype", BFLOAT16_OR_CPU_FLOAT32)
@pytest.mark.parametrize("lengths, keys", SLOTS)
@pytest.mark.parametrize("kv_heads", [1, pytest.param(4, marks=ON_CPU)])
@pytest.mark.parametrize("dim", DIMS)
def test_queries_and_keys_of_different_lengths(dim, kv_heads, lengths, keys, dtype, device):
    """Among them queries without keys and keys without queries."""
    check(Pack(lengths, device, keys=keys, dim=dim, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize("block", [1, 33])
def test_block_against_a_long_cache(block, device):
    """CUDA's forward splits these keys; dq is summed over all of them."""
    check(Pack([block, block, 2], device, keys=[1100, 129, 40], room=20))


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gradient_of_lse(dtype, device):
    pack = Pack([70, 9], device, room=0, kv_heads=2, dim=64, dtype=dtype, scale=1 / 64)  # gradients that 16 bits hold
    pack.k.div_(64)
    grads = (None, torch.full((4, 79), 65536.0 * 2))
    got = gradients(
        illada.varlen_attention, pack.on_device(), pack.on_device_lengths(), to_device(pack, grads)
    )  # fmt: skip
    want = gradients(reference.varlen_attention, [x.double() for x in (pack.q, pack.k, pack.v)], pack.lengths, grads)
    for g, w in zip(got[:2], want[:2], strict=True):  # v has no part in lse
        error = (g.cpu().double() - w).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * w.abs().max()


# CUDA's kernels fill their tiles of rows up in other places for each group.
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=ON_CUDA)])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1), pytest.param(4, 2, marks=ON_CPU)])
@pytest.mark.parametrize("lengths", [[70, 0, 33], pytest.param([5], marks=ON_CPU), []])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(dtype, marks=ON_CPU) for dtype in (torch.float16, torch.float32))]
)
def test_rows_of_no_sequence(dtype, lengths, heads, kv_heads, recompute, device, generator):
    """As without them, and zeros behind, for groups of any size, whatever the rows hold; new memory holds NaN."""
    owned, rest = sum(lengths), 150
    sizes = (heads, kv_heads, kv_heads, heads)
    tensors = [torch.randn(owned + rest, n, 64, generator=generator).to(dtype) for n in sizes]
    for x in tensors:
        x[owned:] = torch.nan
    q, k, v, d_out = (x.to(device) for x in tensors)
    starts = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int().to(device)}
    fill_with_nan(device)
    with going("recompute" if recompute else "any order"):
        got = run(illada.varlen_attention, (q, k, v), starts, d_out)
        want = run(illada.varlen_attention, [x[:owned] for x in (q, k, v)], starts, d_out[:owned])
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        g, w = (x.detach().cpu().T if name == "lse" else x.detach().cpu() for x in (g, w))
        exact = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(g[:owned].float(), w.float(), **exact)
        assert (g[owned:] == (-torch.inf if name == "lse" else 0)).all(), name
    plain = reference.varlen_attention(q.cpu(), k.cpu(), v.cpu(), starts["cu_seqlens"].cpu(), return_lse=True)
    for g, w in zip(plain, got, strict=False):
        assert g.shape == w.shape and torch.equal(g[..., owned:].isneginf(), w.cpu()[..., owned:].isneginf())


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
    "dim, way", [(128, "in order"), *(pytest.param(dim, "recompute", marks=ON_CUDA) for dim in (128, 256))]
)
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
    with torch.autocast(device.type, torch.bfloat16):
        wide = [x.float() for x in pack.on_device()]
        assert illada.varlen_attention(*wide, **lengths).dtype == torch.bfloat16
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
