"""Masked cross-entropy with a weight for each token, from logits that are already there.

    loss = sum_i w_i (logsumexp_v(x_i) - x_i[y_i]) / normalizer

Eq. 1 of the iLLaDA paper is this with w_i = 1 / p where token i is masked and 0 elsewhere, and the number of tokens
as normalizer. `illada.ops.linear_loss` has the same with the head's GEMM.

| device | dtypes            | kernel                     |
|--------|-------------------|----------------------------|
| CPU    | float32, bfloat16 | native row loop (csrc/cpu) |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from illada._native import native, refuse_cuda
from illada.ops import _library as lib

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # illada::DType
_TOKEN_DTYPES = (torch.int64, torch.int32)

lib.LIBRARY.define(
    "masked_ce_fwd(Tensor logits, Tensor targets, Tensor token_weights, Tensor? normalizer, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)
lib.LIBRARY.define(
    "masked_ce_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor token_weights, Tensor? normalizer, "
    "float scale, Tensor lse) -> Tensor",
    tags=lib.TAGS,
)


# ---------------------------------------------------------------------------------------------------- kernels (CPU)


def full_scale(normalizer: Tensor | None, scale: float) -> float:
    """scale / normalizer as a host number, which on a CPU costs nothing."""
    if normalizer is None:
        return scale
    value = float(normalizer)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"masked_cross_entropy: normalizer must be finite and positive, got {value}")
    return scale / value


def row_loop(
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    token_weights: Tensor,
    nll: Tensor,
    lse: Tensor | None,
    grad: Tensor | None,
    scale: float,
    backward_only: bool = False,
) -> None:
    """The native loop: nll and lse of each row of logits, and its gradient, which may be the logits themselves."""
    function = native().masked_cross_entropy_backward if backward_only else native().masked_cross_entropy
    function(
        *(lib.address(logits), logits.stride(0), lib.address(rows), lib.address(targets)),
        *(lib.address(token_weights), lib.address(nll), lib.address(lse)),
        *(lib.address(grad), 0 if grad is None else grad.stride(0)),
        *(logits.shape[0], token_weights.shape[0], logits.shape[1]),
        *(scale, DTYPES[logits.dtype], torch.get_num_threads()),
    )


def _fwd_cpu(
    logits: Tensor, targets: Tensor, token_weights: Tensor, normalizer: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    nll, lse = (token_weights.new_empty(len(logits)) for _ in range(2))
    token_weights = token_weights.contiguous()
    row_loop(logits, None, targets.long().contiguous(), token_weights, nll, lse, None, 1.0)
    loss = nll.double().dot(token_weights.double()) * full_scale(normalizer, scale)
    return loss.float(), nll, lse


def _bwd_cpu(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    normalizer: Tensor | None,
    scale: float,
    lse: Tensor,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    scale = full_scale(normalizer, scale) * float(dloss)
    targets, token_weights = targets.long().contiguous(), token_weights.contiguous()
    row_loop(logits, None, targets, token_weights, lse, lse, grad, scale, backward_only=True)
    return grad


# --------------------------------------------------------------------------------------- fakes, autograd, FLOP counts


def _fwd_fake(logits, targets, token_weights, normalizer, scale):
    return token_weights.new_empty(()), *(token_weights.new_empty(logits.shape[0]) for _ in range(2))


def _bwd_fake(dloss, logits, targets, token_weights, normalizer, scale, lse):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, token_weights, normalizer, ctx.scale = inputs
    loss, nll, lse = output
    ctx.mark_non_differentiable(nll, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, token_weights, normalizer, lse)


def _backward(ctx, dloss, *unused):
    if dloss is None:
        return (None,) * 5
    logits, targets, token_weights, normalizer, lse = ctx.saved_tensors
    grad = torch.ops.illada.masked_ce_bwd(dloss, logits, targets, token_weights, normalizer, ctx.scale, lse)
    return grad, None, None, None, None


lib.implement("masked_ce_fwd", _fwd_fake, cpu=_fwd_cpu)
lib.implement("masked_ce_bwd", _bwd_fake, cpu=_bwd_cpu)
torch.library.register_autograd("illada::masked_ce_fwd", _backward, setup_context=_setup_context, lib=lib.LIBRARY)
lib.raise_on_double_backward("masked_ce_bwd")


# --------------------------------------------------------------------------------------------------- public functions


def check_targets(op: str, total: int, targets: Tensor, token_weights: Tensor, rows: Tensor | None) -> None:
    lib.check_shape(op, "targets", targets, (total,))
    lib.check_dtype(op, "targets", targets, _TOKEN_DTYPES)
    lib.check_shape(op, "token_weights", token_weights, (total,))
    lib.check_dtype(op, "token_weights", token_weights, (torch.float32,))
    if rows is not None:
        lib.check_shape(op, "rows", rows, ("N",))
        lib.check_dtype(op, "rows", rows, (torch.int32,))


def split_normalizer(op: str, normalizer: float | Tensor | None) -> tuple[Tensor | None, float]:
    """(device scalar or None, host factor) such that the loss is divided by one or the other."""
    if isinstance(normalizer, Tensor):
        lib.check_shape(op, "normalizer", normalizer, ())
        return normalizer, 1.0
    if normalizer is None:
        return None, 1.0
    if not (math.isfinite(normalizer) and normalizer > 0):
        raise ValueError(f"{op}: normalizer must be finite and positive, got {normalizer}")
    return None, 1.0 / normalizer


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    rows: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_nll: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """sum_i w_i * CE(logits_i, y_i) / normalizer from logits that are already there.

    Args:
        logits: [T, V], float32 or bfloat16, any row stride. Rows without a weight are never read.
        targets, token_weights, normalizer, return_nll: as in `linear_masked_cross_entropy`.
        rows: int32 [N]; default: all rows with a weight. Other rows count as if their weight were 0.

    Returns:
        loss, a float32 scalar; with `return_nll` (loss, nll). The gradient is dense [T, V] in the logits' dtype.

    Raises:
        As `linear_masked_cross_entropy`.
    """
    op = "masked_cross_entropy"
    lib.check_shape(op, "logits", logits, ("T", "V"))
    lib.check_dtype(op, "logits", logits, DTYPES)
    lib.check_last_contiguous(op, "logits", logits)
    check_targets(op, logits.shape[0], targets, token_weights, rows)
    lib.check_same_device(
        op, ("logits", logits), ("targets", targets), ("token_weights", token_weights), ("rows", rows)
    )
    if logits.is_cuda:
        refuse_cuda(op)
    normalizer, scale = split_normalizer(op, normalizer)
    if rows is not None:
        index = rows.long()
        token_weights = torch.zeros_like(token_weights).index_copy(0, index, token_weights[index])
    loss, nll, _ = torch.ops.illada.masked_ce_fwd(logits, targets, token_weights, normalizer, scale)
    return (loss, nll) if return_nll else loss
