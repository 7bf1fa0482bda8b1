"""Batches of `MaskedDiffusionTrainer`: its collator, and which tokens of a batch are learned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class MaskedDiffusionCollator:
    """Rows of `input_ids` as one batch: padded to the longest, or with `packed` one behind the other.

    Args:
        pad_token_id: stands in padding, which nothing reads.
        packed: a batch of one row, with `cu_seq_lens_q` and `position_ids`; for attn_implementation="illada" and
            "flash_attention_2".

    A row may have an `attention_mask` (what it hides is left out of a pack) and `labels`: -100 where a token is shown
    and not learned, such as a prompt's. A row without them (or with None) has no hidden token and learns all. Other
    columns must be in all rows, as long as `input_ids`; they are padded by 0.
    """

    def __init__(self, pad_token_id: int = 0, *, packed: bool = False) -> None:
        self.pad_token_id, self.packed = pad_token_id, packed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch; a pack has `lengths`, a list, as well."""
        filled = [_filled(row) for row in rows]
        names = list(dict.fromkeys(name for row in filled for name in row))
        for row, name in itertools.product(filled, names):
            if name not in row:
                raise ValueError(f"{name} must be in every row or in none, got a row with {', '.join(row)} alone")
            if len(row[name]) != len(row["input_ids"]):
                raise ValueError(f"{name} must be as long as input_ids ({len(row['input_ids'])}), got {len(row[name])}")
        if all(row["labels"] is row["input_ids"] for row in filled):
            names.remove("labels")
        columns = {name: [_column(row[name]) for row in filled] for name in names}
        masks = columns.pop("attention_mask")
        if self.packed:
            return self._pack({n: [x[m.bool()] for x, m in zip(c, masks, strict=True)] for n, c in columns.items()})
        fill = {"input_ids": self.pad_token_id, "labels": -100}
        pad = nn.utils.rnn.pad_sequence
        batch = {name: pad(column, True, fill.get(name, 0)) for name, column in columns.items()}
        return batch | {"attention_mask": pad(masks, True, 0)}

    def _pack(self, columns: dict[str, list[Tensor]]) -> dict[str, Any]:
        lengths = [len(ids) for ids in columns["input_ids"]]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch = {name: torch.cat(column)[None] for name, column in columns.items()}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        spans = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        return batch | spans | {"max_length_q": max(lengths), "max_length_k": max(lengths), "lengths": lengths}


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with labels and attention_mask, also where it has none.

    Then all its tokens are learned, and none is hidden.
    """
    given = {name: values for name, values in row.items() if values is not None}
    ids = given["input_ids"]
    return {"labels": ids, "attention_mask": [1] * len(ids)} | given


def _column(values: Any) -> Tensor:
    """Return a row's values as a tensor: int64 also without tokens, where torch would make it float32."""
    return torch.as_tensor(values) if len(values) else torch.zeros(0, dtype=torch.int64)


#: In a batch: which tokens are learned, bool as `input_ids`, an array that stays on the host.
LEARNED = "learned_on_host"
#: Entries of a batch that are the trainer's, not the model's.
OURS = ("labels", "lengths", "first_sample", LEARNED)


def collate(collator: Callable[[Any], Any], rows: Any) -> dict[str, Any]:
    """Return a batch of `collator` with `LEARNED`, which is None for a batch that is on a device already."""
    batch = dict(collator(rows))
    return batch | {LEARNED: learned_on_host(batch)}


def learned_on_host(batch: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Return `learned_tokens` without waiting for a device; None where only the device knows."""
    if batch.get(LEARNED) is None and batch["input_ids"].device.type == "cpu":
        return learned_tokens(batch).numpy()
    return batch.get(LEARNED)


def learned_tokens(batch: dict[str, Any]) -> Tensor:
    """Return which tokens are learned, bool of the shape of `input_ids`.

    These are neither padding nor left out by labels.
    """
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    counted = torch.ones_like(ids, dtype=torch.bool)
    for name, other in (("attention_mask", mask), ("labels", labels)):
        if other is not None and other.shape != ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids, {list(ids.shape)}, got {list(other.shape)}")
    if mask is not None:
        counted = counted & mask.bool()
    return counted if labels is None else counted & (labels != -100)


def check_labels(batch: dict[str, Any]) -> None:
    """Raise ValueError for labels that are neither input_ids nor -100; a device has to be waited for."""
    labels, ids = batch.get("labels"), batch["input_ids"]
    if labels is not None and bool((learned_tokens(batch) & (labels != ids)).any()):
        raise ValueError(
            "labels must be input_ids or, at tokens that are not learned, -100; the trainer masks by itself, so use "
            "MaskedDiffusionCollator, and none that masks (DataCollatorForLanguageModeling with mlm=True) or shifts"
        )


def shape_of(batch: dict[str, Any]) -> tuple[int, int]:
    """Return the number of sequences, and the longest's length."""
    if "cu_seq_lens_q" in batch and "lengths" not in batch:
        raise ValueError("a packed batch must have lengths, a list: pack with MaskedDiffusionCollator(packed=True)")
    lengths = batch.get("lengths")
    return tuple(batch["input_ids"].shape) if lengths is None else (len(lengths), max(lengths))


def flat_weights(drawn: tuple[np.ndarray, np.ndarray], batch: dict[str, Any]) -> np.ndarray:
    """Return each token's weight, float32 [T], 0 where unmasked, of masks [B, L] and weights [B]."""
    masked, weights = drawn
    if "lengths" in batch:
        inside = np.arange(masked.shape[1]) < np.asarray(batch["lengths"])[:, None]
        flat, of_each = masked[inside], np.repeat(weights, batch["lengths"])
    else:
        flat, of_each = masked.reshape(-1), np.repeat(weights, masked.shape[1])
    return np.where(flat, of_each, np.float32(0))


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
