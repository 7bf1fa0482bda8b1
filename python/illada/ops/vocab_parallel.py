"""Masked cross-entropy where each process holds a shard of the vocabulary.

A shard is the rows [vocab_start, vocab_start + V_shard) of the head weight, or those columns of the logits.

    lse = logsumexp over shards of lse_shard,   x[y] = sum over shards of target_logit (0 where y is elsewhere)

Each shard contributes two numbers per row. With the row's lse, it computes its part of the gradient without further
communication. To use your own collectives, call the two halves `masked_cross_entropy_shard` and
`masked_cross_entropy_shard_grad`. `linear_masked_cross_entropy_vocab_parallel` is the whole loss on a process group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from illada.ops import _library as lib
from illada.ops.linear_loss import compute_dtype_of, deferred_factor, defers_scaling
from illada.ops.loss import check_logits, check_targets, resolve_normalizer, split_normalizer, weighted_sum

#: Rows of a chunk. They do not depend on the size of the shard, because all processes must use the same row chunks.
_CHUNK_ROWS_CPU, _CHUNK_ROWS_CUDA = 256, 4096


def _check_shard(op: str, logits: Tensor, targets: Tensor, token_weights: Tensor, vocab_start: int) -> None:
    lib.refuse_tangents(op, logits, token_weights)  # before the logits are detached, from their tangent too
    check_logits(op, logits)
    lib.check_same_device(op, ("logits", logits), ("targets", targets), ("token_weights", token_weights))
    check_targets(op, logits.shape[0], None, targets, token_weights, None)
    if vocab_start < 0:
        raise ValueError(f"{op}: vocab_start must not be negative, got {vocab_start}")


def masked_cross_entropy_shard(
    logits: Tensor, targets: Tensor, token_weights: Tensor, *, vocab_start: int
) -> tuple[Tensor, Tensor]:
    """Compute a shard's contribution to the loss of each row; it has no gradient.

    Args:
        logits: [T, V_shard], the logits of ids vocab_start, vocab_start + 1, and so on. Dtypes as in
            `masked_cross_entropy`; the last dimension is contiguous.
        targets: int64 or int32 [T], ids of the whole vocabulary.
        token_weights: float32 [T]; it must not require grad.
        vocab_start: The first id of the shard, at least 0.

    Returns:
        (lse, target_logit), both 0 in rows with token weight 0, which are not read.
        lse, float64 [T]: log sum exp over the shard, in nats. It is not float32, because it is subtracted from logits
        of the same size.
        target_logit, float32 [T]: the target's logit, 0 where the target is in another shard.

    Raises:
        TypeError: A wrong dtype of an argument; the message names it.
        ValueError: A wrong shape, device or stride of an argument, a negative vocab_start, or token_weights that
            require grad.
        NotImplementedError: An argument has a forward-mode tangent, or no kernel was built for this device.
    """
    _check_shard("masked_cross_entropy_shard", logits, targets, token_weights, vocab_start)
    lse_parts, target_logit = torch.ops.illada.masked_ce_shard_fwd(logits.detach(), targets, token_weights, vocab_start)
    return lse_parts.double().sum(-1), target_logit


def masked_cross_entropy_shard_grad(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    lse: Tensor,
    *,
    vocab_start: int,
    normalizer: float | Tensor | None = None,
    dloss: Tensor | None = None,
    dlse: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Compute a shard's part of the gradient of the logits.

        grad = (w dloss / normalizer + dlse) e^(x - lse),   minus w dloss / normalizer at a target in this shard

    Args:
        logits: As in `masked_cross_entropy_shard`.
        targets: As in `masked_cross_entropy_shard`.
        token_weights: As in `masked_cross_entropy_shard`.
        vocab_start: As in `masked_cross_entropy_shard`.
        lse: float64 or float32 [T], log sum exp over the whole vocabulary. In float32, rounding of lse limits the
            gradient: at logits of 1e4 its relative error is up to 5e-4.
        normalizer: Positive number or float32 scalar tensor that divides the loss; default 1.
        dloss: float32 scalar tensor, the gradient of the loss; default 1.
        dlse: float32 [T], the gradient of the lse; default 0.
        inplace: Write the gradient over the logits.

    Returns:
        [T, V_shard] in the dtype of logits; with `inplace` it shares their memory.

    Raises:
        TypeError, ValueError, NotImplementedError: As in `masked_cross_entropy_shard`. ValueError also for a normalizer
            that is not finite and positive.
    """
    op = "masked_cross_entropy_shard_grad"
    _check_shard(op, logits, targets, token_weights, vocab_start)
    lib.refuse_tangents(op, lse, dloss, dlse)
    lib.check_shape(op, "lse", lse, tuple(token_weights.shape))
    lib.check_dtype(op, "lse", lse, (torch.float64, torch.float32))
    for name, tensor, shape in (("dloss", dloss, ()), ("dlse", dlse, tuple(lse.shape))):
        if tensor is not None:
            lib.check_shape(op, name, tensor, shape)
            lib.check_dtype(op, name, tensor, (torch.float32,))
    lib.check_same_device(op, ("logits", logits), ("lse", lse), ("dloss", dloss), ("dlse", dlse))
    normalizer, scale = split_normalizer(op, normalizer, "logits", logits)
    logits = logits.detach()
    high = lse.float()
    lse_parts = torch.stack([high, (lse - high).float()], dim=-1)
    arguments = (targets, token_weights, normalizer, scale, lse_parts, dloss, dlse, vocab_start)
    if not inplace:
        return torch.ops.illada.masked_ce_bwd(logits, *arguments)
    torch.ops.illada.masked_ce_bwd_(logits, *arguments)
    return logits


def _whole_rows(
    halves: tuple[Tensor, Tensor],
    targets: Tensor,
    token_weights: Tensor,
    vocab_start: int,
    size: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Combine all shards' lse parts and target logits into (nll, lse parts) over the whole vocabulary.

    This takes two collectives of a few numbers per row.
    """
    (maximum, log_sum), target_logit = halves[0].unbind(-1), halves[1]
    largest = maximum.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    here = (targets >= vocab_start) & (targets < vocab_start + size)
    sums = torch.stack([(maximum - largest + log_sum).exp(), target_logit, here.float()])
    dist.all_reduce(sums, group=group)
    has_weight = token_weights != 0
    log_sum = sums[0].log()
    nowhere = has_weight & (sums[2] == 0)
    if not nowhere.is_cuda and nowhere.any():  # every process has the same sums, so all raise
        target = int(targets[nowhere][0])
        raise ValueError(
            f"linear_masked_cross_entropy_vocab_parallel: target {target} is in no shard, and its weight is not zero"
        )
    nll = torch.where(has_weight, largest - sums[1] + log_sum, 0).masked_fill(nowhere, torch.nan)
    return nll, torch.stack([largest, log_sum], dim=-1)


class _Context(lib.Context):
    scale: float
    defer_scaling: bool


class _VocabParallelLoss(torch.autograd.Function):
    """Loss whose forward pass computes the gradients, chunk by chunk, as `linear_masked_cross_entropy` does."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        rows: Tensor | None,
        normalizer: Tensor | None,
        scale: float,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        chunk_rows: int,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        hidden_grad, weight_grad = (needs_grad and needed for needed in ctx.needs_input_grad[:2])
        count = len(hidden) if rows is None else len(rows)
        head = lib.cast(weight, dtype)
        defer_scaling = defers_scaling(dtype)
        early = (None, 1.0) if defer_scaling else (normalizer, scale)
        nll = token_weights.new_zeros(len(hidden))
        d_hidden = hidden.new_zeros(hidden.shape if hidden_grad else (0,))
        d_weight = weight.new_zeros(weight.shape if weight_grad else (0,), dtype=torch.float32)
        buffer = head.new_empty(min(chunk_rows, count), len(weight))
        for start in range(0, count, chunk_rows):
            part = slice(start, min(start + chunk_rows, count))
            index = part if rows is None else rows[part].long()
            its_targets, its_weights = targets[index], token_weights[index]
            selected = lib.cast(hidden[index].masked_fill((its_weights == 0).unsqueeze(-1), 0), dtype)
            logits = torch.mm(selected, head.t(), out=buffer[: part.stop - part.start])
            halves = torch.ops.illada.masked_ce_shard_fwd(logits, its_targets, its_weights, vocab_start)
            nll[index], lse_parts = _whole_rows(halves, its_targets, its_weights, vocab_start, len(weight), group)
            if not (hidden_grad or weight_grad):
                continue
            torch.ops.illada.masked_ce_bwd_(
                logits, its_targets, its_weights, *early, lse_parts, None, None, vocab_start
            )
            if hidden_grad:
                d_hidden[index] = lib.cast(torch.mm(logits, head), hidden.dtype)
            if weight_grad:
                lib.add_product(d_weight, logits.t(), selected, first=False)
        normalizer, scale = resolve_normalizer(normalizer, scale)
        if hidden_grad:
            dist.all_reduce(d_hidden, group=group)
        ctx.scale, ctx.defer_scaling = scale, defer_scaling
        ctx.save_for_backward(d_hidden, d_weight, normalizer if defer_scaling else None)
        ctx.mark_non_differentiable(nll)
        ctx.set_materialize_grads(False)
        # d_hidden and d_weight stay differentiable outputs, so a second derivative raises, as in linear_masked_ce_fwd.
        return weighted_sum(nll, token_weights, normalizer, scale), nll, d_hidden, d_weight

    @staticmethod
    def backward(ctx: _Context, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 12
        *grads, normalizer = ctx.saved_tensors
        if ctx.defer_scaling:
            dloss = deferred_factor(dloss, normalizer, ctx.scale)
        grads = torch.ops.illada.linear_masked_ce_bwd(dloss, *grads)
        needed = (grad if needs else None for grad, needs in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, *(None,) * 10


def linear_masked_cross_entropy_vocab_parallel(
    hidden: Tensor,
    weight_shard: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    rows: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    chunk_rows: int | None = None,
    return_nll: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `linear_masked_cross_entropy` where each process of `group` holds some rows of the head weight.

    It communicates 4 numbers per row in 2 collectives per chunk, and hidden's gradient once.

    Call backward in every process. Hidden's gradient is complete in each: this function sums it over the group, the
    caller must not. weight_shard's gradient stays with its shard.

    Args:
        hidden: [T, C]. hidden, targets, token_weights, rows, normalizer and chunk_rows must be the same in all
            processes. Whether hidden and weight_shard each need a gradient must also be the same.
        weight_shard: [V_shard, C], rows vocab_start .. vocab_start + V_shard - 1 of the head weight, at least one.
            Sizes may differ between processes.
        targets: int64 or int32 [T], ids of the whole vocabulary.
        token_weights: float32 [T]; it must not require grad.
        vocab_start: The first id of the shard, at least 0.
        group: Process group; default: all processes.
        rows: As in `linear_masked_cross_entropy`.
        normalizer: As in `linear_masked_cross_entropy`.
        chunk_rows: Rows whose logits exist at a time; default 256 on a CPU, 4096 on CUDA.
        return_nll: Also return the negative log-likelihoods, float32 [T], nats.

    Returns:
        The whole loss in every process, a float32 scalar; with `return_nll` (loss, nll).

    Raises:
        TypeError: A wrong dtype of an argument; the message names it.
        ValueError: A wrong shape, device or value of an argument; the message names it. On a CPU also a target in no
            shard whose token weight is not 0; on CUDA its nll is NaN.
        NotImplementedError: No kernel was built for this device.
    """
    op = "linear_masked_cross_entropy_vocab_parallel"
    lib.check_shape(op, "hidden", hidden, ("T", "C"))
    lib.check_shape(op, "weight_shard", weight_shard, ("V", hidden.shape[1]))
    if weight_shard.shape[0] < 1:
        raise ValueError(f"{op}: weight_shard must have at least one row, got {list(weight_shard.shape)}")
    dtype = compute_dtype_of(op, hidden, "weight_shard", weight_shard)
    lib.check_same_device(
        op, ("hidden", hidden), ("weight_shard", weight_shard), ("targets", targets), ("token_weights", token_weights),
        ("rows", rows),
    )  # fmt: skip
    normalizer, scale = split_normalizer(op, normalizer, "hidden", hidden)
    check_targets(op, hidden.shape[0], None, targets, token_weights, rows)
    if vocab_start < 0:
        raise ValueError(f"{op}: vocab_start must not be negative, got {vocab_start}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")
    if rows is None and not hidden.is_cuda:
        rows = token_weights.nonzero().squeeze(-1)
    chunk_rows = chunk_rows or (_CHUNK_ROWS_CUDA if hidden.is_cuda else _CHUNK_ROWS_CPU)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, nll, _, _ = _VocabParallelLoss.apply(
            *(hidden, weight_shard, targets, token_weights, rows, normalizer, scale, vocab_start, group, chunk_rows),
            *(dtype, torch.is_grad_enabled()),
        )
    return (loss, nll) if return_nll else loss
