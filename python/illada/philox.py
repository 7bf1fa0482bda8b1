"""Philox4x32-10 in numpy: random words as a pure function of (counter, key).

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11. The words have no order of drawing,
so a result never depends on batch size, process count or earlier draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """Purpose of random numbers, counter word 3 of Philox: numbers of two streams are independent.

    Kernels know the streams of SAMPLE to SAMPLE_RANDOM_MEASURE by their values, in csrc/common/philox.h.
    """

    WINDOW_ORDER = 1
    SPLIT = 2
    TIME = 3
    MASK = 4
    BATCH_TIME = 5
    VALIDATION_MASK = 6
    LIKELIHOOD_COUNT = 7
    LIKELIHOOD_MASK = 8
    SOURCE_ORDER = 9
    SOURCE_WINDOW_ORDER = 10
    SAMPLE = 16
    SAMPLE_LOW_BITS = 17
    SAMPLE_RANDOM_MEASURE = 18
    COMMIT_ORDER = 19
    TAKE_BACK = 20


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return four random 32-bit words for each counter.

    Args:
        counter: uint32 [..., 4].
        key: uint32 [2], or one key per counter [..., 2].

    Returns:
        uint32 [..., 4], the words.
    """
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(_W0)) & low, (k1 + np.uint64(_W1)) & low
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def key_of(seed: int) -> NDArray[np.uint32]:
    """Return the key of a 64-bit seed, uint32 [2]."""
    return np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)


def words(seed: int, stream: Stream, indices: NDArray[np.int64], count: int) -> NDArray[np.uint32]:
    """Return `count` random words for each index, uint32 [len(indices), count].

    The counter is (block, index lo, index hi, stream).
    """
    blocks = -(-count // 4)
    counter = np.empty((len(indices), blocks, 4), dtype=np.uint32)
    unsigned = np.asarray(indices, dtype=np.int64).view(np.uint64)[:, None]
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = (unsigned & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    counter[..., 2] = (unsigned >> np.uint64(32)).astype(np.uint32)
    counter[..., 3] = stream
    return philox4x32(counter, key_of(seed)).reshape(len(indices), 4 * blocks)[:, :count]


def to_uniform(random_words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Map random words to uniforms strictly inside (0, 1)."""
    return (random_words.astype(np.float64) + 0.5) * 2.0**-32


def uniforms(seed: int, stream: Stream, indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return uniforms strictly inside (0, 1), float64 [len(indices), count]; see `words`."""
    return to_uniform(words(seed, stream, indices, count))
