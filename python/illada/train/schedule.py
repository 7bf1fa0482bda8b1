"""The schedule of the learning rate: linear warm-up, constant, then cosine or linear decay.

The decay begins at a step, at a fraction of the run, when the validation bound has stopped falling, or by command.
What was decided while running is part of the checkpoint, so that a resumed run has the same rates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from illada.train.config import OptimizerConfig, ScheduleConfig


@dataclass
class Schedule:
    """The learning rate of each optimizer step, and the end of the run.

    Attributes:
        steps: Optimizer steps of the run (train.steps), at most; see `end`.
        optimizer: Gives the learning rate of the constant phase.
        config: The section [schedule].
        decided: First step of the decay, decided while running; None: not decided.
        bounds: Validation bounds so far, in nats per token, by the number of steps before them.
    """

    steps: int
    optimizer: OptimizerConfig
    config: ScheduleConfig
    decided: int | None = None
    bounds: dict[int, float] = field(default_factory=dict)

    @property
    def start(self) -> float | None:
        """First step of the decay; None: there is none, or it is not known yet."""
        config = self.config
        if config.decay == "none":
            return None
        planned: float | None = None
        if config.decay_trigger == "step":
            planned = config.decay_start * (self.steps if config.decay_start <= 1 else 1)
        known = [start for start in (planned, self.decided) if start is not None]
        return min(known) if known else None

    @property
    def end(self) -> int:
        """Number of optimizer steps of the run, by what is known now."""
        if self.start is None or not self.config.decay_steps:
            return self.steps
        return min(self.steps, math.ceil(self.start) + self.config.decay_steps)

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, from 0.

        Warm-up reaches the peak at step warmup_steps. The decay ends at the last step with final_learning_rate.
        """
        peak, config, start = self.optimizer.learning_rate, self.config, self.start
        if step < config.warmup_steps:
            return peak * (step + 1) / config.warmup_steps
        if start is None or step < start:
            return peak
        progress = min(1.0, (step - start) / max(1.0, self.end - 1 - start))
        weight = (1 + math.cos(math.pi * progress)) / 2 if config.decay == "cosine" else 1 - progress
        return config.final_learning_rate + (peak - config.final_learning_rate) * weight

    def observe(self, step: int, bound: float) -> bool:
        """Take note of the validation bound after `step` optimizer steps.

        Returns:
            Whether the decay begins because of it, at optimizer step `step`.
        """
        self.bounds[step] = bound
        config = self.config
        waits = config.decay != "none" and config.decay_trigger == "plateau" and self.decided is None
        if not waits or not config.warmup_steps <= step < self.steps:
            return False
        bounds = [self.bounds[key] for key in sorted(self.bounds)]
        if not has_plateaued(bounds, config.plateau_validations, config.plateau_improvement):
            return False
        self.decided = step
        return True

    def begin_decay(self, step: int) -> bool:
        """Begin the decay at optimizer step `step`.

        Returns:
            Whether this changes anything: not if the decay has begun, or if there is none.
        """
        if self.config.decay == "none" or step >= self.steps or (self.start is not None and step >= self.start):
            return False
        self.decided = step
        return True


def has_plateaued(bounds: Sequence[float], validations: int, improvement: float) -> bool:
    """Return whether the bound has stopped falling.

    With b_1 .. b_n the bounds and m = validations, the plateau is reached if n > m and

        min(b_{n-m+1} .. b_n) > (1 - improvement) min(b_1 .. b_{n-m})

    The paper says only that the decay begins when the loss plateaus. This rule is ours. Validation has the same
    windows, strata and masks each time, so its bound has far less noise than the training loss.

    Args:
        bounds: Validation bounds, oldest first.
        validations: Last validations to look at, at least 1.
        improvement: Relative fall that still counts as progress.
    """
    if len(bounds) <= validations:
        return False
    return min(bounds[-validations:]) > (1 - improvement) * min(bounds[:-validations])
