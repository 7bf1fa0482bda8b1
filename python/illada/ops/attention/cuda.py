"""Attention on CUDA: outputs and workspaces of the kernels of csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops import raw


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_sequences: int, softmax_scale: float, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) of varlen_attention_fwd."""
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) of varlen_attention_bwd."""
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
