"""Masked cross-entropy with a weight for each token, from given logits.

    loss = sum_i w_i (lse_i - x_i[y_i]) / normalizer,   lse_i = logsumexp_v(x_i)

Eq. 1 of the iLLaDA paper is this loss with w_i = 1 / p where token i is masked and 0 elsewhere, and the number of
tokens as normalizer. `illada.ops.linear_loss` includes the GEMM with the head weight. `illada.ops.vocab_parallel`
computes the loss over shards of the vocabulary.

| device          | logits                     | kernel                                                               |
|-----------------|----------------------------|----------------------------------------------------------------------|
| CPU             | float32, bfloat16          | native row loop (csrc/cpu)                                           |
| sm_80 and newer | float32, bfloat16, float16 | csrc/loss: one read forward, one read and one write backward         |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.capabilities import LOGITS_DTYPES, logits_dtypes

_TOKEN_DTYPES = (torch.int64, torch.int32)

lib.LIBRARY.define(
    "masked_ce_fwd(Tensor logits, Tensor targets, Tensor token_weights, Tensor? normalizer, float scale, "
    "bool inplace_backward) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)
_BACKWARD_ARGUMENTS = (
    "Tensor targets, Tensor token_weights, Tensor? normalizer, float scale, Tensor lse_parts, Tensor? dloss, "
    "Tensor? dlse, int vocab_start"
)
lib.LIBRARY.define(f"masked_ce_bwd(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor", tags=lib.TAGS)
lib.LIBRARY.define(f"masked_ce_bwd_(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()", tags=lib.TAGS)
lib.LIBRARY.define(
    "masked_ce_shard_fwd(Tensor logits, Tensor targets, Tensor token_weights, int vocab_start) -> (Tensor, Tensor)",
    tags=lib.TAGS,
)


# ---------------------------------------------------------------------------------------------------------- kernels


def full_scale(normalizer: Tensor, scale: float, op: str = "masked_cross_entropy") -> float:
    """Return scale / normalizer as a host number; this costs no sync on a CPU.

    ValueError: the normalizer is not finite and positive.
    """
    value = float(normalizer)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: normalizer must be finite and positive, got {value}")
    return scale / value


def resolve_normalizer(normalizer: Tensor | None, scale: float) -> tuple[Tensor | None, float]:
    """Return (normalizer, scale) as the kernels take them.

    On CUDA the device divides, so that the host need not wait. On a CPU the normalizer becomes part of the scale.
    """
    if normalizer is None:
        return None, scale
    if normalizer.is_cuda:
        return normalizer, scale
    return None, full_scale(normalizer, scale)


def kernel_targets(targets: Tensor) -> Tensor:
    """Return `targets` as the kernels take them: contiguous, int64 on a CPU."""
    return lib.contiguous(targets if targets.dtype == torch.int64 or targets.is_cuda else targets.long())


def workspace_for(logits: Tensor) -> Tensor | None:
    """Return the workspace of the loss kernels for `logits` [N, V]; None where they need none."""
    if not logits.is_cuda:
        return None
    size = raw.masked_cross_entropy_workspace(logits.shape[0], logits.shape[1], logits.device)
    return logits.new_empty(size, dtype=torch.uint8) if size else None


def weighted_sum(nll: Tensor, token_weights: Tensor, normalizer: Tensor | None, scale: float) -> Tensor:
    """Return the loss, from the nll of each token and the result of `resolve_normalizer`."""
    loss = nll.new_empty(())
    raw.weighted_sum(loss, lib.contiguous(nll), lib.contiguous(token_weights), normalizer=normalizer, scale=scale)
    return loss


def _row_results(logits: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate two float32 numbers per row, and the row's lse in parts [N, 2]."""
    rows = logits.shape[0]
    return token_weights.new_empty(rows), token_weights.new_empty(rows), token_weights.new_empty(rows, 2)


def _fwd_cpu(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    normalizer: Tensor | None,
    scale: float,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    results = lib.cpu_calls().masked_cross_entropy(logits, targets, token_weights, normalizer, scale)
    if results is not None:
        return results
    return _fwd(logits, targets, token_weights, normalizer, scale, inplace_backward)


def _fwd(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    normalizer: Tensor | None,
    scale: float,
    inplace_backward: bool,
) -> tuple[Tensor, ...]:
    nll, lse, lse_parts = _row_results(logits, token_weights)
    token_weights = lib.contiguous(token_weights)
    normalizer, scale = resolve_normalizer(normalizer, scale)
    raw.masked_cross_entropy(
        *(logits, kernel_targets(targets), token_weights), nll=nll, lse=lse, lse_parts=lse_parts,
        workspace=workspace_for(logits),
    )  # fmt: skip
    return weighted_sum(nll, token_weights, normalizer, scale), nll, lse, lse_parts


def _shard_fwd(logits: Tensor, targets: Tensor, token_weights: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    target_logit, _, lse_parts = _row_results(logits, token_weights)
    raw.masked_cross_entropy(
        *(logits, kernel_targets(targets), lib.contiguous(token_weights)), lse_parts=lse_parts,
        target_logit=target_logit, vocab_start=vocab_start, workspace=workspace_for(logits),
    )  # fmt: skip
    return lse_parts, target_logit


def _bwd_into(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    normalizer: Tensor | None,
    scale: float,
    lse_parts: Tensor,
    dloss: Tensor | None,
    dlse: Tensor | None,
    vocab_start: int,
) -> None:
    normalizer, scale = resolve_normalizer(normalizer, scale)
    if dlse is not None and not dlse.is_contiguous():
        dlse = dlse.clone(memory_format=torch.contiguous_format)
    raw.masked_cross_entropy_backward(
        *(grad, logits, kernel_targets(targets), lib.contiguous(token_weights), lib.contiguous(lse_parts)),
        dloss=dloss,
        dlse=dlse,
        normalizer=normalizer,
        scale=scale,
        vocab_start=vocab_start,
    )


def _bwd_cpu(logits: Tensor, *arguments: lib.Argument) -> Tensor:
    grad = lib.cpu_calls().masked_cross_entropy_backward(logits, *arguments)
    return _bwd(logits, *arguments) if grad is None else grad


def _bwd(logits: Tensor, *arguments: lib.Argument) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _bwd_into(grad, logits, *arguments)
    return grad


def _bwd_inplace(logits: Tensor, *arguments: lib.Argument) -> None:
    _bwd_into(logits, logits, *arguments)


# -------------------------------------------------------------------------------------------------- fakes and autograd


def _fwd_fake(logits: Tensor, targets: Tensor, token_weights: Tensor, *arguments: lib.Argument) -> tuple[Tensor, ...]:
    return token_weights.new_empty(()), *_row_results(logits, token_weights)


def _shard_fwd_fake(logits: Tensor, targets: Tensor, token_weights: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    target_logit, _, lse_parts = _row_results(logits, token_weights)
    return lse_parts, target_logit


def _bwd_fake(logits: Tensor, *arguments: lib.Argument) -> Tensor:
    return logits.new_empty(logits.shape)


def _bwd_inplace_fake(logits: Tensor, *arguments: lib.Argument) -> None:
    return None


class _Context(lib.Context):
    scale: float
    inplace: bool
    overwritten: bool  # the backward has run and written the gradient over the logits


def _setup_context(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, token_weights, normalizer, ctx.scale, ctx.inplace = inputs
    loss, nll, lse, lse_parts = output
    ctx.mark_non_differentiable(nll, lse_parts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, token_weights, normalizer, lse_parts)
    ctx.overwritten = False


def _keep(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    logits, targets, token_weights, normalizer, ctx.scale, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    loss, _nll, _lse, lse_parts = output
    ctx.save_for_backward(logits, targets, token_weights, normalizer, lse_parts)
    ctx.overwritten = False
    return (loss,)


def _saved_through_hooks(ctx: _Context) -> bool:
    """Return whether saved-tensor hooks (non-reentrant checkpointing, save_on_cpu) keep the logits, or may keep them.

    Autograd does not compare versions of such tensors, so it would not detect that another op needs them. A saved
    tensor takes hooks once, and refuses ours where it already has some. Call this after the last use of
    ctx.saved_tensors.
    """
    try:
        ctx._raw_saved_tensors[0].register_hooks(_itself, _itself)
    except (AttributeError, RuntimeError):
        return True
    return False


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _backward(
    ctx: _Context, dloss: Tensor | None, _nll: Tensor | None, dlse: Tensor | None, _lse_parts: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dloss is None and dlse is None:
        return (None,) * 6
    if ctx.overwritten:
        raise RuntimeError(
            "masked_cross_entropy: with inplace_backward=True the backward runs once; it has overwritten the logits "
            "with their gradient"
        )
    logits, targets, token_weights, normalizer, lse_parts = ctx.saved_tensors
    if dloss is None and dlse is not None:
        dloss = dlse.new_zeros(())
    arguments = (targets, token_weights, normalizer, ctx.scale, lse_parts, dloss, dlse, 0)
    if not ctx.inplace:
        return _call_bwd(logits, *arguments), *(None,) * 5
    if torch.is_grad_enabled():
        raise RuntimeError(
            "masked_cross_entropy: inplace_backward=True has no second derivative; do without create_graph=True"
        )
    lib.refuse_tangents("masked_ce_bwd_", dloss, dlse)
    if _saved_through_hooks(ctx):
        return _call_bwd(logits, *arguments), *(None,) * 5
    ctx.overwritten = True
    grad = logits.detach()
    torch.ops.illada.masked_ce_bwd_(grad, *arguments)
    return grad, *(None,) * 5


lib.implement("masked_ce_fwd", _fwd_fake, cpu=_fwd_cpu, cuda=_fwd)
lib.implement("masked_ce_bwd", _bwd_fake, cpu=_bwd_cpu, cuda=_bwd)
lib.implement("masked_ce_bwd_", _bwd_inplace_fake, cpu=_bwd_inplace, cuda=_bwd_inplace)
lib.implement("masked_ce_shard_fwd", _shard_fwd_fake, cpu=_shard_fwd, cuda=_shard_fwd)
lib.register_autograd("masked_ce_fwd", _backward, _setup_context)
lib.raise_on_double_backward("masked_ce_bwd")
_call_fwd, _call_bwd = lib.caller("masked_ce_fwd"), lib.caller("masked_ce_bwd")
_fwd_directly = lib.direct("masked_ce_fwd", 1, _keep, lambda ctx, dloss: _backward(ctx, dloss, None, None, None)[:1])


# --------------------------------------------------------------------------------------------------- public functions


def check_logits(op: str, logits: Tensor) -> None:
    """Raise TypeError or ValueError unless the kernels take `logits` [T, V]."""
    if logits.dim() == 2 and logits.dtype in LOGITS_DTYPES["cpu"] and logits.is_contiguous():
        return
    lib.check_shape(op, "logits", logits, ("T", "V"))
    lib.check_dtype(op, "logits", logits, logits_dtypes(logits))
    lib.check_last_contiguous(op, "logits", logits)


def check_targets(
    op: str,
    total: int,
    vocab_size: int | None,
    targets: Tensor,
    token_weights: Tensor,
    rows: Tensor | None,
    normalizer: Tensor | None = None,
) -> None:
    """Check shapes, dtypes and rows of a loss, and under ILLADA_DEBUG=1 the values on a GPU.

    On a CPU the kernel checks the values.

    Args:
        op: Name of the op, for error messages.
        total: T.
        vocab_size: V; None: a shard, whose targets may have any value.
        targets: int64 or int32 [T].
        token_weights: float32 [T], without gradient.
        rows: int32 or int64 [N] in [0, T), or None.
        normalizer: float32 scalar, or None.

    Raises:
        TypeError: A wrong dtype.
        ValueError: A wrong shape or value, or token_weights that require grad.
    """
    if targets.dim() != 1 or targets.shape[0] != total:
        lib.check_shape(op, "targets", targets, (total,))
    lib.check_dtype(op, "targets", targets, _TOKEN_DTYPES)
    if token_weights.dim() != 1 or token_weights.shape[0] != total:
        lib.check_shape(op, "token_weights", token_weights, (total,))
    if token_weights.dtype != torch.float32:
        got = str(token_weights.dtype).removeprefix("torch.")
        hint = (
            "" if got != "bfloat16" else "; under FSDP2, MixedPrecisionPolicy(cast_forward_inputs=False) leaves it so"
        )
        raise TypeError(f"{op}: token_weights must be float32, got {got}; pass token_weights.float(){hint}")
    if token_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: token_weights must not require grad; pass token_weights.detach(), and for its gradient take nll "
            "(return_nll=True) / normalizer"
        )
    if rows is not None:
        lib.check_shape(op, "rows", rows, ("N",))
        lib.check_index(op, "rows", rows)
        if lib.may_read(rows) and len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < total):
            raise ValueError(f"{op}: rows must be in [0, {total}), got {int(rows.min())} .. {int(rows.max())}")
    if not (targets.is_cuda and lib.may_read(targets)):
        return
    wrong = token_weights != 0
    if rows is not None:
        wrong &= torch.zeros_like(wrong).index_fill(0, rows.long(), True)
    if vocab_size is not None and (wrong := wrong & ((targets < 0) | (targets >= vocab_size))).any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: targets[{i}] is {int(targets[i])}, outside of [0, {vocab_size}), and its weight is not zero"
        )
    if normalizer is not None:
        full_scale(normalizer, 1.0, op)


def plain_scale(normalizer: float | Tensor | None) -> float | None:
    """Return the factor of the loss for a normalizer that is a correct number or None; otherwise None."""
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, (float, int)) and 0 < normalizer < math.inf:
        return 1.0 / normalizer
    return None


def split_normalizer(
    op: str, normalizer: float | Tensor | None, name: str, like: Tensor
) -> tuple[Tensor | None, float]:
    """Split the normalizer into (float32 scalar or None, host factor).

    The loss is divided by the scalar, or multiplied by the factor. `like` is the tensor whose device must match, called
    `name` in errors. ValueError: the normalizer has a wrong shape, device or value.
    """
    if isinstance(normalizer, Tensor):
        lib.check_shape(op, "normalizer", normalizer, ())
        if normalizer.device.type != "cpu":  # a CPU scalar is used like a number
            lib.check_same_device(op, (name, like), ("normalizer", normalizer))
        elif lib.may_read(normalizer):
            full_scale(normalizer, 1.0, op)
        return normalizer.float(), 1.0
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
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute sum_i w_i * CE(logits_i, y_i) / normalizer from given logits.

    The gradient of logits is dense, [T, V] in their dtype, and 0 in rows with token weight 0.

    Args:
        logits: [T, V], float32, bfloat16 or (on CUDA) float16, any row stride. Rows with token weight 0 are never read.
        targets: As in `linear_masked_cross_entropy`.
        token_weights: As in `linear_masked_cross_entropy`.
        normalizer: As in `linear_masked_cross_entropy`.
        return_nll: As in `linear_masked_cross_entropy`.
        rows: int32 or int64 [N], the selected rows; default: all rows with nonzero token weight. Other rows count as if
            their token weight were 0.
        return_lse: Also return log sum exp of each row, float32 [T], nats, 0 in rows with token weight 0. It has a
            gradient, so a z-loss costs nothing more: loss + 1e-4 * (lse**2).sum().
        inplace_backward: Write the gradient over the logits instead of into new memory. The logits must not be used
            after the backward, which runs once. Autograd raises where another op saved the logits for its backward, as
            a tanh, exp or softmax that produced them does. Their rows must not overlap. The option is ignored under
            torch.compile, and where saved-tensor hooks keep the logits (checkpoint with use_reentrant=False,
            save_on_cpu).

    Returns:
        loss, a float32 scalar. With `return_nll` or `return_lse` a tuple of loss and those requested of nll and lse, in
        this order.

    Raises:
        TypeError, ValueError, NotImplementedError: As `linear_masked_cross_entropy`.
        RuntimeError: A second backward with `inplace_backward`, or another op needs the overwritten logits.
    """
    op = "masked_cross_entropy"
    if rows is None and not (return_nll or return_lse or inplace_backward) and lib.plain_call(logits):
        scale = plain_scale(normalizer)
        if scale is not None and lib.cpu_calls().cross_entropy_fits(logits, targets, token_weights):
            return _fwd_directly(logits, targets, token_weights, None, scale, False)
    check_logits(op, logits)
    lib.check_same_device(
        op, ("logits", logits), ("targets", targets), ("token_weights", token_weights), ("rows", rows)
    )
    if inplace_backward and logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"{op}: inplace_backward needs rows of logits that do not overlap, got strides {logits.stride()} for "
            f"shape {list(logits.shape)}"
        )
    normalizer, scale = split_normalizer(op, normalizer, "logits", logits)
    check_targets(op, logits.shape[0], logits.shape[1], targets, token_weights, rows, normalizer)
    if rows is not None:
        index = rows.long()
        token_weights = torch.zeros_like(token_weights).index_copy(0, index, token_weights[index])
    inplace = inplace_backward and not torch.compiler.is_compiling()
    loss, nll, lse, _ = _call_fwd(logits, targets, token_weights, normalizer, scale, inplace)
    if not (return_nll or return_lse):
        return loss
    return loss, *((nll,) if return_nll else ()), *((lse,) if return_lse else ())
