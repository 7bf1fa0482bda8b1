"""Masked cross-entropy of the logits hidden @ weight^T, which never exist all at once.

    loss = sum_i w_i (logsumexp_v(x_i) - x_i[y_i]) / normalizer        x_i = hidden_i @ weight^T

Only rows with w_i != 0 meet the head, a chunk of them at a time, and the gradients are made while the chunk's logits
are there: three GEMMs instead of four, and never an [N, V] tensor.

| device | dtypes            | kernel                                                              |
|--------|-------------------|---------------------------------------------------------------------|
| CPU    | float32, bfloat16 | torch.mm on chunks of rows, native row loop (csrc/cpu) in between   |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from illada._native import refuse_cuda
from illada.ops import _library as lib
from illada.ops.loss import DTYPES, check_targets, full_scale, row_loop, split_normalizer

#: Logits of one chunk on a CPU. Small enough to be forgotten beside the model's activations, large enough for the
#: GEMMs to run at full speed.
_CHUNK_BYTES_CPU = 32 << 20

lib.LIBRARY.define(
    "linear_masked_ce_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor token_weights, Tensor? rows, "
    "Tensor? normalizer, float scale, int chunk_rows, bool hidden_grad, bool weight_grad, ScalarType compute_dtype, "
    "ScalarType grad_weight_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)
lib.LIBRARY.define(
    "linear_masked_ce_bwd(Tensor dloss, Tensor hidden_grad, Tensor weight_grad) -> (Tensor, Tensor)", tags=lib.TAGS
)

# ---------------------------------------------------------------------------------------------------- kernels (CPU)


def _fwd_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    rows: Tensor | None,
    normalizer: Tensor | None,
    scale: float,
    chunk_rows: int,
    hidden_grad: bool,
    weight_grad: bool,
    compute_dtype: torch.dtype,
    grad_weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale = full_scale(normalizer, scale)
    targets, token_weights = targets.long().contiguous(), token_weights.contiguous()
    if rows is None:
        rows = token_weights.nonzero().squeeze(-1).int()
    elif len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < len(hidden)):
        raise ValueError(f"linear_masked_cross_entropy: rows must be in [0, {len(hidden)}), got {rows.tolist()}")
    rows = rows.contiguous()
    head = weight.to(compute_dtype)
    vocab_size = weight.shape[0]
    if chunk_rows <= 0:
        chunk_rows = max(128, _CHUNK_BYTES_CPU // (vocab_size * head.element_size()))

    nll = token_weights.new_zeros(len(hidden))
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else hidden.new_empty(0)
    d_weight = weight.new_zeros(weight.shape if weight_grad else (0,), dtype=grad_weight_dtype)
    buffer = head.new_empty(min(chunk_rows, len(rows)), vocab_size)
    for chunk in rows.split(chunk_rows):
        index = chunk.long()
        selected = hidden[index].to(compute_dtype)
        logits = torch.mm(selected, head.t(), out=buffer[: len(chunk)])
        chunk_nll = nll.new_empty(len(chunk))
        wants_grad = hidden_grad or weight_grad
        row_loop(logits, chunk, targets, token_weights, chunk_nll, None, logits if wants_grad else None, scale)
        nll[index] = chunk_nll
        if hidden_grad:
            d_hidden[index] = torch.mm(logits, head).to(hidden.dtype)
        if weight_grad and compute_dtype == grad_weight_dtype:
            d_weight.addmm_(logits.t(), selected)
        elif weight_grad:
            d_weight.add_(torch.mm(logits.t(), selected))
    loss = (nll.double().dot(token_weights.double()) * scale).float()
    return loss, nll, d_hidden, d_weight


def _bwd(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_grad * dloss.to(hidden_grad.dtype), weight_grad * dloss.to(weight_grad.dtype)


# --------------------------------------------------------------------------------------- fakes, autograd, FLOP counts


def _fwd_fake(
    hidden, weight, targets, token_weights, rows, normalizer, scale, chunk_rows, hidden_grad, weight_grad,
    compute_dtype, grad_weight_dtype,
):  # fmt: skip
    return (
        token_weights.new_empty(()),
        token_weights.new_empty(hidden.shape[0]),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,), dtype=grad_weight_dtype),
    )


def _bwd_fake(dloss, hidden_grad, weight_grad):
    return hidden_grad.new_empty(hidden_grad.shape), weight_grad.new_empty(weight_grad.shape)


def _setup_context(ctx, inputs, output):
    loss, nll, hidden_grad, weight_grad = output
    ctx.mark_non_differentiable(nll, hidden_grad, weight_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_grad, weight_grad)
    ctx.needs = inputs[8], inputs[9]


def _backward(ctx, dloss, *unused):
    if dloss is None:
        return (None,) * 12
    d_hidden, d_weight = torch.ops.illada.linear_masked_ce_bwd(dloss, *ctx.saved_tensors)
    wants_hidden, wants_weight = ctx.needs
    return (d_hidden if wants_hidden else None, d_weight if wants_weight else None) + (None,) * 10


lib.implement("linear_masked_ce_fwd", _fwd_fake, cpu=_fwd_cpu)
lib.implement("linear_masked_ce_bwd", _bwd_fake, cpu=_bwd)
torch.library.register_autograd(
    "illada::linear_masked_ce_fwd", _backward, setup_context=_setup_context, lib=lib.LIBRARY
)
lib.raise_on_double_backward("linear_masked_ce_bwd")


@register_flop_formula(torch.ops.illada.linear_masked_ce_fwd, get_raw=True)
def _fwd_flops(hidden, weight, targets, token_weights, rows, *args, out_val=None, **kwargs) -> int:
    """2 N V C for the logits and as much for each gradient; N from `rows`, the weights, or (unreadable) all T."""
    count = hidden.shape[0]
    if rows is not None:
        count = rows.shape[0]
    elif lib.may_read(token_weights):
        count = int(token_weights.count_nonzero())
    gemms = 1 + int(args[3]) + int(args[4])  # hidden_grad, weight_grad
    return 2 * gemms * count * weight.shape[0] * weight.shape[1]


# --------------------------------------------------------------------------------------------------- public functions


def linear_masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    rows: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    return_nll: bool = False,
    grad_weight_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """sum_i w_i * CE(hidden_i @ weight^T, y_i) / normalizer, without ever holding all logits.

    Args:
        hidden: [T, C], float32 or bfloat16. weight: [V, C], the head (or the tied embedding).
        targets: int64 or int32 [T]; must be in [0, V) where the weight is not zero.
        token_weights: float32 [T], 1 / p where masked, 0 elsewhere. Not differentiable.
        rows: int32 [N], the rows to look at, sorted (default: those with a weight); saves the search for them.
        normalizer: positive number or 0-dim tensor that divides the sum, such as the number of tokens of the global
            batch (so that gradient accumulation and data parallelism add up). Default 1.
        chunk_rows: rows whose logits exist at a time; default: as many as fit a fixed small buffer.
        return_nll: also return the negative log-likelihood of each target, float32 [T], nats, 0 where not selected,
            not differentiable.
        grad_weight_dtype: dtype in which the weight's gradient is summed over chunks; default float32.

    Returns:
        loss, a float32 scalar; with `return_nll` (loss, nll). No selected rows: loss 0 and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what was got and what is allowed; a target out of range where its
            weight is not zero. NotImplementedError: no kernel was built for this device.

    Under autocast the GEMMs run in its dtype; the gradients come back in the dtypes of hidden and weight. Gradients
    are computed in the forward pass when they will be needed. A second derivative raises.
    """
    op = "linear_masked_cross_entropy"
    lib.check_shape(op, "hidden", hidden, ("T", "C"))
    lib.check_shape(op, "weight", weight, ("V", hidden.shape[1]))
    lib.check_last_contiguous(op, "hidden", hidden)
    lib.check_last_contiguous(op, "weight", weight)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
        if compute_dtype not in DTYPES:
            raise TypeError(f"{op}: autocast to {compute_dtype} is not supported; use bfloat16")
        lib.check_dtype(op, "weight", weight, DTYPES)
        lib.check_dtype(op, "hidden", hidden, DTYPES)
    else:
        compute_dtype = hidden.dtype
        lib.check_dtype(op, "hidden", hidden, DTYPES)
        lib.check_dtype(op, "weight", weight, (hidden.dtype,))
    check_targets(op, hidden.shape[0], targets, token_weights, rows)
    others = {"weight": weight, "targets": targets, "token_weights": token_weights, "rows": rows}
    lib.check_same_device(op, ("hidden", hidden), *others.items())
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")
    if grad_weight_dtype not in (None, torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: grad_weight_dtype must be float32 or bfloat16, got {grad_weight_dtype}")
    if hidden.is_cuda:
        refuse_cuda(op)
    normalizer, scale = split_normalizer(op, normalizer)
    grad_enabled = torch.is_grad_enabled()
    loss, nll, _, _ = torch.ops.illada.linear_masked_ce_fwd(
        hidden,
        weight,
        targets,
        token_weights,
        rows,
        normalizer,
        scale,
        chunk_rows or 0,
        grad_enabled and hidden.requires_grad,
        grad_enabled and weight.requires_grad,
        compute_dtype,
        grad_weight_dtype or torch.float32,
    )
    return (loss, nll) if return_nll else loss
