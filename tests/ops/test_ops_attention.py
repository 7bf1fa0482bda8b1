"""varlen_attention against its specification: values, gradients, strides, poison, registration, errors."""

import contextlib
import math
import mmap
import os
import re
import subprocess
import sys

import pytest
import torch

import illada
from illada import _native
from illada.ops import _library as lib
from illada.ops import attention, raw, reference
from illada.testing import assert_close_like

CASES = [  # lengths, H, G, D: what the row is for
    ([1], 2, 1, 64),  # one token, one key
    ([63, 1, 65], 4, 4, 128),  # tile edges around 64, no grouping
    ([0, 130, 0, 7], 8, 2, 64),  # empty sequences in the pack
    ([33, 96], 7, 1, 128),  # group 7 (Dream, Qwen2)
    ([32] * 4, 8, 8, 64),  # short sequences of equal length
    ([16] * 9, 8, 8, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(lengths, heads, groups, dim, dtype, generator, keys=None):
    total, total_k = sum(lengths), sum(lengths if keys is None else keys)
    # One fused projection, sliced: the strides a model really passes.
    fused = torch.randn(max(total, total_k), heads + 2 * groups, dim, generator=generator).to(dtype)
    q, k, v = (fused[:total, :heads], fused[:total_k, heads : heads + groups], fused[:total_k, heads + groups :])
    return q, k, v, cumulative(lengths)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(function, q, k, v, *args, d_out=None, d_lse=None, **kwargs):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v, *args, return_lse=True, **kwargs)
    loss = (out * d_out.to(out.dtype)).sum()
    if d_lse is not None:
        loss = loss + torch.where(lse.isfinite(), lse * d_lse.to(lse.dtype), 0).sum()
    return out, lse, *torch.autograd.grad(loss, (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths,heads,groups,dim", CASES)
def test_matches_fp64(lengths, heads, groups, dim, dtype, generator):
    q, k, v, cu = make(lengths, heads, groups, dim, dtype, generator)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_lse = torch.randn(heads, len(q), generator=generator)
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=d_lse)
    baseline = run(reference.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=d_lse)
    want = run(reference.varlen_attention, q.double(), k.double(), v.double(), cu, d_out=d_out.double(), d_lse=d_lse)
    assert got[1].dtype == torch.float32 and got[1].shape == (heads, len(q))
    for name, g, w, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, baseline, strict=True):
        assert g.shape == w.shape, name
        assert_close_like(g.to(b.dtype), w, b)


@pytest.mark.parametrize("groups", [1, 4])
def test_keys_of_another_length_and_seqused(groups, generator):
    lengths, slots, used = [3, 0, 5, 2], [10, 4, 6, 3], [9, 4, 0, 3]
    q, k, v, cu = make(lengths, 4, groups, 64, torch.float32, generator, keys=slots)
    extra = {"cu_seqlens_k": cumulative(slots), "seqused_k": torch.tensor(used, dtype=torch.int32)}
    d_out = torch.randn(q.shape, generator=generator)
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out, **extra)
    want = run(reference.varlen_attention, q, k, v, cu, d_out=d_out, **extra)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-6)
    assert (got[0][3:8] == 0).all() and (got[1][:, 3:8] == -torch.inf).all()  # sequence 2 has no keys


def test_no_sequences(generator):
    q, k, v, cu = make([], 4, 2, 64, torch.float32, generator)
    q = q.detach().requires_grad_()
    out, lse = illada.varlen_attention(q, k, v, cu, return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    assert torch.autograd.grad(out.sum(), q)[0].shape == (0, 4, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[70, 0, 33], [5], []])
def test_rows_of_no_sequence(lengths, dtype, generator):
    q, k, v, cu = make([*lengths, 29], 4, 2, 64, dtype, generator)
    cu, owned = cu[:-1], sum(lengths)
    for x in (q, k, v):
        x[owned:] = torch.nan  # seen by nobody
    d_out = torch.randn(q.shape, generator=generator)
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=torch.ones(4, len(q)))
    parts = (x[:owned] for x in (q, k, v))
    want = run(illada.varlen_attention, *parts, cu, d_out=d_out[:owned], d_lse=torch.ones(4, owned))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        g, w = (g.T, w.T) if i == 1 else (g, w)
        assert torch.equal(g[:owned], w) and (g[owned:] == (-torch.inf if i == 1 else 0)).all()
    for g, w in zip(reference.varlen_attention(q, k, v, cu, return_lse=True), got, strict=False):
        assert g.shape == w.shape and torch.equal(g[..., owned:].isneginf(), w[..., owned:].isneginf())


@pytest.mark.parametrize("score", [-torch.inf, -1e4])
@pytest.mark.parametrize("first, last", [(0, 1), (63, 64), (99, 100), (0, 64), (1, 100)])
def test_keys_far_below_have_no_part(first, last, score):
    """Not in a block of 64 keys, nor as a block before that with the largest score: 2^-126 of 3e38 is 3.5."""
    q, k, v = torch.ones(1, 1, 8), torch.zeros(100, 1, 8), torch.ones(100, 1, 8)
    k[first:last, :, 0], v[first:last] = score, 3e38 / 100
    lengths = {"cu_seqlens": cumulative([1]), "cu_seqlens_k": cumulative([100])}
    out, lse = illada.varlen_attention(q, k, v, **lengths, softmax_scale=1.0, return_lse=True)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.tensor([[100.0 - (last - first)]]).log())


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gradient_of_lse(dtype, generator):
    q, k, v, cu = make([70, 9], 4, 2, 64, dtype, generator)
    q, k = q / 64, k / 64  # gradients that 16 bits hold
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    illada.varlen_attention(*tensors, cu, return_lse=True)[1].mul(65536 * 2).sum().backward()
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference.varlen_attention(*leaves, cu, return_lse=True)[1].mul(65536 * 2).sum().backward()
    for got, want in zip(tensors[:2], leaves[:2], strict=True):  # v has no part in lse
        error = (got.grad.double() - want.grad).abs().max()
        assert error <= 4 * torch.finfo(dtype).eps * want.grad.abs().max()


def test_neighbours_are_never_read(generator):
    q, k, v, cu = make([5, 9, 4], 4, 2, 64, torch.float32, generator)
    out = illada.varlen_attention(q, k, v, cu)
    poisoned = [x.clone() for x in (q, k, v)]
    for x in poisoned:
        x[:5], x[14:] = torch.nan, torch.nan
    torch.testing.assert_close(illada.varlen_attention(*poisoned, cu)[5:14], out[5:14], rtol=0, atol=0)


def test_plan_is_longest_first_and_reusable(generator):
    q, k, v, cu = make([3, 11, 0, 7], 4, 2, 64, torch.float32, generator)
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=21)
    longest_first = [[3, 14, 3, 14], [14, 21, 14, 21], [0, 3, 0, 3], [14, 14, 14, 14]]
    assert plan.work.tolist() == [*longest_first, [21, 21, 0, 0]]  # and the queries of no sequence
    assert torch.equal(illada.varlen_attention(q, k, v, cu, plan=plan), illada.varlen_attention(q, k, v, cu))
    with pytest.raises(ValueError, match="plan was made for num_heads 4, this call has 2"):
        illada.varlen_attention(q[:, :2], k, v, cu, plan=plan)


def test_gradient_with_zero_strides_and_bitwise_repeat(generator):
    q, k, v, cu = make([17, 4], 4, 2, 64, torch.bfloat16, generator)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    grads = []
    for _ in range(2):
        out = illada.varlen_attention(*leaves, cu, deterministic=True)
        grads.append(torch.autograd.grad(out.sum(), leaves))  # d_out has stride 0
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)
    want = torch.autograd.grad(reference.varlen_attention(*(x.double() for x in leaves), cu).sum(), leaves)
    torch.testing.assert_close(grads[0][2], want[2], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(
    illada.build_info()["compiler"].startswith("Clang"), reason="Clang's OpenMP has other threads than torch"
)
def test_denormal_probabilities_are_flushed_and_the_mode_restored(generator):
    many = torch.full((1 << 20,), 1e-39)  # enough for every thread of the pool to get a share
    threads = torch.get_num_threads()
    _native.native().flush_denormals(True, threads)
    try:
        assert (many * 1.0 == 0).all()
    finally:
        _native.native().flush_denormals(False, threads)
    assert (many * 1.0 > 0).all()
    # Scores hundreds of nats apart: probabilities of every size down to 0, and gradients as exact as ever.
    q, k, v, cu = make([200, 60], 4, 2, 64, torch.float32, generator)
    q, d_out = 30 * q, torch.randn(q.shape, generator=generator)
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out)
    baseline = run(reference.varlen_attention, q, k, v, cu, d_out=d_out)
    want = run(reference.varlen_attention, q.double(), k.double(), v.double(), cu, d_out=d_out.double())
    for g, w, b in zip(got, want, baseline, strict=True):
        assert_close_like(g, w, b)
    assert (many * 1.0 > 0).all()
    with pytest.raises(
        ValueError, match=r"the plan must be int32 \[2, 4\], .* got int32 \[3\]"
    ):  # also after an error inside the op
        torch.ops.illada.varlen_attention_fwd(q, k, v, torch.zeros(3, dtype=torch.int32), 1, 1.0, False)
    assert (many * 1.0 > 0).all()


def test_threads_that_start_between_have_the_caller_s_mode():
    """A smaller team ends threads of the pool. Whoever takes their place must not stop at the first rounding."""
    code = """
import illada, torch
from illada import _native
q, cu = torch.rand(1, 1, 8), torch.tensor([0, 1], dtype=torch.int32)
torch.set_num_threads(7)
illada.varlen_attention(q, q, q, cu)
_native.native().flush_denormals(True, 7)
torch.set_num_threads(2)
torch.rand(1 << 20).exp()
_native.native().flush_denormals(False, 7)
torch.set_num_threads(7)
assert (torch.rand(1 << 20).exp() > 0).all() and (torch.full((1 << 20,), 1e-39) * 0.7 > 0).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, dim", [(1, 3), (2, 32), (3, 20), (7, 64), (70, 16), (1, 250), (1, 256), (1, 257)])
def test_edges_of_the_cpu_s_tiles(group, dim, dtype, generator):
    """Rows, keys and columns around the sizes of tiles and blocks; the last head dim is for torch, as are many keys
    in bfloat16."""
    lengths, keys = [1, 0, 2, 5, 16, 17, 9, 64, 3], [1, 5, 63, 64, 65, 0, 128, 200, 3]
    q, k, v, cu = make(lengths, 2 * group, 2, dim, dtype, generator, keys=keys)
    arguments = {"cu_seqlens_k": cumulative(keys), "softmax_scale": 0.7, "return_lse": True}
    got = illada.varlen_attention(q, k, v, cu, **arguments)
    baseline = reference.varlen_attention(q, k, v, cu, **arguments)
    want = reference.varlen_attention(q.double(), k.double(), v.double(), cu, **arguments)
    for g, w, b in zip(got, want, baseline, strict=True):
        assert g.is_contiguous()
        assert_close_like(g.to(b.dtype), w, b)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, dim", [(1, 8), (1, 40), (2, 3), (4, 64), (7, 128), (70, 16), (1, 256), (1, 257)])
def test_gradients_at_edges_of_the_cpu_s_tiles(group, dim, dtype, generator):
    """As above, with lse's gradient; sequences without queries or without keys have none."""
    lengths, keys = [1, 0, 2, 65, 16, 17, 9, 64, 3], [1, 5, 63, 64, 65, 0, 128, 200, 3]
    q, k, v, cu = make(lengths, 2 * group, 2, dim, dtype, generator, keys=keys)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    lengths = {
        "cu_seqlens_k": cumulative(keys),
        "softmax_scale": 0.3,
        "d_lse": torch.randn(2 * group, len(q), generator=generator),
    }
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out, **lengths)
    baseline = run(reference.varlen_attention, q, k, v, cu, d_out=d_out, **lengths)
    want = run(reference.varlen_attention, q.double(), k.double(), v.double(), cu, d_out=d_out.double(), **lengths)
    for g, w, b in zip(got[2:], want[2:], baseline[2:], strict=True):
        assert g.is_contiguous() and g.dtype == dtype
        assert_close_like(g, w, b, factor=5 if group == 70 else 3)  # one sum over 65 x 70 = 4,550 rows
    assert (got[2][84:101] == 0).all() and (got[3][1:6] == 0).all() and (got[4][1:6] == 0).all()


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("lengths, ours, torchs", [([10, 100, 3], 1, 1), ([10, 0, 64], 1, 0), ([100, 65], 0, 1)])
def test_sequences_are_shared_with_torch(lengths, ours, torchs, with_dlse, generator, monkeypatch):
    """In bfloat16 on a processor that multiplies in it, torch gets the sequences of more than 64 keys.

    Gradients of lse are the exception: torch would compute in float32.
    """
    called = set()

    def record(module, name, part):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *inputs: (called.add(part), function(*inputs))[1])

    monkeypatch.setattr(_native.native(), "multiplies_bfloat16", lambda: True)
    record(attention.cpu, "_attend_by_torch", "torch's forward")
    record(attention.cpu, "_differentiate_by_torch", "torch's backward")
    record(raw, "varlen_attention_backward", "csrc/cpu")
    calls, at_once = lib.cpu_calls(), lib.cpu_calls().varlen_attention_backward

    def whole_pack(*inputs):
        grads = at_once(*inputs)
        called.update(["csrc/cpu"] if grads is not None else [])
        return grads

    monkeypatch.setattr(calls, "varlen_attention_backward", whole_pack)
    q, k, v, cu = make([*lengths, 5], 4, 2, 32, torch.bfloat16, generator)
    cu = cu[:-1]  # the last 5 tokens are of no sequence
    d_out = torch.randn(q.shape, generator=generator).bfloat16()
    d_lse = torch.randn(4, len(q), generator=generator) if with_dlse else None
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=d_lse)
    baseline = run(reference.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=d_lse)
    want = run(reference.varlen_attention, q.double(), k.double(), v.double(), cu, d_out=d_out.double(), d_lse=d_lse)
    for g, w, b in zip(got, want, baseline, strict=True):
        assert_close_like(g.to(b.dtype), w, b)
    forward, backward = {"torch's forward"} if torchs else set(), {"torch's backward"} if torchs else set()
    if with_dlse:
        ours, backward = 1, set()
    assert called == ({"csrc/cpu"} if ours else set()) | forward | backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lengths, keys",
    [
        ([70, 9, 300], None),
        ([1], [300]),
        ([300], [1]),
        ([64, 129], [200, 65]),
        ([16] * 40, None),  # each thread gets runs of them
        ([1100, 9], None),  # more scratch memory than a thread keeps
    ],
)
def test_gradients_have_the_same_bits_with_any_number_of_threads(lengths, keys, dtype, generator):
    """One key-value head: with more threads a long sequence is shared out, with one it is not."""
    q, k, v, cu = make(lengths, 3, 1, 40, dtype, generator, keys=keys)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_lse = torch.randn(3, len(q), generator=generator)
    cu_k = None if keys is None else cumulative(keys)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(run(illada.varlen_attention, q, k, v, cu, d_out=d_out, d_lse=d_lse, cu_seqlens_k=cu_k))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_sequence_are_its_own(dtype, generator):
    """The bits that it has alone, beside sequences and unused keys that are NaN, in inputs and in gradients."""
    q, k, v, cu = make([5, 90, 4], 4, 2, 20, dtype, generator)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_lse = torch.randn(4, len(q), generator=generator)
    used = torch.tensor([5, 77, 4], dtype=torch.int32)
    inputs = [x.clone() for x in (q, k, v, d_out, d_lse.T)]
    for x in inputs:
        x[:5], x[95:] = torch.nan, torch.nan
    inputs[1][82:95] = inputs[2][82:95] = torch.nan
    *inputs, d_out, d_lse = inputs
    got = run(illada.varlen_attention, *inputs, cu, d_out=d_out, d_lse=d_lse.T, cu_seqlens_k=cu, seqused_k=used)
    alone = {"cu_seqlens_k": cumulative([77]), "d_out": d_out[5:95], "d_lse": d_lse[5:95].T}
    want = run(illada.varlen_attention, q[5:95], k[5:82], v[5:82], cumulative([90]), **alone)
    assert torch.equal(got[2][5:95], want[2])
    for g, w in zip(got[3:], want[3:], strict=True):
        assert torch.equal(g[5:82], w) and (g[82:95] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_where_lse_has_few_digits(dtype, generator):
    """Scores near 1e5, whose lse says nothing of how far they are apart: probabilities still add up to 1."""
    q, k, v, cu = make([70, 9], 4, 2, 16, dtype, generator)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 1024, 1024
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    got = run(illada.varlen_attention, q, k, v, cu, d_out=d_out)
    ones = run(illada.varlen_attention, q, k, v, cu, d_out=torch.ones_like(q))
    per_key = ones[4].unflatten(1, (2, 1)).float().sum(0)  # sum of all probabilities, twice a query
    torch.testing.assert_close(per_key, torch.full_like(per_key, 2.0 * len(q)), rtol=1e-3, atol=0)
    want = run(reference.varlen_attention, q.double(), k.double(), v.double(), cu, d_out=d_out.double())
    assert (got[4] - want[4]).abs().max() < 0.05 * want[4].abs().max()


def test_nan_and_infinity_stay_in_their_rows(generator):
    q, k, v, cu = make([40, 30], 4, 2, 32, torch.float32, generator)
    clean = illada.varlen_attention(q, k, v, cu)
    q, v = q.clone(), v.clone()
    q[3, 1], v[50, 0, 5] = torch.nan, torch.inf
    out, lse = illada.varlen_attention(q, k, v, cu, return_lse=True)
    assert out[3, 1].isnan().all() and lse[1, 3].isnan() and lse.isnan().sum() == 1
    assert out[40:, :2, 5].isinf().all() and out.isinf().sum() == 60
    same = out.isfinite()
    assert torch.equal(out[same], clean[same]) and same.sum() == out.numel() - 60 - 32


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, generator, tmp_path):
    """In a process of its own, which chooses once."""
    q, k, v, cu = make([70, 1, 33], 6, 2, 51, torch.float32, generator)
    torch.save((q, k, v, cu), tmp_path / "in.pt")
    code = """
import illada, sys, torch
*qkv, cu = torch.load(sys.argv[1])
found = []
for dtype in (torch.float32, torch.bfloat16):
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out = illada.varlen_attention(*leaves, cu)
    found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)])
torch.save(found, sys.argv[2])
"""
    files = [str(tmp_path / name) for name in ("in.pt", "out.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env={**os.environ, "ILLADA_CPU_ISA": isa})
    for got, dtype in zip(torch.load(tmp_path / "out.pt"), (torch.float32, torch.bfloat16), strict=True):
        found = []
        for exact in (dtype, torch.float64):
            leaves = [x.to(dtype).to(exact).requires_grad_() for x in (q, k, v)]
            out = reference.varlen_attention(*leaves, cu)
            grads = torch.autograd.grad(out.float().square().sum(), leaves)
            found.append([out.detach(), *grads])
        for g, b, w in zip(got, *found, strict=True):
            assert_close_like(g, w, b)


def test_raw_calls(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=8).work
    out, lse = torch.full((8, 4, 64), 7.0), torch.full((4, 8), 7.0)
    raw.varlen_attention(out, lse, q, k, v, plan[:1], 2, 0.125)  # what the plan leaves out is left alone
    want, want_lse = illada.varlen_attention(q, k, v, cu, return_lse=True)
    assert torch.equal(out[:5], want[:5]) and (out[5:] == 7).all()
    assert torch.equal(lse[:, :5], want_lse[:, :5]) and (lse[:, 5:] == 7).all()
    for change, kind, match in (
        ({"plan": torch.tensor([[0, 5, 0, 9]], dtype=torch.int32)}, ValueError, "plan has keys 0 to 9 of 8"),
        ({"plan": torch.tensor([[4, 3, 0, 8]], dtype=torch.int32)}, ValueError, "plan has queries 4 to 3 of 8"),
        ({"softmax_scale": 0.0}, ValueError, "softmax_scale must be finite and > 0, got 0"),
        ({"q": q.half()}, NotImplementedError, "float32 and bfloat16 and head dims up to 256; got float16 and 64"),
        ({"v": v[:0]}, ValueError, "k and v must not be null"),
        ({"out": out[:0]}, ValueError, "q, plan, out and lse must not be null"),
        ({"k": k[:, :1].expand(-1, 3, -1), "v": v}, ValueError, "num_heads 4 must be a multiple of num_kv_heads 3"),
    ):
        arguments = {"out": out, "lse": lse, "q": q, "k": k, "v": v, "plan": plan, "softmax_scale": 0.125}
        with pytest.raises(kind, match=match):
            raw.varlen_attention(num_sequences=2, **{**arguments, **change})


def test_gradients_by_raw_calls(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    d_out = torch.randn(q.shape, generator=generator)
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=8).work
    out, lse, *want = run(illada.varlen_attention, q, k, v, cu, d_out=d_out)
    out, lse = out.detach(), lse.detach()
    got = [torch.full(x.shape, 7.0) for x in (q, k, v)]
    rest = (d_out, None, q, k, v, out, lse)
    raw.varlen_attention_backward(*got, *rest, plan[:1], 2, 0.125)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g[:5], w[:5]) and (g[5:] == 0).all()  # what the plan leaves out has no gradient
    for change, kind, match in (
        ({"plan": torch.tensor([[0, 5, 0, 9]], dtype=torch.int32)}, ValueError, "plan has keys 0 to 9 of 8"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite and > 0, got nan"),
        ({"q": q.half()}, NotImplementedError, "float32 and bfloat16 and head dims up to 256; got float16 and 64"),
        ({"dq": q[:0]}, ValueError, "dout and dq must not be null"),
        ({"dv": v[:0]}, ValueError, "dk and dv must not be null"),
    ):
        names = ("dq", "dk", "dv", "dout", "dlse", "q", "k", "v", "out", "lse", "plan", "softmax_scale")
        arguments = dict(zip(names, (*got, *rest, plan, 0.125), strict=True))
        with pytest.raises(kind, match=match):
            raw.varlen_attention_backward(num_sequences=2, **{**arguments, **change})


def test_scale_must_be_positive(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    for scale in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softmax_scale must be finite and > 0, got"):
            illada.varlen_attention(q, k, v, cu, softmax_scale=scale)


def test_plan_of_another_device(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=8)
    with pytest.raises(ValueError, match="varlen_attention: plan is on meta, but q is on cpu; they must agree"):
        illada.varlen_attention(q, k, v, cu, plan=plan._replace(work=plan.work.to("meta")))


def test_plan_of_another_number_of_sequences(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=8)
    with pytest.raises(ValueError, match="plan was made for num_sequences 2, this call has 1"):
        illada.varlen_attention(q, k, v, cu[[0, 2]], plan=plan)


@pytest.mark.parametrize("shape, dtype", [((3,), torch.int32), ((2, 4), torch.int64), ((1, 4), torch.int32)], ids=str)
def test_both_directions_refuse_a_wrong_plan(shape, dtype):
    """The kernels would read beyond it."""
    x, lse, plan = torch.zeros(2, 1, 8), torch.zeros(1, 2), torch.zeros(shape, dtype=dtype)
    match = rf"the plan must be int32 \[2, 4\], .* got {str(dtype)[6:]} {re.escape(str(list(shape)))}"
    with pytest.raises(ValueError, match=match):
        torch.ops.illada.varlen_attention_fwd(x, x, x, plan, 1, 1.0, False)
    with pytest.raises(ValueError, match=match):
        torch.ops.illada.varlen_attention_bwd(x, None, x, x, x, x, lse, plan, 1, 1.0, False)


def test_registration(generator):
    q, k, v, cu = make([6, 0, 3], 4, 2, 64, torch.float32, generator)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=64, total_q=9)
    torch.library.opcheck(torch.ops.illada.attention_plan.default, (cu, None, None, 9, 9, 4, 2, 64))
    torch.library.opcheck(torch.ops.illada.varlen_attention_fwd.default, (*leaves, plan.work, 3, 0.125, False))
    out, lse = illada.varlen_attention(q, k, v, cu, return_lse=True)
    saved = (out, torch.randn_like(lse), q, k, v, out, lse, plan.work, 3, 0.125, False)
    torch.library.opcheck(
        torch.ops.illada.varlen_attention_bwd.default, saved, test_utils=("test_schema", "test_faketensor")
    )


def test_double_backward_raises(generator):
    q, k, v, cu = make([4], 2, 1, 64, torch.float32, generator)
    q = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(illada.varlen_attention(q, k, v, cu).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_compiles_in_one_graph_for_all_lengths(generator):
    def layer(x, weight, cu):
        q, k, v = (x @ weight).unflatten(-1, (8, 64)).split([4, 2, 2], dim=1)
        return illada.varlen_attention(q, k, v, cu).flatten(1)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    weight = torch.randn(16, 512, generator=generator) / 4
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([5, 3], [2, 6], [4, 9]):
        x = torch.randn(sum(lengths), 16, generator=generator)
        torch.testing.assert_close(compiled(x, weight, cumulative(lengths)), layer(x, weight, cumulative(lengths)))
    assert len(graphs) == 1


def test_autocast_and_flops(generator):
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    with torch.autocast("cpu", torch.bfloat16):
        assert illada.varlen_attention(q, k, v, cu).dtype == torch.bfloat16
    q = q.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        illada.varlen_attention(q, k, v, cu).sum().backward()
    assert counter.get_total_flops() == 14 * 4 * 64 * (25 + 9)


def test_errors(generator):
    q, k, v, cu = make([5, 3], 4, 2, 64, torch.float32, generator)
    wrong = [
        (TypeError, "q must be float32", (q.double(), k, v, cu)),
        (TypeError, "k must be float32, got bfloat16", (q, k.bfloat16(), v, cu)),
        (TypeError, "cu_seqlens must be int32, int64, got float32", (q, k, v, cu.float())),
        (ValueError, r"q must have shape \[T, H, D\], got \[8, 256\]", (q.flatten(1), k, v, cu)),
        (ValueError, r"k must have shape \[Tk, G, 64\]", (q, k[..., :32], v, cu)),
        (ValueError, r"v must have shape \[8, 2, 64\]", (q, k, v[:7], cu)),
        (
            ValueError,
            "last dimension of q must be contiguous",
            (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cu),
        ),
        (ValueError, "q has 3 heads, which must be a multiple of k's 2", (q[:, :3], k, v, cu)),
        (ValueError, "k has 7 tokens and q has 8", (q, k[:7], v[:7], cu)),
        (ValueError, "cu_seqlens is on meta, but q is on cpu", (q, k, v, cu.to("meta"))),
        (ValueError, "cu_seqlens must start at 0, got 1", (q, k, v, torch.tensor([1, 8], dtype=torch.int32))),
        (ValueError, "must ascend, got 5 before 3", (q, k, v, torch.tensor([0, 5, 3, 8], dtype=torch.int32))),
        (ValueError, "must end at 8 or before, got 9", (q, k, v, torch.tensor([0, 9], dtype=torch.int32))),
        (ValueError, "cu_seqlens must have shape", (q, k, v, cu[:0])),
    ]
    for error, match, arguments in wrong:
        with pytest.raises(error, match=match):
            illada.varlen_attention(*arguments)
    slots = cumulative([5, 3])
    with pytest.raises(ValueError, match=r"seqused_k must be within the key slots \[5, 3\], got \[6, 1\]"):
        illada.varlen_attention(q, k, v, cu, cu_seqlens_k=slots, seqused_k=torch.tensor([6, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens_k ends at 9, but k has 8 tokens"):
        illada.varlen_attention(q, k, v, cu, cu_seqlens_k=cumulative([5, 4]))
    with pytest.raises(ValueError, match="num_heads 3 must be a multiple of num_kv_heads 2"):
        illada.attention_plan(cu, num_heads=3, num_kv_heads=2, head_dim=64, total_q=8)


@pytest.mark.parametrize("sequences", [1, 2])
def test_tokens_times_heads_beyond_32_bits(sequences):
    """The last token of 2^15 + 1 with 2^16 heads each; nothing but its part of the sparse results is touched."""
    tokens, heads = 2**15 + 1, 2**16

    def sparse(*shape, dtype):  # zeros, of which what is not written takes no memory
        count = math.prod(shape)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.13 names
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype).view(shape)

    out, lse = sparse(tokens, heads, 1, dtype=torch.bfloat16), sparse(heads, tokens, dtype=torch.float32)
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16).expand(tokens, heads, 1)
    plan = torch.tensor([[tokens - 1, tokens, 0, 3], [0, 1, 0, 3]], dtype=torch.int32)[:sequences]
    raw.varlen_attention(out, lse, x, x, x, plan, sequences, 1.0)
    assert bool((out[-1] == 1).all()) and bool((out[0] == sequences - 1).all())
    assert out[-2, -9:].count_nonzero() == 0
    torch.testing.assert_close(lse[-4:, -1], torch.full((4,), 1 + math.log(3.0)))


@pytest.mark.parametrize("watched", [False, True])
def test_errors_are_those_of_the_dispatcher(watched):
    """A call with a plan takes the native checks; each wrong argument has the same error on both ways."""
    q, k, v = torch.ones(3, 2, 4), torch.ones(3, 1, 4), torch.ones(3, 1, 4)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    plan = illada.attention_plan(starts, num_heads=2, num_kv_heads=1, head_dim=4, total_q=3)
    empty = plan._replace(head_dim=0)
    with torch.device("cpu") if watched else contextlib.nullcontext():  # a mode: the call takes the dispatcher
        with pytest.raises(ValueError, match=r"q must have shape \[T, H, D\], got \[\]"):
            illada.varlen_attention(torch.tensor(1.0), k, v, starts, plan=plan)
        with pytest.raises(NotImplementedError, match="head dims up to 256; got float32 and 0"):
            illada.varlen_attention(q[..., :0], k[..., :0], v[..., :0], starts, plan=empty, softmax_scale=1.0)
