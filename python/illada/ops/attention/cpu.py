"""Attention on a CPU: csrc/cpu, or torch's flash attention for the sequences where that is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from illada._native import native
from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.capabilities import LOGITS_DTYPES


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


_ALL_KEYS = 2**31
_BFLOAT16_KEYS = 64  # with more keys, torch is faster if the processor multiplies in bfloat16


def _most_keys(q: Tensor) -> int:
    """Return the most keys of a sequence that csrc/cpu computes; torch gets those with more."""
    return _BFLOAT16_KEYS if q.dtype == torch.bfloat16 and native().multiplies_bfloat16() else _ALL_KEYS


def _shares(plan: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split the rows of a plan into those for csrc/cpu and those for torch; None if torch gets no row."""
    if q.dtype not in LOGITS_DTYPES["cpu"] or q.shape[2] > native().MAX_HEAD_DIM_CPU:
        return plan[:0], plan
    if (most := _most_keys(q)) < _ALL_KEYS:
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


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_sequences: int, softmax_scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of varlen_attention_fwd."""
    results = lib.cpu_calls().varlen_attention(*(q, k, v, plan, num_sequences, softmax_scale, _most_keys(q)))
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


def backward(
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
    """Compute (dq, dk, dv) of varlen_attention_bwd."""
    # torch would compute the products of a call with dlse in float32, where it gains nothing. Its bits would depend on
    # the number of threads.
    by_torch = dlse is None or q.dtype != torch.bfloat16 or q.shape[2] > native().MAX_HEAD_DIM_CPU
    most_keys = _most_keys(q) if by_torch else _ALL_KEYS
    grads = lib.cpu_calls().varlen_attention_backward(
        *(dout, dlse, q, k, v, out, lse, plan, num_sequences, softmax_scale, most_keys)
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
