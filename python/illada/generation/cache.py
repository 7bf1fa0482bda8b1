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
        config: Configuration of the model.
        slots: Number of sequences.
        slot_length: Largest number of tokens of a sequence.
        spare: Number of rows behind the slots, for tokens that no other token attends to.
        device: Device of the tensors.
        dtype: Dtype of the tensors.

    Attributes:
        k, v: [layers, slots * slot_length + spare, G, D], keys and values.
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
        """Return the cache for a forward pass of the tokens starts[i] .. ends[i] - 1 of the sequences in `slots`.

        Rows and lengths of the result are arrays; the caller copies them to the device.

        Args:
            slots: Slots of the sequences, ascending.
            starts: First token of each sequence in this pass.
            ends: End of the tokens of each sequence in this pass.
            blanks: Number of further sequences, as long as the first. They attend to nothing; their keys and values go
                to the spare rows.
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
