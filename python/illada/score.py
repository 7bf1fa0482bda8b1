"""Scoring given continuations: Eq. 2 of the iLLaDA paper, the Monte Carlo likelihood bound, and the greedy check.

    confidence_score         Eq. 2: reveal the true tokens one by one, the most probable first, and add up their log
                             probabilities at the step each was revealed (`get_loglikelihood_confidence`)
    monte_carlo_likelihood   the evidence bound over random masks of the continuation (`get_loglikelihood_mc`)
    is_greedy                would un-masking the surest token a step produce it? (`suffix_greedy_prediction`)

In parentheses the functions of the authors' evaluation that give the same numbers. All pairs of a call share packs of
up to `max_tokens` tokens, only rows that are still masked meet the head, and sequences that look the same are run
once: before anything is revealed, candidates of one length and one context do.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel
from illada.ops import (
    AttentionPlan,
    TokenSample,
    attention_plan,
    linear_masked_cross_entropy,
    linear_sample_tokens,
    remask,
)
from illada.ops.philox import philox4x32

#: Packed tokens of one forward pass, both sequences of guidance counted.
MAX_TOKENS = 8192

# Philox stream tags (counter word 3); 1 to 6 belong to the forward process of training, 16 and above to the sampler.
_COUNT_STREAM, _MASK_STREAM = 7, 8

_Layout = tuple[Tensor, Tensor, AttentionPlan]  # cu_seqlens, position_ids, plan

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class ConfidenceScore:
    """Eq. 2 of one continuation.

    score: sum of log p over its tokens, each at the step it was revealed, in nats; NaN where the model gives NaN.
    forwards: forward passes it took part in, one for each token.
    """

    score: float
    forwards: int


@dataclass(frozen=True)
class _Item:
    """One pair. `size` tokens meet the model: context, continuation and, where asked for, the eos."""

    index: int
    context: NDArray[np.int64]
    continuation: NDArray[np.int64]
    suffix: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.continuation)

    @property
    def size(self) -> int:
        return len(self.context) + len(self.continuation) + len(self.suffix)

    def sequence(self, mask_id: int, masked: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """What the model sees with the `masked` tokens of the continuation (default all) hidden."""
        shown = np.where(True if masked is None else masked, mask_id, self.continuation)
        return np.concatenate([self.context, shown, np.array(self.suffix, dtype=np.int64)])


# --------------------------------------------------------------------------------------------------- public functions


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
    """The confidence score of each continuation after its context (Eq. 2 of the iLLaDA paper).

        i_k = argmax_{i still masked} log p(y_i | x, y_revealed),   S = sum_k log p(y_{i_k} | x, y_revealed)

    A score to rank the candidates of a question by, not a likelihood: the order of revealing looks at the answer.

    Args:
        model: its device is used; training mode changes nothing, there is no dropout.
        contexts: P lists of token ids, also empty ones; the candidates of one question repeat its context. Masks among
            them stay what they are: they are neither scored nor revealed.
        continuations: P lists of token ids in [0, V), without masks; an empty one scores 0.
        append_eos: the model also sees the eos token after the continuation (published as `padd_eos`).
        cfg_scale: of unsupervised classifier-free guidance, w >= 0: logits = un + (w + 1) (cond - un), with the
            context masked in `un`.
        max_tokens: most tokens of a pack; a longer sequence has a pack of its own. It bounds memory and does not change
            scores beyond rounding.
        progress: a bar on a terminal.

    Returns:
        P results, in order. Ties go to the first position.

    Raises:
        ValueError, TypeError: naming the argument: ids out of range, pairs longer than max_position_embeddings (see
            `truncate_context`), a mask among the tokens to score, bad options.
    """
    items = _items(model.config, contexts, continuations, append_eos)
    _check_options(cfg_scale, max_tokens)
    scores = torch.zeros(len(contexts), dtype=torch.float64, device=model.head_weight.device)
    with _bar(len(contexts), progress) as bar:
        bar.update(len(contexts) - len(items))
        for pack in _packs(items, max_tokens, guided=cfg_scale > 0):
            canvas = _Canvas(model, pack, cfg_scale)
            while canvas.items:
                nll = _nll(canvas.hidden(), model.head_weight, canvas.targets)
                scores.index_add_(0, canvas.indices, nll[canvas.reveal(-nll)].double())
                left = [i for i, item in enumerate(canvas.items) if item.length > canvas.step]
                bar.update(len(canvas.items) - len(left))
                canvas.keep(left)
    lengths = [len(continuation) for continuation in continuations]
    return [ConfidenceScore(0.0 - nll, n) for nll, n in zip(scores.tolist(), lengths, strict=True)]


@torch.inference_mode()
def monte_carlo_likelihood(
    model: MaskedDiffusionModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    num_samples: int = 128,
    stratum: int = 16,
    append_eos: bool = False,
    cfg_scale: float = 0.0,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[float]:
    """LLaDA's Monte Carlo estimate of a lower bound on the log-likelihood of each continuation, in nats.

        -1/n sum_s L / x_s sum_{i masked in s} CE(y_i),   x_s of the L tokens masked in sample s, which ones at random

    Args:
        num_samples: n (published as `mc_num`); one is enough for continuations of one token.
        stratum: samples over which the mask counts x are spread evenly (published as `batch_size`); see
            `monte_carlo_masks`.
        seed: of the masks, which are a function of (seed, context, continuation, sample) alone: not of the other pairs,
            their order or the packing.
        Others as in `confidence_score`.

    Returns:
        P estimates, in order. Samples that mask the same tokens are run once, so that short continuations cost at most
        2^L - 1 sequences.

    Raises:
        As `confidence_score`; ValueError for a num_samples that is not a multiple of stratum.
    """
    items = _items(model.config, contexts, continuations, append_eos)
    _check_options(cfg_scale, max_tokens)
    _check_samples(num_samples, stratum)

    def drawn() -> Iterator[tuple[_Item, NDArray[np.bool_], NDArray[np.float64]]]:
        # Candidates that look the same once masked stand together, and so do sequences of one length.
        with _bar(len(contexts), progress) as bar:
            bar.update(len(contexts) - len(items))
            for item in sorted(items, key=lambda i: (-i.size, -i.length, i.context.tobytes(), i.index)):
                masks = monte_carlo_masks(
                    item.context.tolist(),
                    item.continuation.tolist(),
                    num_samples=num_samples,
                    stratum=stratum,
                    seed=seed,
                )
                patterns, counts = np.unique(masks, axis=0, return_counts=True)
                yield item, patterns, counts / num_samples
                bar.update()

    bounds = _estimate(model, drawn(), len(contexts), cfg_scale, max_tokens)
    return [0.0 - loss for loss in bounds]


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
    """Whether greedy un-masking of as many masks as the continuation has tokens gives just these tokens.

    Each step predicts all masks and keeps the surest prediction, which has to be the true token there. A continuation
    leaves at its first wrong token. An empty one is greedy. Arguments and errors as in `confidence_score`.
    """
    items = _items(model.config, contexts, continuations, append_eos)
    _check_options(cfg_scale, max_tokens)
    greedy = [True] * len(contexts)
    with _bar(len(contexts), progress) as bar:
        bar.update(len(contexts) - len(items))
        for pack in _packs(items, max_tokens, guided=cfg_scale > 0):
            canvas = _Canvas(model, pack, cfg_scale)
            while canvas.items:
                sample = linear_sample_tokens(canvas.hidden(), model.head_weight)
                right = (sample.token == canvas.targets) & (sample.confidence > -torch.inf)
                # The true token is written even where another was predicted: that sequence is about to leave.
                kept = right[canvas.reveal(sample.confidence)].tolist()
                left = [i for i, item in enumerate(canvas.items) if kept[i] and item.length > canvas.step]
                for item, right_so_far in zip(canvas.items, kept, strict=True):
                    greedy[item.index] = right_so_far
                bar.update(len(canvas.items) - len(left))
                canvas.keep(left)
    return greedy


def truncate_context(
    config: ModelConfig, context: Sequence[int], continuation: Sequence[int], *, append_eos: bool = False
) -> list[int]:
    """The end of `context` that fits the model's max_position_embeddings together with the continuation (and eos).

    Raises:
        ValueError: the continuation alone is too long.
    """
    room = config.max_position_embeddings - len(continuation) - append_eos
    if room < 0:
        raise ValueError(
            f"continuation has {len(continuation)} tokens{' and an eos' if append_eos else ''}, {-room} over the "
            f"model's max_position_embeddings of {config.max_position_embeddings}, even without a context"
        )
    return list(context[max(0, len(context) - room) :])


def monte_carlo_masks(
    context: Sequence[int], continuation: Sequence[int], *, num_samples: int = 128, stratum: int = 16, seed: int = 0
) -> NDArray[np.bool_]:
    """Which tokens of a continuation each sample of `monte_carlo_likelihood` masks: bool [num_samples, L].

    As published, for each stratum of b = min(stratum, num_samples) samples: k uniform on 1 .. L, counts
    x_i = (round(k + i L / b) - 1) mod L + 1, and in each sample x_i tokens chosen uniformly. Philox4x32-10 with a hash
    of (seed, context, continuation) as key.

    Raises:
        ValueError: num_samples is not a multiple of stratum (and not smaller), an empty continuation.
    """
    _check_samples(num_samples, stratum)
    length = len(continuation)
    if length == 0:
        raise ValueError("continuation is empty; there is nothing to mask")
    parts = ([seed & (2**64 - 1), len(context)], context, continuation)
    content = b"".join(np.array(part, dtype=np.uint64).tobytes() for part in parts)
    key = np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), dtype="<u4")

    def words(stream: int, draws: int, count: int) -> NDArray[np.uint32]:
        counter = np.zeros((draws, -(-count // 4), 4), dtype=np.uint32)
        counter[..., 0] = np.arange(counter.shape[1])
        counter[..., 1] = np.arange(draws)[:, None]
        counter[..., 3] = stream
        return philox4x32(counter, key).reshape(draws, -1)[:, :count]

    size = min(stratum, num_samples)
    first = 1 + (words(_COUNT_STREAM, num_samples // size, 1)[:, 0].astype(np.uint64) * length >> 32).astype(np.int64)
    # torch's float32 linspace and its rounding of halves to even, as published: other roundings move some counts by 1.
    spread = [torch.linspace(k, k + (size - 1) * (length / size), size, dtype=torch.float32) for k in first.tolist()]
    counts = (torch.cat(spread).round().long().numpy() - 1) % length + 1
    ranks = words(_MASK_STREAM, num_samples, length).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return ranks < counts[:, None]


# -------------------------------------------------------------------------------------------------- revealing in packs


class _Canvas:
    """The items of a pack on their way from all masks to all tokens, one token of each item a step.

    Sequences lie end to end in `tokens`; with guidance a second time behind all of them, contexts masked. How many
    masks each item has left is known on the host, which of them is known on the device alone, so nothing waits for it.
    """

    def __init__(self, model: MaskedDiffusionModel, items: list[_Item], cfg_scale: float) -> None:
        self.model, self.items, self.cfg_scale = model, items, cfg_scale
        self.device = model.head_weight.device
        self.step = 0
        self.sizes = np.array([item.size for item in items])
        lengths = np.array([item.length for item in items])
        offsets = np.array([len(item.context) for item in items])
        self.cu_rows = self._put(_starts(lengths).astype(np.int32))
        self.targets = self._put(np.concatenate([item.continuation for item in items]))
        self.indices = self._put(np.array([item.index for item in items]))

        # Sequences that are still all masks are equal where context and length are.
        unique: dict[tuple[bytes, int], int] = {}
        which = np.array([unique.setdefault((item.context.tobytes(), item.length), len(unique)) for item in items])
        firsts = [items[i] for i in np.unique(which, return_index=True)[1]]
        self._lay_out(np.array([item.size for item in firsts]))
        self.tokens = self._put(self._all_masked(firsts))
        self.rows = self._put(_ranges(_starts(self.sizes)[:-1] + offsets, lengths).astype(np.int32))
        self._shared = len(firsts) < len(items)
        if self._shared:
            starts = _starts(np.array([item.size for item in firsts]))[:-1]
            rows, inverse = np.unique(_ranges(starts[which] + offsets, lengths), return_inverse=True)
            self._first_rows, self._inverse = self._put(rows.astype(np.int32)), self._put(inverse)

    def hidden(self) -> Tensor:
        """[N, C]: what, times the head, gives the logits of the N masks that are left; item by item, ascending."""
        rows = self._first_rows if self._shared else self.rows
        layout = (self._cu_seqlens, self._position_ids, self._plan)
        hidden = _hidden(self.model, self.tokens, rows, layout, self.cfg_scale)
        return hidden[self._inverse] if self._shared else hidden

    def reveal(self, confidence: Tensor) -> Tensor:
        """Write each item's true token where `confidence` [N] is largest; int64 [S], which of the N rows it was."""
        if self._shared:  # from here on every item has a sequence of its own
            self._shared = False
            self._lay_out(self.sizes)
            self.tokens = self._put(self._all_masked(self.items))
        # -inf and NaN are never committed, but each item has to go on: they come last instead.
        finite = confidence.float().nan_to_num(nan=_LOWEST, neginf=_LOWEST)
        mask_id = self.model.config.mask_token_id
        sample = TokenSample(self.targets, finite, finite)
        remask(self.tokens, self.rows, self.cu_rows, sample, quota=1, mask_id=mask_id)
        # One row of each item is revealed, so a stable sort by "still masked" puts those first, in the items' order.
        order = (self.tokens[self.rows] == mask_id).to(torch.uint8).argsort(stable=True)
        chosen, rest = order[: len(self.items)], order[len(self.items) :]
        if self.cfg_scale:
            self.tokens[self.rows[chosen] + len(self.tokens) // 2] = self.targets[chosen]
        self.rows, self.targets = self.rows[rest], self.targets[rest]
        self.cu_rows = self.cu_rows - torch.arange(len(self.cu_rows), dtype=torch.int32, device=self.device)
        self.step += 1
        return chosen

    def keep(self, left: list[int]) -> None:
        """Go on with these items only, given by their ascending places in `items`."""
        if len(left) == len(self.items):
            return
        starts, counts = _starts(self.sizes)[:-1], np.array([item.length - self.step for item in self.items])
        row_starts = _starts(counts)[:-1]
        index = self._put(_ranges(starts[left], self.sizes[left]))
        tokens = self.tokens[index]
        self.tokens = torch.cat([tokens, self.tokens[index + len(self.tokens) // 2]]) if self.cfg_scale else tokens
        moved = _starts(self.sizes[left])[:-1] - starts[left]
        rows = self._put(_ranges(row_starts[left], counts[left]))
        self.rows = self.rows[rows] + self._put(np.repeat(moved, counts[left]).astype(np.int32))
        self.targets = self.targets[rows]
        self.cu_rows = self._put(_starts(counts[left]).astype(np.int32))
        self.items, self.sizes = [self.items[i] for i in left], self.sizes[left]
        self.indices = self._put(np.array([item.index for item in self.items], dtype=np.int64))
        if self.items:
            self._lay_out(self.sizes)

    def _all_masked(self, items: list[_Item]) -> NDArray[np.int64]:
        mask_id = self.model.config.mask_token_id
        sequences = [item.sequence(mask_id) for item in items]
        if self.cfg_scale:
            sequences += [_unconditional(s, len(i.context), mask_id) for s, i in zip(sequences, items, strict=True)]
        return np.concatenate(sequences)

    def _lay_out(self, sizes: NDArray[np.int64]) -> None:
        """What depends on the sequences' lengths alone, made once for all steps until one of them leaves."""
        sizes = np.concatenate([sizes, sizes]) if self.cfg_scale else sizes
        self._cu_seqlens, self._position_ids, self._plan = _layout(self.model.config, sizes, self.device)

    def _put(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _packs(items: list[_Item], max_tokens: int, guided: bool) -> Iterator[list[_Item]]:
    """Items of like lengths together, longest continuations first: those that end first are last in a pack."""
    pack: list[_Item] = []
    total = 0
    for item in sorted(items, key=lambda i: (-i.length, -i.size, i.context.tobytes(), i.index)):
        cost = item.size * (2 if guided else 1)
        if item.length == 1 and pack and pack[-1].length == 1 and np.array_equal(pack[-1].context, item.context):
            cost = 0  # only ever all masks, so it shares the sequence
        if pack and total + cost > max_tokens:
            yield pack
            pack, total = [], 0
            cost = item.size * (2 if guided else 1)
        pack.append(item)
        total += cost
    if pack:
        yield pack


# -------------------------------------------------------------------------------------------------- estimating in packs


def _estimate(
    model: MaskedDiffusionModel,
    weighted: Iterable[tuple[_Item, NDArray[np.bool_], NDArray[np.float64]]],
    count: int,
    cfg_scale: float,
    max_tokens: int,
) -> list[float]:
    """For each of `count` items sum_s weight_s L / x_s sum_{i masked in s} CE_i, given its masks [P, L] and weights."""
    config, device = model.config, model.head_weight.device
    losses = torch.zeros(count, dtype=torch.float64, device=device)
    sequences: dict[bytes, int] = {}  # the pack's: bytes of the tokens, to where they start
    tokens: list[NDArray[np.int64]] = []
    unconditional: list[NDArray[np.int64]] = []
    rows: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float64]] = []
    owners: list[NDArray[np.int64]] = []
    total = 0

    def run() -> None:
        nonlocal total
        packed = torch.from_numpy(np.concatenate(tokens + unconditional)).to(device)
        sizes = np.array([len(sequence) for sequence in tokens + unconditional])
        at, inverse = np.unique(np.concatenate(rows), return_inverse=True)  # ascending; items may share sequences
        layout = _layout(config, sizes, device)
        hidden = _hidden(model, packed, torch.from_numpy(at.astype(np.int32)).to(device), layout, cfg_scale)
        shown = hidden[torch.from_numpy(inverse).to(device)]
        nll = _nll(shown, model.head_weight, torch.from_numpy(np.concatenate(targets)).to(device)).double()
        factor, owner = (torch.from_numpy(np.concatenate(part)).to(device) for part in (factors, owners))
        losses.index_add_(0, owner, nll * factor)
        for part in (sequences, tokens, unconditional, rows, targets, factors, owners):
            part.clear()
        total = 0

    for item, masks, weights in weighted:
        for masked, weight in zip(masks, weights, strict=True):
            sequence = item.sequence(config.mask_token_id, masked)
            key = sequence.tobytes()
            # Guidance masks the context, so the same tokens with another cut into context and continuation differ.
            key += len(item.context).to_bytes(8, "little") if cfg_scale else b""
            if key not in sequences:
                if tokens and (total + item.size) * (2 if cfg_scale else 1) > max_tokens:
                    run()
                sequences[key] = total
                tokens.append(sequence)
                if cfg_scale:
                    unconditional.append(_unconditional(sequence, len(item.context), config.mask_token_id))
                total += item.size
            where = np.flatnonzero(masked)
            rows.append(sequences[key] + len(item.context) + where)
            targets.append(item.continuation[where])
            factors.append(np.full(len(where), weight * item.length / len(where)))
            owners.append(np.full(len(where), item.index))
    if tokens:
        run()
    return losses.tolist()


# ------------------------------------------------------------------------------------------------------------ helpers


def _hidden(model: MaskedDiffusionModel, tokens: Tensor, rows: Tensor, layout: _Layout, cfg_scale: float) -> Tensor:
    """[N, C] of ascending `rows`. With guidance `tokens` are twice as many, and un + (w + 1) (cond - un) of the hidden
    states has the logits of the guided model: the head is linear, so it runs once."""
    cu_seqlens, position_ids, plan = layout
    wanted = torch.cat([rows, rows + len(tokens) // 2]) if cfg_scale else rows
    hidden = model(tokens, cu_seqlens, position_ids=position_ids, plan=plan, rows=wanted)
    if not cfg_scale:
        return hidden
    conditional, unconditional = hidden.float().chunk(2)
    return (unconditional + (cfg_scale + 1) * (conditional - unconditional)).to(hidden.dtype)


def _unconditional(sequence: NDArray[np.int64], context_length: int, mask_id: int) -> NDArray[np.int64]:
    """The sequence with its context masked."""
    sequence = sequence.copy()
    sequence[:context_length] = mask_id
    return sequence


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log p of each row's target, float32 [N]."""
    every = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
    ones = torch.ones(len(hidden), device=hidden.device)
    return linear_masked_cross_entropy(hidden, weight, targets, ones, rows=every, return_nll=True)[1]


def _layout(config: ModelConfig, sizes: NDArray[np.int64], device: torch.device) -> _Layout:
    """cu_seqlens, position ids and attention plan of sequences of these lengths."""
    cu_seqlens = torch.from_numpy(_starts(sizes).astype(np.int32)).to(device)
    position_ids = torch.from_numpy(_ranges(np.zeros_like(sizes), sizes)).to(device)
    plan = attention_plan(
        cu_seqlens,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_size,
        total_q=len(position_ids),
    )
    return cu_seqlens, position_ids, plan


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[S + 1]: where parts of these lengths begin, end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, .. for each (start, length), end to end."""
    return np.arange(lengths.sum()) + np.repeat(starts - _starts(lengths)[:-1], lengths)


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, unit=" continuations", disable=not (progress and sys.stderr.isatty()))


def _token_ids(name: str, tokens: Sequence[int]) -> NDArray[np.int64]:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be a list of token ids, got {type(tokens).__name__} {str(tokens)[:40]!r}")
    return array.astype(np.int64)


def _items(
    config: ModelConfig, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], append_eos: bool
) -> list[_Item]:
    """The pairs with something to score, checked."""
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
        item = _Item(i, context, continuation, suffix)
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


def _check_options(cfg_scale: float, max_tokens: int) -> None:
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ValueError(f"cfg_scale must be finite and >= 0, got {cfg_scale}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")


def _check_samples(num_samples: int, stratum: int) -> None:
    for name, value in (("num_samples", num_samples), ("stratum", stratum)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_samples > stratum and num_samples % stratum:
        below = num_samples // stratum * stratum
        raise ValueError(
            f"num_samples must be a multiple of stratum ({stratum}) or smaller than it, got {num_samples}; the nearest "
            f"are {below} and {below + stratum}"
        )
