"""The results of varlen_attention on every device against float64, in units of the error of plain torch at the same dtype.

Every key, value and query that a sequence must not see is NaN: the rows between slots, the unused part of a slot, and
for one sequence at a time the whole rest of the pack. Gradients are in test_ops_attention_backward.py. What the kernels
of one device alone have is in test_cpu_attention.py and in tests/cuda/test_attention*.py.
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
)

import illada


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths, heads, kv_heads, dim", CASES)
def test_matches_fp64(lengths, heads, kv_heads, dim, dtype, device):
    room = 3 if lengths == TILE_EDGES[:8] else 0
    Pack(lengths, device, room=room, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("length", [1, 64, 127, 129, 177])
@pytest.mark.parametrize("dim", DIMS)
def test_one_sequence(length, dim, device):
    Pack([length], device, room=0, dim=dim).check()


@pytest.mark.parametrize("heads, kv_heads", GROUPS)
@pytest.mark.parametrize("dim", DIMS)
def test_groups(heads, kv_heads, dim, device):
    Pack([37, 0, 70, 1], device, heads=heads, kv_heads=kv_heads, dim=dim).check()


@pytest.mark.parametrize("dtype", BFLOAT16_OR_CPU_FLOAT32)
@pytest.mark.parametrize("lengths, keys", SLOTS)
@pytest.mark.parametrize("kv_heads", [1, pytest.param(4, marks=ON_CPU)])
@pytest.mark.parametrize("dim", DIMS)
def test_queries_and_keys_of_different_lengths(dim, kv_heads, lengths, keys, dtype, device):
    Pack(lengths, device, keys=keys, dim=dim, kv_heads=kv_heads, dtype=dtype).check()


@pytest.mark.parametrize(
    "block, dim",
    [(3, 128), *(pytest.param(*p, marks=ON_CUDA) for p in [(1, 128), (32, 128), (64, 128), (3, 64), (3, 96), (32, 96), (3, 256)])],
)  # fmt: skip
def test_block_against_a_long_cache(block, dim, device):
    """Few queries, many keys. CUDA's kernels split them over keys and combine, and some sequences not."""
    Pack([block, block, 2], device, keys=[1500, 129, 40], room=20, dim=dim).check()


@pytest.mark.parametrize("dim", DIMS)
def test_scores_that_outgrow_the_first_tile(dim, device):
    """Large scores that grow along the keys: what was summed before must be scaled down, again and again."""
    pack = Pack([40], device, keys=[600], dim=dim, scale=6.0)
    slots = pack.lengths["cu_seqlens_k"]
    growth = torch.linspace(3, 0.1, 600)[:, None, None]  # CUDA's kernels begin with the last keys
    if device.type == "cpu":
        growth = growth.flip(0)
    pack.k[slots[0] : slots[0] + 600] = (pack.k[slots[0] : slots[0] + 600] * growth).to(pack.k.dtype)
    pack.check()


def test_scale(device):
    Pack([70], device, room=0).check(softmax_scale=0.3)


@pytest.mark.parametrize("dtype", BFLOAT16_OR_CPU_FLOAT32)
@pytest.mark.parametrize("dim", DIMS)
def test_neighbours_in_the_pack_are_not_seen(dim, dtype, device):
    """One sequence keeps its numbers while all others are NaN, on both sides; and its result is the same to the bit."""
    pack = Pack([65, 130, 33], device, room=0, dim=dim, dtype=dtype)
    lengths = pack.on_device_lengths()
    want = illada.varlen_attention(*pack.on_device(), **lengths)
    for start, end in ((0, 65), (65, 195), (195, 228)):
        poisoned = []
        for x in pack.on_device():
            alone = torch.full_like(x, torch.nan)
            alone[start:end] = x[start:end]
            poisoned.append(alone)
        assert torch.equal(illada.varlen_attention(*poisoned, **lengths)[start:end], want[start:end])


@pytest.mark.parametrize("dtype", BFLOAT16_OR_CPU_FLOAT32)
def test_no_keys_and_no_sequences(dtype, device):
    q = torch.randn(5, 4, 64, dtype=dtype).to(device)
    none = q.new_empty(0, 2, 64)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    out, lse = illada.varlen_attention(q, none, none, starts, cu_seqlens_k=0 * starts, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    leaf = q[:0].detach().requires_grad_()
    out, lse = illada.varlen_attention(leaf, none, none, starts[:1], return_lse=True)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == (0, 4, 64)


# -------------------------------------------------------------------------------------------------------------- errors


def int32(q, *values):
    return torch.tensor(values, dtype=torch.int32).to(q.device)


def elsewhere(x):
    """The same on another device."""
    return x.to("meta") if x.device.type == "cpu" else x.cpu()


# The exception, its message, and the arguments, of q [8, 4, 128], k and v [8, 2, 128], and lengths 5 and 3.
ERRORS = {
    "float64": (TypeError, "q must be float32", lambda q, k, v, cu: ((q.double(), k, v, cu), {})),
    "dtypes": (TypeError, "k must be bfloat16, got float16", lambda q, k, v, cu: ((q, k.half(), v, cu), {})),
    "dimensions": (ValueError, r"q must have shape \[T, H, D\], got \[8, 512\]", lambda q, k, v, cu: ((q.flatten(1), k, v, cu), {})),
    "head dims": (ValueError, r"k must have shape \[Tk, G, 128\]", lambda q, k, v, cu: ((q, k[..., :32], v, cu), {})),
    "tokens of v": (ValueError, r"v must have shape \[8, 2, 128\]", lambda q, k, v, cu: ((q, k, v[:7], cu), {})),
    "last stride": (ValueError, "last dimension of q must be contiguous", lambda q, k, v, cu: ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v, cu), {})),
    "heads": (ValueError, "q has 3 heads, which must be a multiple of k's 2", lambda q, k, v, cu: ((q[:, :3], k, v, cu), {})),
    "tokens of k": (ValueError, "k has 7 tokens and q has 8", lambda q, k, v, cu: ((q, k[:7], v[:7], cu), {})),
    "device": (ValueError, "k is on {other}, but q is on {here}", lambda q, k, v, cu: ((q, elsewhere(k), v, cu), {})),
    "cu_seqlens device": (ValueError, "cu_seqlens is on {other}, but q is on {here}", lambda q, k, v, cu: ((q, k, v, elsewhere(cu)), {})),
    "cu_seqlens dtype": (TypeError, "cu_seqlens must be int32, int64, got float32", lambda q, k, v, cu: ((q, k, v, cu.float()), {})),
    "cu_seqlens shape": (ValueError, r"cu_seqlens must have shape \[S \+ 1\]", lambda q, k, v, cu: ((q, k, v, cu.new_zeros(2, 2)), {})),
    "no cu_seqlens": (ValueError, "cu_seqlens must have shape", lambda q, k, v, cu: ((q, k, v, cu[:0]), {})),
    "seqused_k shape": (ValueError, r"seqused_k must have shape \[2\]", lambda q, k, v, cu: ((q, k, v, cu), {"cu_seqlens_k": cu, "seqused_k": cu})),
    **{f"scale {x}": (ValueError, f"softmax_scale must be finite and > 0, got {float(x)}", lambda q, k, v, cu, x=x: ((q, k, v, cu), {"softmax_scale": x})) for x in (0, -1.0, float("inf"), float("nan"))},
}  # fmt: skip
ONLY_ON_CUDA = {  # what CPUs compute
    "dtype": (NotImplementedError, "bfloat16 and float16; got float32", lambda q, k, v, cu: ((q.float(), k.float(), v.float(), cu), {})),
    "head dim": (NotImplementedError, "head dims 64, 96, 128 and 256 .* got head dim 32", lambda q, k, v, cu: (([x[..., :32].contiguous() for x in (q, k, v)] + [cu]), {})),
    "group": (NotImplementedError, "up to 64 query heads", lambda q, k, v, cu: ((q.repeat(1, 17, 1), k[:, :1], v[:, :1], cu), {})),
    "token stride": (NotImplementedError, "q must have positive strides that are multiples of 8", lambda q, k, v, cu: ((q.new_zeros(8, 260)[:, :256].unflatten(1, (2, 128)), k, v, cu), {})),
    "expanded": (NotImplementedError, "k must have positive strides", lambda q, k, v, cu: ((q, k[:, :1].expand(-1, 2, -1), v, cu), {})),
    "alignment": (NotImplementedError, "16-byte aligned", lambda q, k, v, cu: ((q, k, v.new_zeros(v.numel() + 1)[1:].view_as(v), cu), {})),
}  # fmt: skip
# Of lengths, which are read on CUDA with ILLADA_DEBUG=1 alone.
VALUES = {
    "start": ("cu_seqlens must start at 0, got 1", lambda q: {"cu_seqlens": int32(q, 1, 8)}),
    "order": ("must ascend, got 5 before 3", lambda q: {"cu_seqlens": int32(q, 0, 5, 3, 8)}),
    "end": ("cu_seqlens must end at 8 or before, got 9", lambda q: {"cu_seqlens": int32(q, 0, 9)}),
    "used": (r"seqused_k must be within the key slots \[5, 3\], got \[6, 1\]", lambda q: {"cu_seqlens": int32(q, 0, 5, 8), "cu_seqlens_k": int32(q, 0, 5, 8), "seqused_k": int32(q, 6, 1)}),
    "end of keys": ("cu_seqlens_k ends at 9, but k has 8 tokens", lambda q: {"cu_seqlens": int32(q, 0, 5, 8), "cu_seqlens_k": int32(q, 0, 5, 9)}),
}  # fmt: skip


@pytest.fixture
def inputs(device):
    x = torch.zeros(8, 8, 128, dtype=torch.bfloat16).to(device)
    return x[:, :4], x[:, 4:6], x[:, 6:], torch.tensor([0, 5, 8], dtype=torch.int32).to(device)


@pytest.mark.parametrize("what", [*ERRORS, *(pytest.param(x, marks=ON_CUDA) for x in ONLY_ON_CUDA)])
def test_errors(what, inputs, device):
    error, message, make = {**ERRORS, **ONLY_ON_CUDA}[what]
    arguments, keywords = make(*inputs)
    here, other = ("cpu", "meta") if device.type == "cpu" else ("cuda:0", "cpu")
    with pytest.raises(error, match=message.replace("{here}", here).replace("{other}", other)):
        illada.varlen_attention(*arguments, **keywords)


@pytest.mark.parametrize("what", VALUES)
def test_lengths_are_checked(what, inputs, device, monkeypatch):
    message, make = VALUES[what]
    if device.type == "cuda":
        monkeypatch.setenv("ILLADA_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        illada.varlen_attention(*inputs[:3], **make(inputs[0]))


def test_plan_of_another_call(inputs, device):
    q, k, v, cu = inputs
    plan = illada.attention_plan(cu, num_heads=4, num_kv_heads=2, head_dim=128, total_q=8)
    assert torch.equal(illada.varlen_attention(q, k, v, cu, plan=plan), illada.varlen_attention(q, k, v, cu))
    with pytest.raises(ValueError, match="plan was made for num_heads 4, this call has 2"):
        illada.varlen_attention(q[:, :2], k, v, cu, plan=plan)
    with pytest.raises(ValueError, match="plan was made for num_sequences 2, this call has 1"):
        illada.varlen_attention(q, k, v, cu[[0, 2]], plan=plan)
    other, here = ("meta", "cpu") if device.type == "cpu" else ("cpu", "cuda:0")
    message = f"varlen_attention: plan is on {other}, but q is on {here}; they must agree"
    with pytest.raises(ValueError, match=message):
        illada.varlen_attention(q, k, v, cu, plan=plan._replace(work=elsewhere(plan.work)))
    with pytest.raises(ValueError, match="num_heads 3 must be a multiple of num_kv_heads 2"):
        illada.attention_plan(cu, num_heads=3, num_kv_heads=2, head_dim=128, total_q=8)
