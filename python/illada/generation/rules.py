"""The host's part of the published rules, on plain numbers.

It says how many tokens to commit, what to boost and what to take back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from illada.philox import Stream, key_of, philox4x32, to_uniform


def quota_schedule(masks: int, steps: int) -> list[int]:
    """Return how many tokens each step commits, as published.

    This is masks // steps, and one more in the first masks % steps.
    """
    base, remainder = divmod(masks, steps)
    return [base + (step < remainder) for step in range(steps)]


def dream_transfer(step: int, steps: int, eps: float = 1e-3) -> float:
    """Return 1 - s/t of Dream's step, which is 1 at the last step.

    t falls evenly from 1 to `eps` over `steps`.
    """
    return 1.0 if step >= steps - 1 else float(_dream_transfers(steps, eps)[step])


def dream_quota(masks: int, step: int, steps: int, eps: float = 1e-3) -> int:
    """Return how many of the `masks` that are left Dream's step commits.

    It is the whole part of masks (1 - s/t).
    """
    return masks if step >= steps - 1 else int(np.float32(masks) * _dream_transfers(steps, eps)[step])


@functools.lru_cache(maxsize=64)
def _dream_transfers(steps: int, eps: float) -> NDArray[np.float32]:
    # torch's float32, as published: where masks (1 - s/t) is nearly whole, other roundings commit one more or less.
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32, device="cpu")
    return (1 - times[1:] / times[:-1]).numpy()


def end_think_bias(
    generated: NDArray | Sequence[int], position: int, total: int, ids: Sequence[int], boost: float, power: float
) -> tuple[int, float] | None:
    """Return (id, what its logit gains) at the block's first mask, or None once `generated` contains `ids`.

    Args:
        generated: All tokens that follow the prompt, masks included.
        position: Position of the first mask in `generated`.
        total: gen_length, the tokens to generate.
        ids: Token ids of the end of the thoughts.
        boost: Gain of the logit at the end of the generation.
        power: Exponent of the progress, by which the gain grows from 0.
    """
    window = np.asarray(generated)
    places = max(0, len(window) - len(ids) + 1)
    found = np.ones(places, dtype=bool)
    for i, token in enumerate(ids):
        found &= window[i : i + places] == token
    if found.any():
        return None
    progress = min((position + 1) / total, 1.0)
    longest = min(len(ids) - 1, position)
    before = window[position - longest : position].tolist()
    matched = next((n for n in range(longest, 0, -1) if before[longest - n :] == list(ids[:n])), 0)
    return ids[matched], boost * progress**power


def order_noise(seed: int, positions: NDArray, step: int) -> NDArray:
    """Return Gumbel noise, float32, of each position.

    The n largest x + noise are n draws by softmax(x), none twice.
    """
    return (-np.log(-np.log(_uniforms(seed, positions, step, Stream.COMMIT_ORDER)))).astype(np.float32)


def taken_back(seed: int, committed: NDArray, step: int, probability: float) -> NDArray:
    """Return those of the committed positions that become masks again, each with `probability`."""
    return committed[_uniforms(seed, committed, step, Stream.TAKE_BACK) < probability]


def _uniforms(seed: int, positions: NDArray, step: int, stream: Stream) -> NDArray:
    """Return numbers in (0, 1), float64, as a function of (seed, position, step) alone.

    The sampler's noise is such a function, too.
    """
    counter = np.zeros((len(positions), 4), dtype=np.uint32)
    counter[:, 1], counter[:, 2], counter[:, 3] = positions, step, stream
    return to_uniform(philox4x32(counter, key_of(seed))[:, 0])
