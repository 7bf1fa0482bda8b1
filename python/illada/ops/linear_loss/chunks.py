"""The loss by torch.mm, one row chunk at a time, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.linear_loss.scaling import deferred_factor, defers_scaling, scale_in_place
from illada.ops.loss import kernel_targets, resolve_normalizer, weighted_sum, workspace_for

#: Bytes of logits in one row chunk on a CPU. They are small beside the model's activations, and large enough for the
#: GEMMs to run at full speed.
CHUNK_BYTES_CPU = 32 << 20
#: The same on CUDA: 4480 rows of 155,136 ids in 16 bits, enough to keep the GEMMs at full speed.
CHUNK_BYTES_CUDA = 1_400_000_000


def chunk_rows_of(count: int, vocab_size: int, dtype: torch.dtype, is_cuda: bool) -> int:
    """Return the rows of a chunk for `count` rows.

    A chunk has as many rows as the buffer holds. On CUDA chunks have whole tiles of 128 rows, and similar sizes.
    """
    row_bytes = vocab_size * dtype.itemsize
    if not is_cuda:
        return max(128, CHUNK_BYTES_CPU // row_bytes)
    most = max(128, CHUNK_BYTES_CUDA // row_bytes // 128 * 128)
    chunks = max(1, -(-count // most))
    return max(128, -(-count // (128 * chunks)) * 128)


def forward_by_chunks(
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
    *,
    into: Tensor | None = None,
    all_weighted: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute row chunks with torch.mm, and turn each chunk's logits into their gradient in place.

    Without `rows`, the head weight multiplies all T rows. The result is always exact: filter_eps is ignored.
    all_weighted: no row in the chunks has token weight 0.
    """
    normalizer, scale = resolve_normalizer(normalizer, scale)
    targets, token_weights = kernel_targets(targets), lib.contiguous(token_weights)
    head = lib.cast(weight, compute_dtype)
    vocab_size, count = weight.shape[0], hidden.shape[0] if rows is None else rows.shape[0]
    chunk_rows = chunk_rows or chunk_rows_of(count, vocab_size, compute_dtype, hidden.is_cuda)
    defer_scaling = defers_scaling(compute_dtype)
    early_normalizer, early_scale = (None, 1.0) if defer_scaling else (normalizer, scale)

    nll = token_weights.new_zeros(hidden.shape[0])
    d_hidden = hidden.new_empty(0)
    if hidden_grad:  # without `rows` every row is written
        d_hidden = (torch.empty_like if rows is None else torch.zeros_like)(
            hidden, memory_format=torch.contiguous_format
        )
    if into is None or defer_scaling:
        shape = weight.shape if weight_grad else (0,)
        d_weight = (weight.new_empty if count else weight.new_zeros)(shape, dtype=grad_weight_dtype)
        is_given = False
    else:
        d_weight, is_given = into, True
    buffer = head.new_empty(min(chunk_rows, count), vocab_size)
    workspace = workspace_for(buffer)
    lse_parts = nll.new_empty(buffer.shape[0], 2) if hidden.is_cuda else None  # CUDA needs it for large rows
    for start in range(0, count, chunk_rows):
        part = slice(start, min(start + chunk_rows, count))
        logits = _part(buffer, slice(part.stop - part.start))
        index: slice | Tensor
        if rows is None:  # the chunk's tokens are contiguous
            index, chunk, of_targets, of_weights = part, None, _part(targets, part), _part(token_weights, part)
            selected, its_weights = _part(hidden, part), of_weights
        else:
            its_rows = lib.contiguous(_part(rows, part))
            index, chunk = lib.cast(its_rows, torch.int64), lib.cast(its_rows, torch.int32)
            of_targets, of_weights, selected = targets, token_weights, hidden.index_select(0, index)
            its_weights = token_weights if all_weighted else token_weights.index_select(0, index)
        if not all_weighted:  # rows with token weight 0 must not reach the weight's gradient: 0 * NaN is NaN
            selected = selected.masked_fill((its_weights == 0).unsqueeze(-1), 0)
        selected = lib.cast(selected, compute_dtype)
        torch.mm(selected, head.t(), out=logits)
        its_nll = _part(nll, part) if rows is None else nll.new_empty(logits.shape[0])
        raw.masked_cross_entropy(
            *(logits, of_targets, of_weights), rows=chunk, nll=its_nll,
            lse_parts=None if lse_parts is None else lse_parts[: logits.shape[0]],
            grad=logits if hidden_grad or weight_grad else None, normalizer=early_normalizer, scale=early_scale,
            workspace=workspace,
        )  # fmt: skip
        if hidden_grad and rows is None and compute_dtype == hidden.dtype:
            torch.mm(logits, head, out=_part(d_hidden, part))
        elif hidden_grad:
            _put(d_hidden, index, lib.cast(torch.mm(logits, head), hidden.dtype))
        if rows is not None:
            _put(nll, index, its_nll)
        if weight_grad:
            lib.add_product(d_weight, logits.t(), selected, first=start == 0 and not is_given)
    if defer_scaling and into is not None:  # no backward will scale it
        scale_in_place(d_weight, deferred_factor(nll.new_ones(()), normalizer, scale))
        into.add_(d_weight)
    return weighted_sum(nll, token_weights, normalizer, scale), nll, d_hidden, d_weight


def _part(tensor: Tensor, part: slice) -> Tensor:
    """Return tensor[part], or the tensor itself where the part is all of it."""
    return tensor if not part.start and part.stop == tensor.shape[0] else tensor[part]


def _put(whole: Tensor, index: slice | Tensor, part: Tensor) -> None:
    """Assign whole[index] = part; index_copy_ takes a third of the time where the index is a tensor."""
    if isinstance(index, slice):
        _part(whole, index).copy_(part)
    else:
        whole.index_copy_(0, index, part)
