"""Philox4x32-10 in numpy: random words as a pure function of (counter, key).

Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11. The words have no order of drawing,
so a result never depends on batch size, process count or earlier draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """Counter word 3, one number for each purpose, so that no two purposes share words.

    The numbers are part of the results for a seed and never change. csrc/common/philox.h names those that kernels use.
    """

    # illada.diffusion
    WINDOW_ORDER = 1
    SPLIT = 2
    TIME = 3
    MASK = 4
    BATCH_TIME = 5
    VALIDATION_MASK = 6
    # illada.score.monte_carlo
    MONTE_CARLO_COUNT = 7
    MONTE_CARLO_MASK = 8
    # The token sampler: upper and lower 32 bits of the uniforms, and the random confidence measure.
    SAMPLE = 16
    SAMPLE_LOW_BITS = 17
    SAMPLE_RANDOM = 18
    # illada.generation.rules
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
