"""The op `linear_masked_ce`: its schemas, fakes, autograd and FLOP counts, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.devices import autocast_dtype
from illada.ops import _library as lib
from illada.ops.capabilities import logits_dtypes
from illada.ops.linear_loss import kernels
from illada.ops.linear_loss.chunks import CHUNK_BYTES_CPU
from illada.ops.linear_loss.scaling import deferred_factor, defers_scaling
from illada.ops.loss import check_targets, plain_scale, split_normalizer

_FORWARD_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor token_weights, Tensor? rows, Tensor? normalizer, "
    "float scale, int chunk_rows, bool hidden_grad, bool weight_grad, ScalarType compute_dtype, "
    "ScalarType grad_weight_dtype, float filter_eps"
)
#: Gradients of the arguments behind hidden and weight.
_NO_GRADIENTS = (None,) * (len(_FORWARD_ARGUMENTS.split(", ")) - 2)
lib.LIBRARY.define(f"linear_masked_ce_fwd({_FORWARD_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=lib.TAGS)
lib.LIBRARY.define(  # the weight's gradient is added to `grad_weight`
    f"linear_masked_ce_fwd_({_FORWARD_ARGUMENTS}, Tensor(a!) grad_weight) -> (Tensor, Tensor, Tensor)", tags=lib.TAGS
)
lib.LIBRARY.define(
    "linear_masked_ce_bwd(Tensor dloss, Tensor hidden_grad, Tensor weight_grad) -> (Tensor, Tensor)", tags=lib.TAGS
)
lib.LIBRARY.define(
    "linear_masked_ce_bwd_(Tensor dloss, Tensor(a!) hidden_grad, Tensor(b!) weight_grad) -> ()", tags=lib.TAGS
)


def _fwd_fake(
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
    filter_eps: float,
) -> tuple[Tensor, ...]:
    return (
        token_weights.new_empty(()),
        token_weights.new_empty(hidden.shape[0]),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,), dtype=grad_weight_dtype),
    )


def _fwd_into_fake(*arguments: lib.Argument) -> tuple[Tensor, ...]:
    return _fwd_fake(*arguments[:-1])[:3]


def _bwd_fake(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_grad.new_empty(hidden_grad.shape), weight_grad.new_empty(weight_grad.shape)


def _bwd_inplace_fake(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> None:
    return None


class _Context(lib.Context):
    scale: float
    defer_scaling: bool
    needs: tuple[bool, bool]  # whether hidden and weight get a gradient
    scaled: bool  # the backward has run and scaled the gradients in place


def _setup_context(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, ...]) -> None:
    loss, nll, hidden_grad, weight_grad = output
    # The gradients stay differentiable outputs, so autograd knows that they depend on hidden and weight. A second
    # derivative then reaches the formula of the backward op, which raises.
    ctx.mark_non_differentiable(nll)
    ctx.set_materialize_grads(False)
    *_, normalizer, ctx.scale, _chunk_rows, wants_hidden, wants_weight, compute_dtype, _grad_dtype, _eps = inputs
    ctx.defer_scaling, ctx.needs = defers_scaling(compute_dtype), (wants_hidden, wants_weight)
    ctx.save_for_backward(hidden_grad, weight_grad, normalizer if ctx.defer_scaling else None)
    ctx.scaled = False


def _backward(ctx: _Context, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, *_NO_GRADIENTS
    if ctx.scaled:
        raise RuntimeError(
            "linear_masked_cross_entropy: on CUDA the backward runs once; the gradients that the forward pass made "
            "have been given away"
        )
    d_hidden, d_weight, normalizer = ctx.saved_tensors
    if ctx.defer_scaling:
        dloss = deferred_factor(dloss, normalizer, ctx.scale)
    if dloss.is_cuda and type(dloss) is Tensor and not (torch.is_grad_enabled() or lib.in_forward_mode()):
        # The weight's gradient is as large as the weight: avoid a copy, and any pass over it where dloss is 1.
        ctx.scaled = True
        torch.ops.illada.linear_masked_ce_bwd_(dloss, d_hidden, d_weight)
    else:
        d_hidden, d_weight = _call_bwd(dloss, d_hidden, d_weight)
    wants_hidden, wants_weight = ctx.needs
    return d_hidden if wants_hidden else None, d_weight if wants_weight else None, *_NO_GRADIENTS


def _keep(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    loss, _, hidden_grad, weight_grad = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_grad, weight_grad)
    *_, wants_hidden, wants_weight, _compute_dtype, _grad_dtype, _eps = inputs
    ctx.needs = wants_hidden, wants_weight
    return loss, hidden_grad  # of the second, see _setup_context; one of the gradients is enough


def _backward_directly(ctx: _Context, dloss: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dloss is None:
        return None, None
    d_hidden, d_weight = _call_bwd(dloss, *ctx.saved_tensors)
    wants_hidden, wants_weight = ctx.needs
    return d_hidden if wants_hidden else None, d_weight if wants_weight else None


lib.implement("linear_masked_ce_fwd", _fwd_fake, cpu=kernels.forward_cpu, cuda=kernels.forward_cuda)
lib.implement("linear_masked_ce_fwd_", _fwd_into_fake, cpu=kernels.forward_into_cpu, cuda=kernels.forward_into_cuda)
lib.implement("linear_masked_ce_bwd", _bwd_fake, cpu=kernels.backward_cpu, cuda=kernels.backward_cuda)
lib.implement("linear_masked_ce_bwd_", _bwd_inplace_fake, cpu=kernels.backward_in_place, cuda=kernels.backward_in_place)
lib.register_autograd("linear_masked_ce_fwd", _backward, _setup_context)
lib.raise_on_double_backward("linear_masked_ce_bwd")
_call_fwd, _call_bwd = lib.caller("linear_masked_ce_fwd"), lib.caller("linear_masked_ce_bwd")
_fwd_directly = lib.direct("linear_masked_ce_fwd", 2, _keep, _backward_directly)


class _IntoGradient(torch.autograd.Function):
    """Autograd of linear_masked_ce_fwd_; torch.library offers none for ops that write to an argument."""

    @staticmethod
    def forward(ctx: _Context, *inputs: lib.Argument) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll, hidden_grad = torch.ops.illada.linear_masked_ce_fwd_(*inputs)
        ctx.mark_non_differentiable(nll)  # hidden_grad stays differentiable, see _setup_context
        ctx.set_materialize_grads(False)
        *_, normalizer, ctx.scale, _chunk_rows, _hidden, _weight, compute_dtype, _grad_dtype, _eps, _grad = inputs
        ctx.defer_scaling = defers_scaling(compute_dtype)
        ctx.save_for_backward(hidden_grad, normalizer if ctx.defer_scaling else None)
        return loss, nll, hidden_grad

    @staticmethod
    def backward(ctx: _Context, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_grad, normalizer = ctx.saved_tensors
        if dloss is None or not ctx.needs_input_grad[0]:
            return None, None, *_NO_GRADIENTS, None
        lib.refuse_tangents("linear_masked_ce_fwd_", dloss)
        if lib.may_read(dloss) and float(dloss) != 1:
            raise RuntimeError(
                "linear_masked_cross_entropy: with grad_weight the loss must arrive in the total unscaled, because the "
                f"weight's gradient has been added already; got a gradient of {float(dloss)}; use normalizer"
            )
        dloss = torch.where(dloss == 1, dloss, torch.nan)  # where the host may not read: fail visibly
        if ctx.defer_scaling:
            dloss = deferred_factor(dloss, normalizer, ctx.scale)
        return scaled(dloss, hidden_grad), None, *_NO_GRADIENTS, None


@lib.counts_flops("linear_masked_ce_fwd_")
@lib.counts_flops("linear_masked_ce_fwd")
def _fwd_flops(
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
    *args: lib.Argument,
    out_val: object = None,
    **kwargs: object,
) -> int:
    """Count 2 N V C for the logits and as much for each gradient; N from `rows`, readable token weights, or T."""
    count = hidden.shape[0]
    if rows is not None:
        count = rows.shape[0]
    elif lib.may_read(token_weights):
        count = int(token_weights.count_nonzero())
    gemms = 1 + int(hidden_grad) + int(weight_grad)
    return 2 * gemms * count * weight.shape[0] * weight.shape[1]


def scaled(dloss: Tensor, hidden_grad: Tensor) -> Tensor:
    """Return hidden_grad * dloss in the gradient's dtype; dloss keeps its own dtype."""
    return torch.ops.illada.linear_masked_ce_bwd(dloss, hidden_grad, hidden_grad.new_empty(0))[0]


def compute_dtype_of(op: str, hidden: Tensor, name: str, weight: Tensor) -> torch.dtype:
    """Return the dtype of the GEMMs of hidden and the weight called `name`: autocast's or their own.

    TypeError: a dtype that is not supported, or two dtypes. ValueError: strides that are not supported.
    """
    if not (hidden.is_contiguous() and weight.is_contiguous()):
        lib.check_last_contiguous(op, "hidden", hidden)
        lib.check_last_contiguous(op, name, weight)
    dtypes = logits_dtypes(hidden)
    lib.check_dtype(op, "hidden", hidden, dtypes)
    compute_dtype = autocast_dtype(hidden.device)
    if compute_dtype is None:
        lib.check_dtype(op, name, weight, (hidden.dtype,))
        return hidden.dtype
    lib.check_dtype(op, name, weight, dtypes)
    if compute_dtype not in dtypes:
        raise TypeError(f"{op}: autocast to {compute_dtype} is not supported; use bfloat16")
    return compute_dtype


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
    grad_weight: Tensor | None = None,
    filter_eps: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute sum_i w_i * CE(hidden_i @ weight^T, y_i) / normalizer without holding all logits in memory.

    Gradients are computed in the forward pass when they will be needed. On CUDA the backward therefore runs once,
    with or without retain_graph=True. A second derivative raises.

    Under autocast the GEMMs run in its dtype; the gradients have the dtypes of hidden and weight.

    On CUDA the host never waits for the device, and values are checked only under ILLADA_DEBUG=1. Without the check, a
    target out of range makes its nll, and so the loss, NaN; its gradient is meaningless, but finite. Rows out of range
    are ignored, or trigger torch's device-side assertion.

    Args:
        hidden: [T, C], float32, bfloat16 or (on CUDA) float16.
        weight: [V, C], the head weight (or the tied embedding).
        targets: int64 or int32 [T]; in [0, V) where the token weight is not zero.
        token_weights: float32 [T], 1 / p where masked, 0 elsewhere. They must not require grad.
        rows: int32 or int64 [N], the selected rows, sorted and distinct; default: those with nonzero token weight. On
            CUDA the host cannot find these without waiting for the device. Without `rows` the head weight therefore
            multiplies all T rows there, except for bfloat16 on sm_90a. Pass `rows` in all other cases on CUDA.
        normalizer: Positive number or 0-dim tensor (read on its device) that divides the sum; default 1. An example is
            the number of tokens of the global batch, so that gradient accumulation and data parallelism add up.
        chunk_rows: Rows whose logits exist at a time; default: as many as fit 32 MiB on a CPU, 1.4 GB on CUDA.
        return_nll: Also return the negative log-likelihood of each target, float32 [T], nats. It is 0 in rows that are
            not selected, and not differentiable.
        grad_weight_dtype: Dtype in which the head weight's gradient is summed over chunks; default float32.
        grad_weight: float32 or bfloat16 [V, C], contiguous, for example weight.grad. The forward pass adds the head
            weight's gradient to it, and autograd does not see that gradient. This saves writing, reading and adding
            another [V, C]. Conditions:
            - It gets the gradient of this loss, unscaled: use `normalizer` to scale.
            - Call backward() on the loss or on a sum that contains it, not on a multiple. A multiple is an error on a
              CPU; on CUDA hidden's gradient becomes NaN.
            - Nothing is added under torch.no_grad().
            - Activation checkpointing that recomputes this call adds the gradient twice.
        filter_eps: Default 0: exact. On sm_90a the gradients may leave out blocks of 256 rows x 256 ids where each
            probability is below filter_eps and none is a target's; other kernels stay exact. The error of hidden_i's
            gradient is then at most g_i filter_eps sum_v |weight_v|, that of weight_v's gradient at most
            filter_eps sum_i g_i |hidden_i|, with g_i = w_i / normalizer and sums over what was left out.

    Returns:
        loss, a float32 scalar; with `return_nll` (loss, nll). Without selected rows the loss and gradients are 0.

    Raises:
        TypeError, ValueError: A wrong argument; the message names it, with what was given and what is allowed. Also a
            target out of range where its token weight is not zero.
        NotImplementedError: No kernel was built for this device.
    """
    op = "linear_masked_cross_entropy"
    if (
        (rows is chunk_rows is grad_weight_dtype is grad_weight is None)
        and not (return_nll or filter_eps)
        and lib.plain_call(hidden)
    ):
        scale = plain_scale(normalizer)
        if scale is not None and lib.cpu_calls().linear_cross_entropy_fits(hidden, weight, targets, token_weights):
            tensors, dtype = (hidden, weight, targets, token_weights, None, None), hidden.dtype
            grads = (hidden.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
            if grads == (False, False):  # without the empty gradients of the op
                results = lib.cpu_calls().linear_masked_cross_entropy(
                    *(*tensors, scale, 0, False, False, dtype, torch.float32, CHUNK_BYTES_CPU)
                )
                if results is not None:
                    return results[0]
            return _fwd_directly(*tensors, scale, 0, *grads, dtype, torch.float32, 0.0)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        lib.check_shape(op, "hidden", hidden, ("T", "C"))
        lib.check_shape(op, "weight", weight, ("V", hidden.shape[1]))
    if hasattr(weight, "full_tensor"):
        raise TypeError(
            f"{op}: weight is a DTensor, of which this process holds a shard; compute the loss inside the forward of "
            "the module that FSDP2 shards it with (illada.LossModule), or pass weight.full_tensor()"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have at least one row, got {list(weight.shape)}")
    compute_dtype = compute_dtype_of(op, hidden, "weight", weight)
    lib.check_same_device(
        op, ("hidden", hidden), ("weight", weight), ("targets", targets), ("token_weights", token_weights),
        ("rows", rows),
    )  # fmt: skip
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")
    if grad_weight_dtype not in (None, torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: grad_weight_dtype must be float32 or bfloat16, got {grad_weight_dtype}")
    if not 0 <= filter_eps < 1:
        raise ValueError(f"{op}: filter_eps must be in [0, 1), got {filter_eps}")
    normalizer, scale = split_normalizer(op, normalizer, "hidden", hidden)
    check_targets(op, hidden.shape[0], weight.shape[0], targets, token_weights, rows, normalizer)
    if grad_weight is not None:
        lib.refuse_tangents(op, hidden, weight)
        _check_grad_weight(op, grad_weight, hidden, weight, grad_weight_dtype)
    needs_grad = torch.is_grad_enabled()
    arguments = (
        *(hidden, weight, targets, token_weights, lib.as_int32(rows), normalizer, scale, chunk_rows or 0),
        needs_grad and hidden.requires_grad,
        needs_grad and (weight.requires_grad or grad_weight is not None),
        compute_dtype,
    )
    if grad_weight is not None and needs_grad:
        loss, nll, _ = _IntoGradient.apply(*arguments, grad_weight.dtype, filter_eps, grad_weight)
    else:
        loss, nll, _, _ = _call_fwd(*arguments, grad_weight_dtype or torch.float32, filter_eps)
    return (loss, nll) if return_nll else loss


def _check_grad_weight(
    op: str, grad_weight: Tensor, hidden: Tensor, weight: Tensor, grad_weight_dtype: torch.dtype | None
) -> None:
    lib.check_shape(op, "grad_weight", grad_weight, tuple(weight.shape))
    lib.check_dtype(op, "grad_weight", grad_weight, (torch.float32, torch.bfloat16))
    lib.check_same_device(op, ("weight", weight), ("grad_weight", grad_weight))
    if not grad_weight.is_contiguous():
        raise ValueError(f"{op}: grad_weight must be contiguous, got strides {grad_weight.stride()}")
    if grad_weight.requires_grad:
        raise ValueError(f"{op}: grad_weight must not require grad; pass a buffer such as weight.grad")
    if grad_weight_dtype is not None:
        raise ValueError(f"{op}: grad_weight brings its own dtype; leave grad_weight_dtype away")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if lib.overlap(grad_weight, tensor):
            raise ValueError(f"{op}: grad_weight shares memory with {name}")
