"""The learning rate as a pure function of the step: linear warm-up, constant, cosine or linear decay."""

from __future__ import annotations

import math

from illada.train.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `steps`.

    Warm-up reaches the peak at step warmup_steps; the decay begins at decay_start and ends at the last step with
    final_learning_rate.
    """
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = schedule.decay_start * (steps if schedule.decay_start <= 1 else 1)
    if schedule.decay == "none" or step < start:
        return peak
    progress = min(1.0, (step - start) / max(1.0, steps - 1 - start))
    weight = (1 + math.cos(math.pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return schedule.final_learning_rate + (peak - schedule.final_learning_rate) * weight
