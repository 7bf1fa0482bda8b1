"""Packed sequences with masked tokens, which the forward process makes and the model's loss takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Packed sequences with some tokens masked, the input of `MaskedDiffusionModel.loss`.

    tokens: int64 [T], mask_id where masked.
    targets: int64 [T], the original tokens.
    token_weights: float32 [T], 1 / p where masked, 0 elsewhere.
    cu_seqlens: int32 [S + 1], where each sequence starts, with T last.
    position_ids: int64 [T], from 0 in each sequence.
    rows: int32 [N], the masked positions, ascending.
    """

    tokens: Tensor
    targets: Tensor
    token_weights: Tensor
    cu_seqlens: Tensor
    position_ids: Tensor
    rows: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens T, masked or not."""
        return self.tokens.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return Batch(*(f.to(device, non_blocking=non_blocking) for f in self._fields()))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return Batch(*(f.pin_memory() for f in self._fields()))

    def _fields(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]
