"""Confidence score (Eq. 2) and greedy check: continuations are un-masked token by token, many in a pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from illada.model import MaskedDiffusionModel
from illada.ops import TokenSample, linear_sample_tokens, remask
from illada.score.items import (
    MAX_TOKENS,
    Item,
    check_options,
    hidden_states,
    lay_out,
    make_items,
    negative_log_likelihood,
    progress_bar,
    ranges,
    starts_of,
    without_context,
)

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class ConfidenceScore:
    """Confidence score (Eq. 2) of one continuation.

    score: sum of log p over its tokens, each at the step that revealed it, in nats; NaN where the model gives NaN.
    forwards: number of forward passes for this continuation, one per token.
    """

    score: float
    forwards: int


@torch.inference_mode()
def confidence_score(
    model: MaskedDiffusionModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    append_eos: bool = False,
    cfg_scale: float = 0.0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[ConfidenceScore]:
    """Compute the confidence score of each continuation after its context (Eq. 2 of the iLLaDA paper).

        i_k = argmax_{i still masked} log p(y_i | x, y_revealed),   S = sum_k log p(y_{i_k} | x, y_revealed)

    The score ranks the candidates of a question. It is not a likelihood, because the order of revealing depends on the
    answer.

    Args:
        model: The model; its device is used. Training mode changes nothing, because there is no dropout.
        contexts: P lists of token ids, also empty ones; the candidates of one question repeat its context. Masks among
            them stay masks: they are neither scored nor revealed.
        continuations: P lists of token ids in [0, V), without masks; an empty one scores 0.
        append_eos: Show the eos token to the model after the continuation (published as `padd_eos`).
        cfg_scale: Strength w >= 0 of unsupervised classifier-free guidance: logits = un + (w + 1) (cond - un), with
            the context masked in `un`.
        max_tokens: Most tokens of a pack; a longer sequence has its own pack. It bounds memory and does not change
            scores beyond rounding.
        progress: Show a bar on a terminal.

    Returns:
        P ConfidenceScores, in order. Ties go to the first position.

    Raises:
        ValueError, TypeError: Ids out of range, pairs longer than max_position_embeddings (see `truncate_context`), a
            mask among the tokens to score, or bad options; the message names the argument.
    """
    items = make_items(model.config, contexts, continuations, append_eos)
    check_options(cfg_scale, max_tokens)
    scores = torch.zeros(len(contexts), dtype=torch.float64, device=model.device)
    with progress_bar(len(contexts), progress) as bar:
        bar.update(len(contexts) - len(items))
        for pack in _packs(items, max_tokens, guided=cfg_scale > 0):
            canvas = _Canvas(model, pack, cfg_scale)
            while canvas.items:
                nll = negative_log_likelihood(canvas.hidden(), model.head_weight, canvas.targets)
                scores.index_add_(0, canvas.indices, nll[canvas.reveal(-nll)].double())
                left = [i for i, item in enumerate(canvas.items) if item.length > canvas.step]
                bar.update(len(canvas.items) - len(left))
                canvas.keep(left)
    lengths = [len(continuation) for continuation in continuations]
    return [ConfidenceScore(0.0 - nll, n) for nll, n in zip(scores.tolist(), lengths, strict=True)]


@torch.inference_mode()
def is_greedy(
    model: MaskedDiffusionModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    append_eos: bool = False,
    cfg_scale: float = 0.0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[bool]:
    """Check whether greedy un-masking generates exactly each continuation.

    The canvas starts with as many masks as the continuation has tokens. Each step predicts all masks and commits the
    most confident prediction, which must be the true token there. A continuation stops at its first wrong token.

    Args:
        model: As in `confidence_score`.
        contexts: As in `confidence_score`.
        continuations: As in `confidence_score`.
        append_eos: As in `confidence_score`.
        cfg_scale: As in `confidence_score`.
        max_tokens: As in `confidence_score`.
        progress: As in `confidence_score`.

    Returns:
        P booleans, in order; an empty continuation is greedy.

    Raises:
        ValueError, TypeError: As `confidence_score`.
    """
    items = make_items(model.config, contexts, continuations, append_eos)
    check_options(cfg_scale, max_tokens)
    greedy = [True] * len(contexts)
    with progress_bar(len(contexts), progress) as bar:
        bar.update(len(contexts) - len(items))
        for pack in _packs(items, max_tokens, guided=cfg_scale > 0):
            canvas = _Canvas(model, pack, cfg_scale)
            while canvas.items:
                sample = linear_sample_tokens(canvas.hidden(), model.head_weight)
                right = (sample.token == canvas.targets) & (sample.confidence > -torch.inf)
                # The true token is written even where another was predicted, because that sequence is then dropped.
                kept = right[canvas.reveal(sample.confidence)].tolist()
                left = [i for i, item in enumerate(canvas.items) if kept[i] and item.length > canvas.step]
                for item, right_so_far in zip(canvas.items, kept, strict=True):
                    greedy[item.index] = right_so_far
                bar.update(len(canvas.items) - len(left))
                canvas.keep(left)
    return greedy


# -------------------------------------------------------------------------------------------------- revealing in packs


class _Canvas:
    """Canvas of a pack's items, which reveals one token of each item per step until no mask is left.

    Sequences lie end to end in `tokens`. With guidance, a copy of all of them with masked contexts follows. The host
    knows how many masks each item has left; only the device knows which, so the host never waits for it. A step is
    `hidden`, `reveal`, `keep`. The first layer's results are kept, and updated only for the revealed tokens.
    """

    def __init__(self, model: MaskedDiffusionModel, items: list[Item], cfg_scale: float) -> None:
        self.model, self.items, self.cfg_scale = model, items, cfg_scale
        self.device = model.device
        self.step = 0
        self.sizes = np.array([item.size for item in items])
        lengths = np.array([item.length for item in items])
        offsets = np.array([len(item.context) for item in items])
        self.cu_rows = self._put(starts_of(lengths).astype(np.int32))
        self.targets = self._put(np.concatenate([item.continuation for item in items]))
        self.indices = self._put(np.array([item.index for item in items]))

        # Sequences whose continuations are all masks are equal where context and length are equal.
        unique: dict[tuple[bytes, int], int] = {}
        which = np.array([unique.setdefault((item.context.tobytes(), item.length), len(unique)) for item in items])
        firsts = [items[i] for i in np.unique(which, return_index=True)[1]]
        first_sizes = np.array([item.size for item in firsts])
        self._lay_out(first_sizes)
        self.tokens = self._put(self._all_masked(firsts))
        self._first_layer = model.first_layer(self.tokens, self._position_ids)
        self._sources: Tensor | None = None  # rows of _first_layer for `tokens`; None: up to date
        self.rows = self._put(ranges(starts_of(self.sizes)[:-1] + offsets, lengths).astype(np.int32))
        self._shared = len(firsts) < len(items)
        if self._shared:
            self._starts = starts_of(first_sizes)[which]
            rows, inverse = np.unique(ranges(self._starts + offsets, lengths), return_inverse=True)
            self._first_rows, self._inverse = self._put(rows.astype(np.int32)), self._put(inverse)

    def hidden(self) -> Tensor:
        """Return hidden states [N, C] of the N remaining masks, item by item, ascending, as input of the head."""
        rows = self._first_rows if self._shared else self.rows
        layout = (self._cu_seqlens, self._position_ids, self._plan)
        hidden = hidden_states(self.model, self.tokens, rows, layout, self.cfg_scale, self._first_layer)
        return hidden[self._inverse] if self._shared else hidden

    def reveal(self, confidence: Tensor) -> Tensor:
        """Write each item's true token where `confidence` [N] is largest; return its row of N, int64 [S]."""
        if self._shared:  # from here on items share no sequences
            self._shared = False
            self._sources = self._with_twins(self._put(ranges(self._starts, self.sizes)))
            self.tokens = self.tokens[self._sources]
        # remask never commits -inf and NaN, but each item must reveal a token: make them the lowest finite value.
        finite = confidence.float().nan_to_num(nan=_LOWEST, neginf=_LOWEST)
        mask_id = self.model.config.mask_token_id
        sample = TokenSample(self.targets, finite, finite)
        remask(self.tokens, self.rows, self.cu_rows, sample, quota=1, mask_id=mask_id)
        # One row of each item is revealed, so a stable sort by "still masked" puts these first, in the items' order.
        order = (self.tokens[self.rows] == mask_id).to(torch.uint8).argsort(stable=True)
        chosen, rest = order[: len(self.items)], order[len(self.items) :]
        self._revealed = self.rows[chosen]
        if self.cfg_scale:
            self.tokens[self._revealed + len(self.tokens) // 2] = self.targets[chosen]
        self.rows, self.targets = self.rows[rest], self.targets[rest]
        self.cu_rows = self.cu_rows - torch.arange(len(self.cu_rows), dtype=torch.int32, device=self.device)
        self.step += 1
        return chosen

    def keep(self, left: list[int]) -> None:
        """Keep only these items, given by their ascending places in `items`."""
        if len(left) < len(self.items):
            self._drop_others(left)
        if not self.items:
            return
        if self._sources is not None:
            self._first_layer, self._sources = self._first_layer.take(self._sources), None
            self._lay_out(self.sizes)
        revealed = self._with_twins(self._revealed.long())
        self._first_layer.put(revealed, self.model.first_layer(self.tokens[revealed], self._position_ids[revealed]))

    def _drop_others(self, left: list[int]) -> None:
        starts, counts = starts_of(self.sizes)[:-1], np.array([item.length - self.step for item in self.items])
        row_starts = starts_of(counts)[:-1]
        index = self._with_twins(self._put(ranges(starts[left], self.sizes[left])))
        self.tokens = self.tokens[index]
        self._sources = index if self._sources is None else self._sources[index]
        moved = (starts_of(self.sizes[left])[:-1] - starts[left]).astype(np.int32)
        self._revealed = self._revealed[self._put(np.array(left, dtype=np.int64))] + self._put(moved)
        rows = self._put(ranges(row_starts[left], counts[left]))
        self.rows = self.rows[rows] + self._put(np.repeat(moved, counts[left]))
        self.targets = self.targets[rows]
        self.cu_rows = self._put(starts_of(counts[left]).astype(np.int32))
        self.items, self.sizes = [self.items[i] for i in left], self.sizes[left]
        self.indices = self._put(np.array([item.index for item in self.items], dtype=np.int64))

    def _all_masked(self, items: list[Item]) -> NDArray[np.int64]:
        mask_id = self.model.config.mask_token_id
        sequences = [item.sequence(mask_id) for item in items]
        if self.cfg_scale:
            sequences += [without_context(s, len(i.context), mask_id) for s, i in zip(sequences, items, strict=True)]
        return np.concatenate(sequences)

    def _with_twins(self, index: Tensor) -> Tensor:
        """Return places in `tokens`, int64; with guidance followed by those in the second half."""
        return torch.cat([index, index + len(self.tokens) // 2]) if self.cfg_scale else index

    def _lay_out(self, sizes: NDArray[np.int64]) -> None:
        """Compute what depends only on the sequences' lengths; it is valid until an item is dropped."""
        sizes = np.concatenate([sizes, sizes]) if self.cfg_scale else sizes
        self._cu_seqlens, self._position_ids, self._plan = lay_out(self.model.config, sizes, self.device)

    def _put(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _packs(items: list[Item], max_tokens: int, guided: bool) -> Iterator[list[Item]]:
    """Yield packs of similar lengths, longest continuations first, so that those that end first are last in a pack."""
    pack: list[Item] = []
    total = 0
    for item in sorted(items, key=lambda i: (-i.length, -i.size, i.context.tobytes(), i.index)):
        cost = item.size * (2 if guided else 1)
        if item.length == 1 and pack and pack[-1].length == 1 and np.array_equal(pack[-1].context, item.context):
            cost = 0  # it is revealed in one step, so it shares the sequence
        if pack and total + cost > max_tokens:
            yield pack
            pack, total = [], 0
            cost = item.size * (2 if guided else 1)
        pack.append(item)
        total += cost
    if pack:
        yield pack
