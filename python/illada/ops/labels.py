"""Losses from labels with an `ignore_index`, the form that other trainers use."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops.linear_loss import linear_masked_cross_entropy
from illada.ops.loss import masked_cross_entropy


def masked_cross_entropy_from_labels(
    logits_or_hidden: Tensor,
    labels: Tensor,
    *,
    head: Tensor | None = None,
    weights: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Compute the masked cross-entropy from labels, as `F.cross_entropy` takes them.

    It calls `masked_cross_entropy`, or with a head `linear_masked_cross_entropy`.

    On CUDA the host never waits for the device.

    Args:
        logits_or_hidden: Logits [..., V], or hidden states [..., C] with `head`. There may be any number of leading
            dimensions. Unlike in `F.cross_entropy`, classes are always the last dimension.
        labels: int64 or int32 [...], the targets; `ignore_index` at tokens without a loss.
        head: [V, C], the head weight. The logits then never exist all at once.
        weights: [...] of any real dtype, the token weights, such as 1 / t; default 1. They must not require grad.
        ignore_index: Label of tokens without a loss.
        normalizer: Number or scalar tensor that divides the sum; default the number of labels that are not ignored, at
            least 1. Pass the whole step's number where gradients are accumulated (`num_items_in_batch` of the HF
            Trainer).

    Returns:
        sum_i w_i CE(x_i, y_i) / normalizer, a float32 scalar; 0 where all labels are ignored.

    Raises:
        TypeError, ValueError: Labels or weights of another shape or a wrong dtype, or errors of the two losses.
    """
    op = "masked_cross_entropy_from_labels"
    if logits_or_hidden.dim() < 2:
        raise ValueError(f"{op}: logits_or_hidden must have at least 2 dimensions, got {list(logits_or_hidden.shape)}")
    for name, tensor in (("labels", labels), ("weights", weights)):
        if tensor is not None and tensor.shape != logits_or_hidden.shape[:-1]:
            wanted = list(logits_or_hidden.shape[:-1])
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(tensor.shape)}")
    lib.check_dtype(op, "labels", labels, (torch.int64, torch.int32))
    if weights is not None and weights.is_complex():
        raise TypeError(f"{op}: weights must be real, got {str(weights.dtype).removeprefix('torch.')}")
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weights must not require grad; pass weights.detach()")
    counts = labels.flatten() != ignore_index
    token_weights = counts.float() if weights is None else torch.where(counts, weights.flatten().float(), 0)
    if normalizer is None:
        normalizer = counts.sum().clamp(min=1)
    rows = logits_or_hidden.flatten(0, -2)
    targets = labels.flatten()
    if head is None:
        loss = masked_cross_entropy(rows, targets, token_weights, normalizer=normalizer)
    else:
        loss = linear_masked_cross_entropy(rows, head, targets, token_weights, normalizer=normalizer)
    assert isinstance(loss, Tensor)
    return loss
