"""Factors of the gradients: scale / normalizer, which float16 gets late, and the gradient of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops import raw


def defers_scaling(compute_dtype: torch.dtype) -> bool:
    """Return whether scale and normalizer are applied in the backward instead of the forward.

    In float16 the smallest gradients would be lost, and a gradient scaler acts only in the backward. Until then the
    gradients are kept without scale and normalizer.
    """
    return compute_dtype == torch.float16


def deferred_factor(dloss: Tensor, normalizer: Tensor | None, scale: float) -> Tensor:
    """Return dloss, a float32 scalar, times the deferred scale / normalizer."""
    return dloss * scale if normalizer is None else dloss * (scale / normalizer)


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """Multiply grad by a float32 scalar in place, without rounding it to grad's dtype: 65536 is inf in float16."""
    if grad.is_cuda:
        raw.scale(grad, factor)
    else:
        grad.mul_(float(factor))
