"""Seconds that a run may take, shared among its cases.

Each case may take an equal part of what is left; what it leaves is shared among the later ones. A case whose part is
over is ended by an alarm, at the next step of Python that its calls do, and keeps the times that it has.
"""

from __future__ import annotations

import math
import signal
import time
from types import FrameType


class OutOfTime(BaseException):
    """The alarm. No Exception: who catches those of a peer must not catch this."""


class Share:
    """What one case may take; a context in which the alarm is set. Without a limit there is none."""

    def __init__(self, seconds: float = math.inf):
        self.seconds = seconds
        self.began = time.monotonic()

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    def spent(self) -> float:
        """The part that is over, from 0 on."""
        return (time.monotonic() - self.began) / self.seconds if self.seconds > 0 else 1.0

    def __enter__(self) -> Share:
        self.began = time.monotonic()
        if self.seconds < math.inf:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            self.ring_at(1)
        return self

    def ring_at(self, part: float) -> None:
        """Set the alarm to when this part of the share is over."""
        if self.seconds < math.inf:
            left = part * self.seconds - (time.monotonic() - self.began)
            # Again and again: an exception in a finalizer, of which a garbage collection calls many, is dropped.
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 0.5)

    def __exit__(self, *error: object) -> None:
        if self.seconds < math.inf:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime


class Budget:
    """`seconds` for so many cases; None: as long as they take."""

    def __init__(self, seconds: float | None, cases: int):
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.cases = cases

    def share(self) -> Share:
        """The part of the next case."""
        part = (self.deadline - time.monotonic()) / max(self.cases, 1)
        self.cases -= 1
        return Share(part)
