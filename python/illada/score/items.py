"""The checked pairs to score, and what all scores share: packs, hidden states and cross-entropies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from illada.config import ModelConfig
from illada.guidance import guide
from illada.model import MaskedDiffusionModel
from illada.ops import AttentionPlan, attention_plan, linear_masked_cross_entropy
from illada.reuse import FirstProjection
from illada.terminal import shows

#: Packed tokens of one forward pass, both sequences of guidance counted.
MAX_TOKENS = 4096  # keeps a GPU busy with 8B; larger packs of small models leave a CPU's caches

Layout = tuple[Tensor, Tensor, AttentionPlan]  # cu_seqlens, position_ids, plan


@dataclass(frozen=True)
class Item:
    """A pair of a context and a continuation.

    Of it `size` tokens meet the model: context, continuation and, where asked for, the eos.
    """

    index: int
    context: NDArray[np.int64]
    continuation: NDArray[np.int64]
    suffix: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the continuation."""
        return len(self.continuation)

    @property
    def size(self) -> int:
        """Number of tokens of the whole sequence."""
        return len(self.context) + len(self.continuation) + len(self.suffix)

    def sequence(self, mask_id: int, masked: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """Return what the model sees with the `masked` tokens of the continuation (default all) hidden."""
        shown = np.where(True if masked is None else masked, mask_id, self.continuation)
        return np.concatenate([self.context, shown, np.array(self.suffix, dtype=np.int64)])


def _token_ids(name: str, tokens: Sequence[int]) -> NDArray[np.int64]:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be a list of token ids, got {type(tokens).__name__} {str(tokens)[:40]!r}")
    return array.astype(np.int64)


def make_items(
    config: ModelConfig, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], append_eos: bool
) -> list[Item]:
    """Return the pairs with something to score, checked."""
    if len(contexts) != len(continuations):
        raise ValueError(
            f"contexts and continuations must be of one length, got {len(contexts)} and {len(continuations)}"
        )
    suffix = (config.eos_token_id,) if append_eos else ()
    items = []
    for i, pair in enumerate(zip(contexts, continuations, strict=True)):
        context, continuation = _token_ids(f"contexts[{i}]", pair[0]), _token_ids(f"continuations[{i}]", pair[1])
        for name, ids, size in (
            ("contexts", context, config.embedding_rows),
            ("continuations", continuation, config.vocab_size),
        ):
            if len(wrong := ids[(ids < 0) | (ids >= size)]):
                raise ValueError(f"{name}[{i}] holds token id {wrong[0]}, outside of [0, {size})")
        if (continuation == config.mask_token_id).any():
            raise ValueError(
                f"continuations[{i}] holds the mask token, id {config.mask_token_id}; it hides what is scored and has "
                f"no probability of its own"
            )
        item = Item(i, context, continuation, suffix)
        beyond = item.size - config.max_position_embeddings
        if beyond > 0:
            raise ValueError(
                f"contexts[{i}] and continuations[{i}] have {len(context)} + {len(continuation)} tokens"
                f"{' and an eos' if append_eos else ''}, {beyond} over the model's max_position_embeddings of "
                f"{config.max_position_embeddings}; illada.score.truncate_context shortens the context"
            )
        if item.length:
            items.append(item)
    return items


def check_options(cfg_scale: float, max_tokens: int) -> None:
    """Raise ValueError unless the guidance scale and the bound of a pack are valid."""
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ValueError(f"cfg_scale must be finite and >= 0, got {cfg_scale}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")


def truncate_context(
    config: ModelConfig, context: Sequence[int], continuation: Sequence[int], *, append_eos: bool = False, keep: int = 0
) -> list[int]:
    """Return the end of `context` that fits max_position_embeddings together with the continuation (and eos).

    Args:
        config: Gives max_position_embeddings.
        context: Token ids before the continuation.
        continuation: Token ids to score.
        append_eos: Keep room for an eos token.
        keep: so many of the first tokens stay before that end, such as a bos, where they fit.

    Raises:
        ValueError: the continuation alone is too long.
    """
    room = config.max_position_embeddings - len(continuation) - append_eos
    if room < 0:
        raise ValueError(
            f"continuation has {len(continuation)} tokens{' and an eos' if append_eos else ''}, {-room} over the "
            f"model's max_position_embeddings of {config.max_position_embeddings}, even without a context"
        )
    return keep_end(context, room, keep)


def keep_end(tokens: Sequence[int], room: int, keep: int = 0) -> list[int]:
    """Return the last `room` tokens.

    Of a longer text, the first `keep` tokens of the result are the text's own first ones, where they fit.
    """
    if len(tokens) <= room:
        return list(tokens)
    first = list(tokens[:keep]) if keep <= room else []
    return first + list(tokens[len(tokens) - room + len(first) :])


# ------------------------------------------------------------------------------------------------------------- packs


def hidden_states(
    model: MaskedDiffusionModel,
    tokens: Tensor,
    rows: Tensor,
    layout: Layout,
    cfg_scale: float,
    first: FirstProjection | None = None,
) -> Tensor:
    """Return the hidden states [N, C] of ascending `rows`.

    With guidance `tokens` are twice as many, and the hidden states are those of `guide`.
    """
    cu_seqlens, position_ids, plan = layout
    selected_rows = torch.cat([rows, rows + len(tokens) // 2]) if cfg_scale else rows
    hidden = model(tokens, cu_seqlens, position_ids=position_ids, plan=plan, rows=selected_rows, first=first)
    if not cfg_scale:
        return hidden
    conditional, unconditional = hidden.chunk(2)
    return guide(conditional, unconditional, cfg_scale)


def without_context(sequence: NDArray[np.int64], context_length: int, mask_id: int) -> NDArray[np.int64]:
    """Return the sequence with its context masked."""
    sequence = sequence.copy()
    sequence[:context_length] = mask_id
    return sequence


def negative_log_likelihood(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each row's target, float32 [N]."""
    every = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
    ones = torch.ones(len(hidden), device=hidden.device)
    return linear_masked_cross_entropy(hidden, weight, targets, ones, rows=every, return_nll=True)[1]


def lay_out(config: ModelConfig, sizes: NDArray[np.int64], device: torch.device) -> Layout:
    """Return cu_seqlens, position ids and attention plan of sequences of these lengths."""
    cu_seqlens = torch.from_numpy(starts_of(sizes).astype(np.int32)).to(device)
    position_ids = torch.from_numpy(ranges(np.zeros_like(sizes), sizes)).to(device)
    plan = attention_plan(
        cu_seqlens,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_size,
        total_q=len(position_ids),
    )
    return cu_seqlens, position_ids, plan


def starts_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [S + 1], where parts of these lengths begin, end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start, start + 1, .. for each (start, length), end to end."""
    return np.arange(lengths.sum()) + np.repeat(starts - starts_of(lengths)[:-1], lengths)


def progress_bar(total: int, progress: bool) -> tqdm:
    """Return a progress bar of `total` continuations, shown if `progress` and on a terminal."""
    return tqdm(total=total, unit=" continuations", disable=not shows(progress))
