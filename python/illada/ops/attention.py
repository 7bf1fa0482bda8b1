"""Packed, bidirectional, grouped-query attention over sequences of any lengths.

    out[i, h] = sum_j softmax_j(softmax_scale * q[i, h] . k[j, g]) v[j, g],   g = h // (H / G)

The index j runs over all keys of token i's own sequence. There is no causal mask, no dropout, no padding and no
`max_seqlen`. `AttentionPlan` holds what depends only on the lengths. A model computes it once per batch for all layers.

| device | dtypes                     | head dim | kernel                                                     |
|--------|----------------------------|----------|------------------------------------------------------------|
| CPU    | float32, bfloat16          | to 256   | csrc/cpu, all sequences at once (bfloat16: up to 64 keys   |
|        |                            |          | where the processor multiplies in it)                      |
|        | float32, bfloat16, float16 | any      | torch's CPU flash attention, one call per sequence         |
| CUDA   | bfloat16, float16          | 64, 96,  | sm_80 and newer (mma.sync); sm_90a (wgmma, TMA) has its    |
|        |                            | 128, 256 | own for 64 and 128; H / G up to 64                         |

On CUDA a pack of few queries and many keys (a block against its cache) is split over keys. Its results then depend in
the last bits on what else is in the pack. Results of larger packs do not.

Queries are independent of each other, so the kernels treat the H / G query heads of a key-value head as additional
queries of that head. Keys and values are never repeated, and their gradients are already summed over the group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from illada._native import native
from illada.devices import autocast_dtype
from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.types import AttentionPlan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

lib.LIBRARY.define(
    "attention_plan(Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt total_q, SymInt? total_k, "
    "int num_heads, int num_kv_heads, int head_dim) -> Tensor",
    tags=lib.TAGS,
)
lib.LIBRARY.define(
    "varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor plan, SymInt num_sequences, float softmax_scale, "
    "bool deterministic) -> (Tensor, Tensor)",
    tags=lib.TAGS,
)
lib.LIBRARY.define(
    "varlen_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor plan, SymInt num_sequences, float softmax_scale, bool deterministic) -> (Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)


# ---------------------------------------------------------------------------------------------------- kernels (CPU)


def _check_lengths(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int) -> None:
    """Raise ValueError for lengths that do not fit, where the host may read them."""
    if not lib.may_read(cu_seqlens):
        return
    lib.check_cumulative("attention_plan", "cu_seqlens", cu_seqlens, total_q, may_end_before=True)
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_k is not None:
        lib.check_cumulative("attention_plan", "cu_seqlens_k", cu_seqlens_k, None)
    if seqused_k is not None:
        room = starts_k[1:] - starts_k[:-1]
        if bool(((seqused_k < 0) | (seqused_k > room)).any()):
            raise ValueError(
                f"attention_plan: seqused_k must be within the key slots {room.tolist()}, got {seqused_k.tolist()}"
            )


def _plan_cpu(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int, total_k: int | None,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    sequences = cu_seqlens.shape[0] - 1
    plan = cu_seqlens.new_empty(sequences + 1, 4)
    if not native().attention_plan_cpu(
        total_q=total_q,
        num_sequences=sequences,
        cu_seqlens=lib.contiguous(cu_seqlens),
        cu_seqlens_k=None if cu_seqlens_k is None else lib.contiguous(cu_seqlens_k),
        seqused_k=None if seqused_k is None else lib.contiguous(seqused_k),
        plan=plan,
    ):
        _check_lengths(cu_seqlens, cu_seqlens_k, seqused_k, total_q)
        # _check_lengths has a better message for most cases.
        raise ValueError("attention_plan: the lengths do not ascend from 0, or do not fit")
    return plan


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Reshape [T, H, D] to [1, G, T * (H / G), D]: the query heads of a group become queries.

    The result is a view where H == G.
    """
    length, heads, dim = x.shape
    return x.unflatten(1, (groups, heads // groups)).transpose(0, 1).reshape(1, groups, -1, dim)


def _from_group(x: Tensor, group: int) -> Tensor:
    """Invert `_by_group`; returns contiguous [T, H, D]; `group` is H / G."""
    return x[0].unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2).contiguous()


def _sequences(plan: Tensor, group: int) -> Iterator[tuple[slice, slice]]:
    """Yield the (queries, keys) slices of each sequence that has both; each query has `group` neighbouring rows."""
    for q_start, q_end, k_start, k_end in plan.tolist():
        if q_end > q_start and k_end > k_start:
            yield slice(q_start * group, q_end * group), slice(k_start, k_end)


_MOST_HEAD_DIM = 256  # largest head dim of csrc/cpu
_ALL_KEYS = 2**31
_BFLOAT16_KEYS = 64  # with more keys, torch is faster if the processor multiplies in bfloat16


def _most_keys(q: Tensor) -> int:
    """Return the most keys of a sequence that csrc/cpu computes; torch gets those with more."""
    return _BFLOAT16_KEYS if q.dtype == torch.bfloat16 and native().multiplies_bfloat16() else _ALL_KEYS


def _shares(plan: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split the rows of a plan into those for csrc/cpu and those for torch; None if torch gets no row."""
    if q.dtype == torch.float16 or q.shape[2] > _MOST_HEAD_DIM:
        return plan[:0], plan
    if (most := _most_keys(q)) == _BFLOAT16_KEYS:
        many = plan[:, 3] - plan[:, 2] > most
        if many.any():
            return plan[~many], plan[many]
    return plan, None


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero within the context.

    Very small probabilities are denormal numbers, on which torch's GEMMs slow down tenfold.
    """
    threads = torch.get_num_threads()
    native().flush_denormals(True, threads)
    try:
        yield
    finally:
        native().flush_denormals(False, threads)


def _torch_is_right(lse: Tensor) -> bool:
    """Return whether torch's kernels agree with the formula, judged by the lse of a sequence.

    Scores of -inf or +inf have no softmax, but torch's kernels return 0 for them in some dtypes and sizes. The lse is
    then NaN, infinite or 0. A correct lse may also be exactly 0; that sequence uses the plain implementation, with its
    quadratic memory, without need.

    Gradients also need an lse that makes the probabilities sum to 1. Where the lse is large, its rounding changes that
    sum.
    """
    return bool(((lse != 0) & (lse.abs() < 2**14)).all())


def _softmax(q: Tensor, k: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Return (probabilities [rows, keys], lse [rows]) of q [rows, D] and k [keys, D], float32."""
    scores = (q.float() @ k.float().mT).mul_(softmax_scale)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1), lse


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of a sequence [1, G, rows, D], with all scores of a key-value head in memory."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for g in range(q.shape[1]):
        p, lse[0, g] = _softmax(q[0, g], k[0, g], softmax_scale)
        out[0, g] = p @ v[0, g].float()
    return out, lse


def _differentiate_plainly(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of a sequence, float32, with all scores of a key-value head in memory."""
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    for g in range(q.shape[1]):
        p, _ = _softmax(q[0, g], k[0, g], softmax_scale)
        do = dout[0, g].float()
        dv[0, g] = p.mT @ do
        dp = do @ v[0, g].float().mT
        c = (p * dp).sum(-1, keepdim=True)
        ds = p * (dp - (c if dlse is None else c - dlse[0, g]))
        dq[0, g], dk[0, g] = ds @ k[0, g].float() * softmax_scale, ds.mT @ q[0, g].float() * softmax_scale
    return dq, dk, dv


def _check_cpu_plan(plan: Tensor, num_sequences: int) -> None:
    if plan.shape != (num_sequences + 1, 4) or plan.dtype != torch.int32 or not plan.is_contiguous():
        raise ValueError(
            f"varlen_attention: the plan must be int32 [{num_sequences + 1}, 4], contiguous, as attention_plan makes "
            f"it; got {str(plan.dtype).removeprefix('torch.')} {list(plan.shape)}"
        )


def _fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_sequences: int, softmax_scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    results = lib.cpu_calls().varlen_attention(
        *(q, k, v, plan, num_sequences, softmax_scale, _MOST_HEAD_DIM, _most_keys(q))
    )
    if results is not None:
        return results
    _check_cpu_plan(plan, num_sequences)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    plan, others = _shares(plan, q)
    if len(plan):
        raw.varlen_attention(out, lse, q, k, v, plan, num_sequences, softmax_scale)
    if others is not None:
        _attend_by_torch(out, lse, q, k, v, others, softmax_scale)
    return out, lse


@_without_denormals()
def _attend_by_torch(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, softmax_scale: float
) -> None:
    """Compute the sequences of these plan rows into out and lse."""
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    for q_start, q_end, k_start, k_end in plan.tolist():
        if k_end == k_start:
            out[q_start:q_end], lse[:, q_start:q_end] = 0, -torch.inf
        elif q_end > q_start:
            its_q, its_k, its_v = (_by_group(x, groups) for x in (q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]))
            x, its_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                its_q, its_k, its_v, scale=softmax_scale
            )
            if not _torch_is_right(its_lse):
                x, its_lse = _attend_plainly(its_q, its_k, its_v, softmax_scale)
            out[q_start:q_end] = _from_group(x, group)
            lse[:, q_start:q_end] = its_lse[0].unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)


def _differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, softmax_scale: float
) -> tuple[Tensor, ...]:
    """Compute (dq, dk, dv) of a sequence by torch's flash attention."""
    dim = q.shape[-1]
    if dlse is not None:
        # dS = P * (dout v^T + dlse - rowsum(dout * out)). Append a column: dlse to dout, 1 to v and 0 to out. It adds
        # dlse to the first term and nothing to the last. Use float32, because dlse contains a loss's factor, which may
        # not fit 16 bits.
        q, k, out = (torch.nn.functional.pad(x.float(), (0, 1)) for x in (q, k, out))
        v = torch.nn.functional.pad(v.float(), (0, 1), value=1.0)
        dout = torch.cat([dout.float(), dlse], dim=-1)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, scale=softmax_scale
    )
    return tuple(grad[..., :dim] for grad in grads)


@_without_denormals()
def _differentiate_by_torch(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of a pack; they are 0 for tokens that the plan leaves out."""
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    dout, q, k, v, out = (_by_group(x, groups) for x in (dout, q, k, v, out))
    lse = lse.unflatten(0, (groups, -1)).transpose(1, 2).reshape(1, groups, -1)
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    if dlse is not None:
        dlse = dlse.unflatten(0, (groups, -1)).transpose(1, 2).reshape(1, groups, -1, 1)
    for rows, keys in _sequences(plan, group):
        its_dout, its_q, its_k, its_v = dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]
        its_lse, its_dlse = lse[:, :, rows], None if dlse is None else dlse[:, :, rows]
        grads: tuple[Tensor, ...]
        if _torch_is_right(its_lse):
            grads = _differentiate(its_dout, its_q, its_k, its_v, out[:, :, rows], its_lse, its_dlse, softmax_scale)
        else:
            grads = _differentiate_plainly(its_dout, its_dlse, its_q, its_k, its_v, softmax_scale)
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = grads
    return _from_group(dq, group), _from_group(dk, 1), _from_group(dv, 1)


def _bwd_cpu(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    num_sequences: int,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    # torch would compute the products of a call with dlse in float32, where it gains nothing. Its bits would depend on
    # the number of threads.
    by_torch = dlse is None or q.dtype != torch.bfloat16 or q.shape[2] > _MOST_HEAD_DIM
    most_keys = _most_keys(q) if by_torch else _ALL_KEYS
    grads = lib.cpu_calls().varlen_attention_backward(
        *(dout, dlse, q, k, v, out, lse, plan, num_sequences, softmax_scale, _MOST_HEAD_DIM, most_keys)
    )
    if grads is not None:
        return grads
    _check_cpu_plan(plan, num_sequences)
    plan, others = _shares(plan, q) if by_torch else (plan, None)
    theirs = None
    if others is not None:
        theirs = _differentiate_by_torch(dout, dlse, q, k, v, out, lse, others, softmax_scale)
        if not ((plan[:, 1] > plan[:, 0]) & (plan[:, 3] > plan[:, 2])).any():  # no row has query-key pairs
            return theirs
    dout = dout if dout.stride(2) == 1 else dout.contiguous()  # strides of 0 (gradient of a sum), or transposed
    dlse = None if dlse is None else dlse.contiguous()
    ours = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    raw.varlen_attention_backward(*ours, dout, dlse, q, k, v, out, lse, plan, num_sequences, softmax_scale)
    return ours if theirs is None else tuple(x.add_(y) for x, y in zip(ours, theirs, strict=True))


# --------------------------------------------------------------------------------------------------- kernels (CUDA)


def plan_rows(total_q: int, total_k: int | None, num_sequences: int, num_heads: int, num_kv_heads: int) -> int:
    """Return the number of rows of a plan on CUDA, as `plan_rows` of csrc/attention does, also for symbolic shapes."""
    block_tokens = max(64 // (num_heads // num_kv_heads), 1)
    tiles = num_kv_heads * (total_q // (2 * block_tokens) + num_sequences)
    forward = tiles + num_kv_heads + 320
    backward = 0 if total_k is None else num_kv_heads * (total_k // 128 + num_sequences)
    return 1 + 2 * forward + 2 * backward + num_sequences


def _plan_cuda(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int, total_k: int | None,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    _check_lengths(cu_seqlens, cu_seqlens_k, seqused_k, total_q)
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    seqused_k = None if seqused_k is None else seqused_k.contiguous()
    sizes = (num_heads, num_kv_heads, head_dim)
    rows = raw.attention_plan_rows(total_q, total_k, cu_seqlens.shape[0] - 1, *sizes)
    plan = cu_seqlens.new_empty(rows, 4)
    raw.attention_plan(plan, cu_seqlens, cu_seqlens_k, seqused_k, total_q, total_k, *sizes)
    return plan


def _fwd_cuda(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_sequences: int, softmax_scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    total_q, heads, dim = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(heads, total_q, dtype=torch.float32)
    size = raw.varlen_attention_workspace(total_q, num_sequences, heads, k.shape[1], dim)
    workspace = q.new_empty(size, dtype=torch.uint8) if size else None
    raw.varlen_attention(out, lse, q, k, v, plan, num_sequences, softmax_scale, workspace=workspace)
    return out, lse


# Mean number of queries per sequence. At or below it, recomputing the scores for dq is at least as fast as atomic adds.
_REPEATABLE_LENGTH = 256


def recompute_scores_for_dq(total_q: int, num_sequences: int) -> bool:
    """Return whether the backward on CUDA recomputes the scores for dq, which is bitwise repeatable."""
    return total_q <= _REPEATABLE_LENGTH * num_sequences


def _bwd_cuda(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    num_sequences: int,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # dout has any layout: broadcast (the gradient of a sum has strides of 0), transposed, or unaligned.
    strides = dout.stride()
    if strides[2] != 1 or min(strides) <= 0 or strides[0] % 8 or strides[1] % 8 or dout.data_ptr() % 16:
        dout = dout.clone(memory_format=torch.contiguous_format)
    if dlse is not None and not dlse.is_contiguous():
        dlse = dlse.clone(memory_format=torch.contiguous_format)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    recompute = recompute_scores_for_dq(q.shape[0], num_sequences)
    sizes = (q.shape[0], k.shape[0], num_sequences, q.shape[1], k.shape[1], q.shape[2])
    size = raw.varlen_attention_backward_workspace(*sizes, deterministic, recompute, q.device.index)
    raw.varlen_attention_backward(
        *(dq, dk, dv, dout, dlse, q, k, v, out, lse, plan, num_sequences, softmax_scale),
        workspace=q.new_empty(size, dtype=torch.uint8),
        deterministic=deterministic,
        recompute_scores_for_dq=recompute,
    )
    return dq, dk, dv


# --------------------------------------------------------------------------------------- fakes, autograd, FLOP counts


def _plan_fake(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    total_q: int,
    total_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    sequences = cu_seqlens.shape[0] - 1
    if cu_seqlens.device.type == "cuda":
        return cu_seqlens.new_empty(plan_rows(total_q, total_k, sequences, num_heads, num_kv_heads), 4)
    return cu_seqlens.new_empty(sequences + 1, 4)


def _fwd_fake(q: Tensor, *arguments: lib.Argument) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: lib.Argument
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Context(lib.Context):
    num_sequences: int
    softmax_scale: float
    deterministic: bool


def _setup_context(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, ctx.num_sequences, ctx.softmax_scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.set_materialize_grads(False)


def _keep(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    _setup_context(ctx, inputs, output)
    return output[:1]


def _backward(ctx: _Context, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return None, None, None, None, None, None, None
    q, k, v, out, lse, plan = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _call_bwd(dout, dlse, q, k, v, out, lse, plan, ctx.num_sequences, ctx.softmax_scale, ctx.deterministic)
    return *grads, None, None, None, None


lib.implement("attention_plan", _plan_fake, cpu=_plan_cpu, cuda=_plan_cuda)
lib.implement("varlen_attention_fwd", _fwd_fake, cpu=_fwd_cpu, cuda=_fwd_cuda)
lib.implement("varlen_attention_bwd", _bwd_fake, cpu=_bwd_cpu, cuda=_bwd_cuda)
lib.register_autograd("varlen_attention_fwd", _backward, _setup_context)
lib.raise_on_double_backward("varlen_attention_bwd")
_call_plan = lib.caller("attention_plan")
_attend_directly = lib.direct("varlen_attention_fwd", 3, _keep, lambda ctx, dout: _backward(ctx, dout, None)[:3])
_call_fwd, _call_bwd = lib.caller("varlen_attention_fwd"), lib.caller("varlen_attention_bwd")


def _pairs(q: Tensor, k: Tensor, plan: Tensor, num_sequences: int) -> int:
    """Return the query-key pairs of the pack: exact where the host may read the plan, else for equal lengths."""
    if lib.may_read(plan):
        rows = plan.tolist()
        if plan.is_cuda:  # the last rows are the sequences, whose number is in the header
            rows = rows[len(rows) - rows[0][2] :]
        return sum((q_end - q_start) * (k_end - k_start) for q_start, q_end, k_start, k_end in rows)
    return q.shape[0] * k.shape[0] // max(1, num_sequences)


@lib.counts_flops("varlen_attention_fwd")
def _fwd_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_sequences: int,
    *args: lib.Argument,
    out_val: object = None,
    **kwargs: object,
) -> int:
    return 4 * q.shape[1] * q.shape[2] * _pairs(q, k, plan, num_sequences)  # two GEMMs


@lib.counts_flops("varlen_attention_bwd")
def _bwd_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    num_sequences: int,
    *args: lib.Argument,
    out_val: object = None,
    **kwargs: object,
) -> int:
    return 10 * q.shape[1] * q.shape[2] * _pairs(q, k, plan, num_sequences)  # five GEMMs


# --------------------------------------------------------------------------------------------------- public functions


def attention_plan(
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    total_q: int,
    total_k: int | None = None,
) -> AttentionPlan:
    """Make the plan of a pack on its device without a host sync; all layers and both directions reuse it.

    Args:
        cu_seqlens: int32 [S + 1], where each sequence of queries starts in the pack, and where the last one ends. The
            values ascend from 0 to at most `total_q`. Queries after the last sequence have no keys. All three tensors
            of lengths may be int64, which is copied.
        cu_seqlens_k: int32 [S + 1], where each sequence's slot of keys starts (anywhere, ascending), and where the last
            one ends; default: the same as the queries.
        seqused_k: int32 [S], how many keys of each slot are in use; default: all.
        num_heads: H of the attention calls, a multiple of G.
        num_kv_heads: G of the attention calls.
        head_dim: D of the attention calls.
        total_q: T, the number of packed queries.
        total_k: Tk, the number of rows of k and v. Default: T without cu_seqlens_k, otherwise unknown. A plan for
            gradients on CUDA needs it.

    Returns:
        AttentionPlan, whose work is int32 [rows, 4].

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device, or values that do not ascend or fit. Values are checked
            on a CPU, and on CUDA under ILLADA_DEBUG=1, because reading them there costs a sync; otherwise values on
            CUDA are clamped to what fits.
        NotImplementedError: No kernel was built for this device or these sizes.
    """
    op = "attention_plan"
    for name, tensor in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k), ("seqused_k", seqused_k)):
        if tensor is not None:
            lib.check_index(op, name, tensor)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    sequences = cu_seqlens.shape[0] - 1  # len() would be a constant under torch.export
    if cu_seqlens_k is not None:
        lib.check_shape(op, "cu_seqlens_k", cu_seqlens_k, (sequences + 1,))
    if seqused_k is not None:
        lib.check_shape(op, "seqused_k", seqused_k, (sequences,))
    lib.check_same_device(op, ("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k), ("seqused_k", seqused_k))
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
    if total_k is None and cu_seqlens_k is None:
        total_k = total_q
    lengths = (lib.as_int32(tensor) for tensor in (cu_seqlens, cu_seqlens_k, seqused_k))
    work = _call_plan(*lengths, total_q, total_k, num_heads, num_kv_heads, head_dim)
    return AttentionPlan(work, num_heads, num_kv_heads, head_dim, total_q, sequences)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each packed sequence to itself, or to its slot of a key-value cache, bidirectionally.

    Under autocast q, k and v are cast to its dtype. A second derivative raises.

    Args:
        q: [T, H, D], float32, bfloat16 or float16. Any row and head stride, last dimension contiguous: slices of a
            fused projection are used in place.
        k: [Tk, G, D], H a multiple of G, of q's dtype and device; strides as for q.
        v: Like `k`.
        cu_seqlens: int32 [S + 1] on the device. Sequence s has the queries cu_seqlens[s] .. cu_seqlens[s + 1] - 1. Rows
            from cu_seqlens[S] on belong to no sequence.
        cu_seqlens_k: int32 [S + 1], the key slots; default: the keys of s are its own tokens.
        seqused_k: int32 [S], how many keys of each slot are in use; default: all.
        plan: From `attention_plan` with the same lengths; default: made in this call.
        softmax_scale: Factor of the scores, finite and > 0; default 1 / sqrt(D).
        deterministic: Make gradients bitwise repeatable. On CUDA this costs some speed where sequences are long. On a
            CPU, before compute capability 9.0 and in packs of short sequences they always are.
        return_lse: Also return lse float32 [H, T], the natural log of the softmax's sum; differentiable.

    Returns:
        out [T, H, D] in q's dtype, contiguous; with `return_lse` (out, lse). Queries without keys have out 0, lse -inf
        and gradient 0; this includes queries of no sequence. Keys of no sequence also have gradient 0.

    Raises:
        TypeError, ValueError: A wrong argument; the message names it, with what was given and what is allowed.
        NotImplementedError: No kernel was built for this device, dtype, head dim, group or layout (on CUDA: strides of
            multiples of 8 elements, 16-byte aligned data).
    """
    op = "varlen_attention"
    if (
        (plan is not None and cu_seqlens_k is None and not return_lse)
        and lib.plain_call(q)
        and lib.cpu_calls().attention_fits(q, k, v, cu_seqlens, plan)
    ):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        if 0 < scale < math.inf:
            return _attend_directly(q, k, v, plan.work, plan.num_sequences, scale, deterministic)
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    lib.check_dtype(op, "q", q, _DTYPES)
    lib.check_dtype(op, "k", k, (q.dtype,))
    lib.check_dtype(op, "v", v, (q.dtype,))
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or v.shape != k.shape:
        lib.check_shape(op, "q", q, ("T", "H", "D"))
        lib.check_shape(op, "k", k, ("Tk", "G", q.shape[2]))
        lib.check_shape(op, "v", v, tuple(k.shape))
    (total_q, heads, dim), (total_k, kv_heads, _) = q.shape, k.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_contiguous():
            lib.check_last_contiguous(op, name, tensor)
    lib.check_same_device(op, ("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_seqlens))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: q has {heads} heads, which must be a multiple of k's {kv_heads}")
    if cu_seqlens_k is None and total_k != total_q:
        raise ValueError(f"{op}: k has {total_k} tokens and q has {total_q}; without cu_seqlens_k they must agree")
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"{op}: softmax_scale must be finite and > 0, got {scale}")
    if plan is None:
        plan = attention_plan(
            cu_seqlens, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=dim, total_q=total_q, total_k=total_k,
        )  # fmt: skip
    else:
        lib.check_same_device(op, ("q", q), ("plan", plan.work))
        sizes = (heads, kv_heads, dim, total_q, cu_seqlens.shape[0] - 1)
        # not plan[1:], which torch 2.6 cannot compile
        if (plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.total_q, plan.num_sequences) != sizes:
            for name, size in zip(AttentionPlan._fields[1:], sizes, strict=True):
                if getattr(plan, name) != size:
                    raise ValueError(f"{op}: plan was made for {name} {getattr(plan, name)}, this call has {size}")
    if cu_seqlens_k is not None and lib.may_read(cu_seqlens_k) and int(cu_seqlens_k[-1]) > total_k:
        raise ValueError(f"{op}: cu_seqlens_k ends at {int(cu_seqlens_k[-1])}, but k has {total_k} tokens")
    out, lse = _call_fwd(q, k, v, plan.work, plan.num_sequences, scale, deterministic)
    return (out, lse) if return_lse else out
