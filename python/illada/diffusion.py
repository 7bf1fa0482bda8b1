"""The forward process: choose windows of tokens, split them, and mask some tokens.

Eq. 1 of the iLLaDA paper: L = -E[(1/t) sum_i 1[x_i = M] log p(x_i | x_t)], with t uniform for each packed sequence.
As in LLaDA's guidelines, p = (1 - eps) t + eps is the masking probability and 1 / p the token weight. The weights thus
stay finite. The sum is divided by the number of all tokens.

Everything here is a pure function of (seed, global sample index), without state or order of drawing. One integer
resumes the data exactly, on any number of ranks and for any micro-batch size.

Randomness: Philox4x32-10 with key = seed and counter = (block, index lo, index hi, stream); see `illada.philox`.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from illada.batch import Batch
from illada.config import DiffusionConfig
from illada.philox import Stream, to_uniform, uniforms, words

_VALIDATION_SEED = 0  # fixed, so that the bound is comparable between runs
_VALIDATION_EPS = 1e-3
_GOLDEN = 0.6180339887498949
_ROUND = 1 << 16  # draws in which each source has its exact share


# --------------------------------------------------------------------------------------------------------- randomness


def permutation(
    positions: NDArray[np.int64], size: int, seed: int, epoch: int, stream: Stream = Stream.WINDOW_ORDER
) -> NDArray[np.int64]:
    """Apply the pseudo-random permutation of this (seed, stream, epoch) to `positions` in [0, size).

    The permutation is a four-round Feistel network over Philox on the next power of four. It is applied again until the
    result is below size. It needs no table, so the order of a corpus of any size costs no memory and no start-up time.

    Args:
        positions: int64 [n], in [0, size).
        size: Number of positions, at least 1.
        seed: Key of the random numbers.
        epoch: Number of the epoch; each has another permutation.
        stream: Purpose of the permutation; each has others.

    Returns:
        int64 [n], in [0, size).

    Raises:
        ValueError: size is below 1, or a position is out of range.
    """
    if size < 1:
        raise ValueError(f"permutation: size must be at least 1, got {size}")
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.int64((1 << half) - 1)
    values = np.asarray(positions, dtype=np.int64).copy()
    if len(values) and not (0 <= values.min() and values.max() < size):
        raise ValueError(f"permutation: positions must be in [0, {size})")
    pending = np.ones(len(values), dtype=bool)
    while pending.any():
        left, right = values[pending] >> half, values[pending] & mask
        for feistel_round in range(4):
            word = words(seed, stream, right | np.int64(epoch << 34), 4)[:, feistel_round].astype(np.int64)
            left, right = right, left ^ (word & mask)
        values[pending] = (left << half) | right
        pending[pending] = values[pending] >= size
    return values


def window_of_sample(
    samples: NDArray[np.int64], num_windows: int, seed: int, config: DiffusionConfig
) -> NDArray[np.int64]:
    """Return the window that each global sample index trains on.

    Each epoch uses every window once, in a different order. With `config.complementary` samples 2k and 2k + 1 share
    their window, so an epoch has two samples per window.

    Args:
        samples: int64 [B], global sample indices, from 0 at the start of training.
        num_windows: Number of windows in the corpus, at least 1.
        seed: Seed of the order.
        config: Options of the forward process; only `complementary` is used.

    Returns:
        int64 [B], window indices in [0, num_windows).
    """
    draws = np.asarray(samples, dtype=np.int64) // (2 if config.complementary else 1)
    windows = np.empty_like(draws)
    for epoch in np.unique(draws // num_windows):
        mine = draws // num_windows == epoch
        windows[mine] = permutation(draws[mine] % num_windows, num_windows, seed, int(epoch))
    return windows


def shares(windows: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many of `_ROUND` draws each source has: in proportion to weight times windows, and at least one.

    Args:
        windows: Number of windows of each source.
        weights: How much more often than by its windows each source is drawn; 0: never.

    Returns:
        A number for each source, 0 where its weight or its number of windows is 0; their sum is `_ROUND`.

    Raises:
        ValueError: No source has both, or there are more than `_ROUND` sources.
    """
    return list(_shares(tuple(windows), tuple(weights)))


@functools.lru_cache(maxsize=16)
def _shares(windows: tuple[int, ...], weights: tuple[float, ...]) -> tuple[int, ...]:
    parts = [Fraction(weight) * count for weight, count in zip(weights, windows, strict=True)]
    drawn = [i for i, part in enumerate(parts) if part]
    if not 0 < len(drawn) <= _ROUND:
        raise ValueError(f"shares: {len(drawn)} sources have a weight and a window, must be 1 to {_ROUND}")
    unit = _ROUND / sum(parts)
    found = [0] * len(parts)
    for i in drawn:
        found[i] = max(1, int(parts[i] * unit))
    missing = _ROUND - sum(found)
    # What rounding left, less than one for each, goes to those that it cost most.
    for i in sorted(drawn, key=lambda i: found[i] - parts[i] * unit)[: max(0, missing)]:
        found[i] += 1
    # What the smallest took beyond their part, the largest give.
    largest = [(-found[i], i) for i in drawn]
    heapq.heapify(largest)
    for _ in range(-missing):
        count, i = heapq.heappop(largest)
        found[i] = -count - 1
        heapq.heappush(largest, (-found[i], i))
    return tuple(found)


def window_of_weighted_sample(
    samples: NDArray[np.int64], windows: Sequence[int], weights: Sequence[float], seed: int, config: DiffusionConfig
) -> NDArray[np.int64]:
    """Return the window that each global sample index trains on, where sources have weights.

    Each round of 65,536 draws has the exact share of every source, spread evenly. The draws of a source use each of its
    windows once in an epoch of that source, in a different order in each. With equal weights it is the order of
    `window_of_sample`, in which sources do not matter.

    Args:
        samples: int64 [B], global sample indices, from 0 at the start of training.
        windows: Number of windows of each source; they are numbered through the sources in order.
        weights: How much more often than by its windows each source is drawn; 0: never.
        seed: Seed of the order.
        config: Options of the forward process; only `complementary` is used.

    Returns:
        int64 [B], window indices in [0, sum(windows)).

    Raises:
        ValueError: No source has a weight and a window.
    """
    different = {float(weight) for weight, count in zip(weights, windows, strict=True) if count}
    if len(different) == 1 and different != {0.0}:
        return window_of_sample(samples, sum(windows), seed, config)
    firsts = np.cumsum([0, *windows])
    draws = np.asarray(samples, dtype=np.int64) // (2 if config.complementary else 1)
    sources, numbers = _source_of_draw(draws, shares(windows, weights), seed)
    found = np.empty_like(draws)
    for source in np.unique(sources):
        size = windows[source]
        for epoch in np.unique(numbers[sources == source] // size):
            mine = (sources == source) & (numbers // size == epoch)
            key = int(epoch) * len(windows) + int(source)
            order = permutation(numbers[mine] % size, size, seed, key, Stream.SOURCE_WINDOW_ORDER)
            found[mine] = firsts[source] + order
    return found


def _source_of_draw(
    draws: NDArray[np.int64], of_round: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each draw, and how many draws before it had the same source, int64 [B] each.

    The place of a draw in its round, with its bits reversed and flipped by a key of (seed, round), is a rank below
    `_ROUND`, and each source has an interval of ranks. So draws that follow each other are spread over all ranks
    evenly. Earlier places are counted, not visited: those that agree with this one above bit j, and have 0 where it
    has 1, have every 2^(16 - j)-th rank.
    """
    bits = _ROUND.bit_length() - 1
    rounds, places = draws // _ROUND, draws % _ROUND
    flips = words(seed, Stream.SOURCE_ORDER, rounds, 1)[:, 0].astype(np.int64) % _ROUND
    ends = np.cumsum(of_round)
    starts = ends - of_round

    def reverse(values: NDArray[np.int64]) -> NDArray[np.int64]:
        out = np.zeros_like(values)
        for bit in range(bits):
            out |= (values >> bit & 1) << (bits - 1 - bit)
        return out

    sources = np.searchsorted(ends, reverse(places) ^ flips, side="right")
    numbers = rounds * np.array(of_round, dtype=np.int64)[sources]
    for j in range(bits):
        step = 1 << (bits - j)
        first = (reverse(places >> (j + 1) << (j + 1)) ^ flips) % step
        below = [np.clip(-((first - bound) // step), 0, 1 << j) for bound in (ends[sources], starts[sources])]
        numbers += np.where(places >> j & 1, below[0] - below[1], 0)
    return sources, numbers


# ---------------------------------------------------------------------------------------------------- forward process


def make_batch(
    windows: NDArray,
    samples: NDArray[np.int64],
    *,
    seed: int,
    mask_id: int,
    config: DiffusionConfig | None = None,
    eos_id: int | None = None,
    global_batch: int | None = None,
) -> Batch:
    """Split, mask and pack windows of tokens.

    Args:
        windows: Integers [B, L] with L > 0, the tokens of the samples.
        samples: int64 [B], their global sample indices. With the seed they decide all random choices.
        seed: Key of the random numbers.
        mask_id: The id of the mask token.
        config: Options of the forward process; default DiffusionConfig().
        eos_id: Last token of each document; needed by `isolate_documents`.
        global_batch: Samples of a global batch; needed by t_sampling = "low_discrepancy".

    Returns:
        Batch on the CPU with T = B L tokens.

    Raises:
        ValueError: Wrong shapes, or eos_id or global_batch is missing where the config needs it.
    """
    config = config or DiffusionConfig()
    windows = np.asarray(windows).astype(np.int64)
    samples = np.asarray(samples, dtype=np.int64)
    if windows.ndim != 2 or windows.shape[1] == 0 or len(samples) != len(windows):
        raise ValueError(
            f"make_batch: windows must have shape [B, L] with L > 0 and one sample index each, got "
            f"{list(windows.shape)} and {len(samples)} indices"
        )
    length = windows.shape[1]
    draws = samples // (2 if config.complementary else 1)

    split = uniforms(seed, Stream.SPLIT, draws, 2)
    cuts: list[list[int]] = []  # starts of the sequences of each window
    for b in range(len(windows)):
        cut = {0}
        if length > 1 and split[b, 0] < config.split_probability:
            cut.add(1 + int(split[b, 1] * (length - 1)))
        if config.isolate_documents:
            if eos_id is None:
                raise ValueError("make_batch: isolate_documents needs eos_id")
            cut.update(int(i) + 1 for i in np.flatnonzero(windows[b, :-1] == eos_id))
        cuts.append(sorted(cut))

    time = _times("make_batch", draws, max(len(c) for c in cuts) if cuts else 1, seed, config, global_batch)
    if config.t_limit < 1:
        time *= np.minimum(1, config.t_limit + (1 - config.t_limit) * samples / config.t_limit_windows)[:, None]
    mask_words = words(seed, Stream.MASK, draws, length)
    masked = np.zeros(windows.shape, dtype=bool)
    weights = np.zeros(windows.shape, dtype=np.float32)
    lengths: list[int] = []
    for b, starts in enumerate(cuts):
        for j, (start, end) in enumerate(zip(starts, [*starts[1:], length], strict=True)):
            part = slice(start, end)
            masked[b, part], weight = _mask(mask_words[b, part], time[b, j], config, bool(samples[b] & 1))
            weights[b, part] = np.where(masked[b, part], np.float32(weight), 0)
            lengths.append(end - start)
    return _pack(windows.reshape(-1), masked.reshape(-1), weights.reshape(-1), lengths, mask_id)


def make_validation_batch(
    windows: NDArray, indices: NDArray[np.int64], *, stratum: int, strata: int, mask_id: int
) -> Batch:
    """Mask whole windows at the fixed t = (stratum + 1/2) / strata, the same in every run.

    The mean over all strata of sum_i w_i CE_i / T estimates the bound of Eq. 1 by the midpoint rule in t.

    Args:
        windows: Integers [B, L], the tokens; each window is one sequence.
        indices: int64 [B], indices of the windows in the split; with the stratum they decide the masks.
        stratum: Which t, in [0, strata).
        strata: Number of values of t.
        mask_id: The id of the mask token.

    Returns:
        Batch on the CPU with T = B L tokens.

    Raises:
        ValueError: stratum is out of range.
    """
    windows = np.asarray(windows).astype(np.int64)
    masked, weight = draw_validation_masks(indices, windows.shape[1], stratum=stratum, strata=strata)
    weights = np.where(masked, weight[:, None], np.float32(0))
    lengths = [windows.shape[1]] * len(windows)
    return _pack(windows.reshape(-1), masked.reshape(-1), weights.reshape(-1), lengths, mask_id)


def draw_masks(
    samples: NDArray[np.int64],
    length: int,
    *,
    seed: int,
    config: DiffusionConfig | None = None,
    global_batch: int | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return the masks that `make_batch` draws for windows that it does not split.

    The masks of the first tokens do not depend on `length`.

    Args:
        samples: int64 [B], global sample indices.
        length: Tokens of a window.
        seed: Key of the random numbers.
        config: Options of the forward process; only `eps` and `t_sampling` are used. Default DiffusionConfig().
        global_batch: Samples of a global batch; needed by t_sampling = "low_discrepancy".

    Returns:
        Masks, bool [B, length], and the token weight of each window's masked tokens, float32 [B].

    Raises:
        ValueError: global_batch is missing, or the config has another option that changes the masks of such windows.
    """
    config = config or DiffusionConfig()
    if config.complementary or config.isolate_documents or config.mask_count != "bernoulli" or config.t_limit < 1:
        raise ValueError(f"draw_masks: config may set eps and t_sampling alone, got {config}")
    samples = np.asarray(samples, dtype=np.int64)
    t = _times("draw_masks", samples, 1, seed, config, global_batch)
    p = (1 - config.eps) * t + config.eps
    return uniforms(seed, Stream.MASK, samples, length) < p, (1 / p[:, 0]).astype(np.float32)


def draw_validation_masks(
    indices: NDArray[np.int64], length: int, *, stratum: int, strata: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return the masks of `make_validation_batch`, bool [B, length], and the token weight of each window, float32 [B].

    Raises:
        ValueError: stratum is not in [0, strata).
    """
    if not 0 <= stratum < strata:
        raise ValueError(f"draw_validation_masks: stratum must be in [0, {strata}), got {stratum}")
    t = (stratum + 0.5) / strata
    p = (1 - _VALIDATION_EPS) * t + _VALIDATION_EPS
    index = np.asarray(indices, dtype=np.int64) * strata + stratum
    masked = uniforms(_VALIDATION_SEED, Stream.VALIDATION_MASK, index, length) < p
    return masked, np.full(len(index), 1 / p, dtype=np.float32)


def _times(
    op: str, draws: NDArray[np.int64], sequences: int, seed: int, config: DiffusionConfig, global_batch: int | None
) -> NDArray[np.float64]:
    """Return t in (0, 1) for up to `sequences` sequences of each draw, float64 [len(draws), sequences].

    op: The function that errors name.
    """
    if config.t_sampling == "independent":
        return uniforms(seed, Stream.TIME, draws, sequences)
    if global_batch is None or global_batch < 1:
        raise ValueError(f"{op}: t_sampling = 'low_discrepancy' needs global_batch")
    draws_per_batch = max(1, global_batch // (2 if config.complementary else 1))
    shared = uniforms(seed, Stream.BATCH_TIME, draws // draws_per_batch, 1)
    stratified = shared + (draws % draws_per_batch)[:, None] / draws_per_batch
    # Further sequences of a window take golden-ratio steps: each is uniform, and away from the first.
    return (stratified + _GOLDEN * np.arange(sequences)) % 1.0


def _mask(
    mask_words: NDArray[np.uint32], t: float, config: DiffusionConfig, second_of_pair: bool
) -> tuple[NDArray[np.bool_], float]:
    """Return which tokens of one sequence are masked, bool [L], and their token weight."""
    if config.mask_count == "exact":
        count = min(int(t * len(mask_words)) + 1, len(mask_words))
        masked = np.zeros(len(mask_words), dtype=bool)
        masked[np.argsort(mask_words, kind="stable")[:count]] = True
        return masked, len(mask_words) / count
    if config.complementary:
        p = (1 - 2 * config.eps) * t + config.eps  # keeps 1 - p, the other sample's masking probability, above eps
        masked = to_uniform(mask_words) < p
        return (~masked, 1 / (1 - p)) if second_of_pair else (masked, 1 / p)
    p = (1 - config.eps) * t + config.eps
    return to_uniform(mask_words) < p, 1 / p


def _pack(
    targets: NDArray[np.int64],
    masked: NDArray[np.bool_],
    weights: NDArray[np.float32],
    lengths: list[int],
    mask_id: int,
) -> Batch:
    cu_seqlens = np.cumsum([0, *lengths])
    positions = np.arange(len(targets)) - np.repeat(cu_seqlens[:-1], lengths)
    return Batch(
        tokens=torch.from_numpy(np.where(masked, mask_id, targets)),
        targets=torch.from_numpy(targets),
        token_weights=torch.from_numpy(weights),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        position_ids=torch.from_numpy(positions),
        rows=torch.from_numpy(np.flatnonzero(masked).astype(np.int32)),
    )
