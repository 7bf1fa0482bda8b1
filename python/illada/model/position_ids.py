"""Positions in packed sequences: position ids, RoPE, and the shift of next-token logits."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.config import ModelConfig


def positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return position ids, int64 [T], which count from 0 in each sequence; no host sync."""
    index = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, index, right=True, out_int32=True) - 1
    return index - cu_seqlens[sequence]


def shifted(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the row before each row, int64 [T], for next-token logits; a sequence's first row keeps its own index."""
    return torch.arange(total, device=cu_seqlens.device) - (positions(cu_seqlens, total) > 0).to(torch.int64)


def rotary_tables(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the cos and sin tables of RoPE in float32, once per forward pass for all layers.

    Args:
        position_ids: int64 [T].
        config: Gives D, rope_theta and rope_in_fp32.
        dtype: Dtype of the tables, unless rope_in_fp32 keeps float32.

    Returns:
        cos and sin, each [T, 1, D].
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=position_ids.device)
    inverse_frequencies = config.rope_theta ** (-exponents / config.head_size)
    angles = position_ids.float()[:, None] * inverse_frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    table_dtype = torch.float32 if config.rope_in_fp32 else dtype
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [T, heads, D] by halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
