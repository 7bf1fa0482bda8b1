"""The host's part of the published rules: how many to commit, what to boost, what to take back. Plain numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from illada.ops.philox import philox4x32

#: Philox stream tags (counter word 3), beside the sampler's own 16 to 18.
_ORDER_STREAM, _TAKE_BACK_STREAM = 19, 20

#: Dream's smallest t.
DREAM_EPSILON = 1e-3


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many tokens each step commits: masks // steps, the first masks % steps of them one more (as published)."""
    base, remainder = divmod(masks, steps)
    return [base + (step < remainder) for step in range(steps)]


def dream_transfer(step: int, steps: int) -> float:
    """1 - s/t of Dream's step: t falls evenly from 1 to 0.001 over `steps`; 1 at the last step."""
    if step >= steps - 1:
        return 1.0
    times = np.linspace(1, DREAM_EPSILON, steps + 1)
    return float(1 - times[step + 1] / times[step])


def end_think_bias(
    generated: Sequence[int], position: int, total: int, ids: Sequence[int], boost: float, power: float
) -> tuple[int, float] | None:
    """(id, what its logit gains) at the block's first mask, or None once `generated` contains `ids`.

    Args:
        generated: all that follows the prompt, masks included. position: of the first mask in it. total: gen_length.
    """
    sequence, window = list(ids), list(generated)
    if any(window[i : i + len(sequence)] == sequence for i in range(len(window) - len(sequence) + 1)):
        return None
    progress = min((position + 1) / total, 1.0)
    matched = next(
        (n for n in range(min(len(sequence) - 1, position), 0, -1) if window[position - n : position] == sequence[:n]),
        0,
    )
    return sequence[matched], boost * progress**power


def order_noise(seed: int, positions: NDArray, step: int) -> NDArray:
    """Gumbel noise float32 of each position: the n largest x + noise are n draws by softmax(x), none twice."""
    return (-np.log(-np.log(_uniforms(seed, positions, step, _ORDER_STREAM)))).astype(np.float32)


def taken_back(seed: int, committed: NDArray, step: int, probability: float) -> NDArray:
    """Those of the committed positions that become masks again, each with `probability`."""
    return committed[_uniforms(seed, committed, step, _TAKE_BACK_STREAM) < probability]


def _uniforms(seed: int, positions: NDArray, step: int, stream: int) -> NDArray:
    """In (0, 1), float64: a function of (seed, position, step) alone, as the sampler's noise."""
    counter = np.zeros((len(positions), 4), dtype=np.uint32)
    counter[:, 1], counter[:, 2], counter[:, 3] = positions, step, stream
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)
    return (philox4x32(counter, key)[:, 0] + 0.5) * 2.0**-32
