"""Conversion between padded batches and packed sequences.

The rest of the library knows no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(sequences: Sequence[Tensor | Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Concatenate sequences along their first dimension.

    Args:
        sequences: S tensors [L_s, ...] of one dtype and device (or lists of ints); lengths may be 0.

    Returns:
        (packed [T, ...], cu_seqlens int32 [S + 1]) with T = sum of L_s and cu_seqlens[s] the start of sequence s.
    """
    if len(sequences) == 0:
        raise ValueError("pack: sequences is empty; give at least one sequence")
    tensors = [s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.int64) for s in sequences]
    if any(t.dim() == 0 for t in tensors):
        raise ValueError("pack: each sequence must have at least one dimension, got a scalar tensor")
    lengths = torch.tensor([0] + [len(t) for t in tensors], device="cpu")
    return torch.cat(tensors), lengths.cumsum(0).to(torch.int32).to(tensors[0].device)


def unpack(packed: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Return the sequences of a pack as views of it; the inverse of `pack`.

    Reads cu_seqlens on the host (a sync on CUDA).
    """
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(packed):
        raise ValueError(f"unpack: cu_seqlens must run from 0 to {len(packed)}, got {bounds}")
    return [packed[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
