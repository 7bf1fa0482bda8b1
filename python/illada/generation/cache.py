"""Keys and values of finished tokens, kept in preallocated slots of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from illada.config import ModelConfig
from illada.reuse import CachedKeys


class KeyValueCache:
    """A cache with slots of equal size for the keys and values of all layers.

    Keys and values have the size of the key-value heads (GQA).

    Args:
        config: of the model. slots: how many sequences. slot_length: most tokens of one.
        spare: rows behind the slots, for tokens that nobody looks at.

    Attributes:
        k, v: [layers, slots * slot_length + spare, G, D].
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        slot_length: int,
        *,
        spare: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.slot_length, self.end = slot_length, slots * slot_length
        shape = (config.num_hidden_layers, self.end + spare, config.num_key_value_heads, config.head_size)
        # Zeros, so that a key that was never written cannot turn a masked-out product into NaN.
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    @property
    def num_bytes(self) -> int:
        """The number of bytes of both tensors."""
        return 2 * self.k.numel() * self.k.element_size()

    def view(self, slots: Sequence[int], starts: Sequence[int], ends: Sequence[int], *, blanks: int = 0) -> CachedKeys:
        """Return what a forward of tokens starts[i] .. ends[i] - 1 of the sequences in `slots` (ascending) needs.

        Rows and lengths of `CachedKeys` are arrays, for the caller to put beside the keys.

        `blanks` more sequences, as long as the first, see nothing; their keys and values go to the spare rows.
        """
        rows = [
            np.arange(slot * self.slot_length + start, slot * self.slot_length + end)
            for slot, start, end in zip(slots, starts, ends, strict=True)
        ]
        rows += [np.arange(self.end, self.end + len(rows[0]))] * blanks
        bounds = [slot * self.slot_length for slot in slots] + [self.end] * (1 + blanks)
        used = [*ends, *[0] * blanks]
        arrays: Any = np.concatenate(rows), np.asarray(bounds, dtype=np.int32), np.asarray(used, dtype=np.int32)
        return CachedKeys(self.k, self.v, *arrays)
