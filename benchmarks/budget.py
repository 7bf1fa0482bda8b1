"""A budget of seconds for a run, which its cases share.

Each case may take an equal part of what is left; what it leaves is shared among the later ones. A case whose part is
over is ended by an alarm, at the next step of Python outside of an import, and keeps the times that it has.
"""

from __future__ import annotations

import math
import signal
import time
from types import FrameType
from typing import Any

#: Seconds after which an alarm rings again whose exception was dropped.
REPEAT = 5.0
#: Seconds after which it rings again where a module was being imported.
IMPORTING = 0.05


class OutOfTime(BaseException):
    """The exception that the alarm raises.

    It is no Exception, so that code that catches those of a peer does not catch this.
    """


class Share:
    """The time of one case, between `start` and `stop`; without a limit there is no alarm."""

    def __init__(self, seconds: float = math.inf):
        self.seconds = seconds
        self.began = time.monotonic()
        self._before: Any = None  # the handler that was there

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def spent(self) -> float:
        """Return the part of the share that is over, from 0 on."""
        return (time.monotonic() - self.began) / self.seconds if self.seconds > 0 else 1.0

    def start(self) -> None:
        """Start the time of the share now.

        OutOfTime: there is nothing to share.
        """
        self.began = time.monotonic()
        if self.seconds < math.inf:
            self._before = signal.signal(signal.SIGALRM, self._ring)
            self.ring_at(1)

    def ring_at(self, part: float) -> None:
        """Set the alarm to when this part of the share is over."""
        if self.seconds < math.inf:
            left = part * self.seconds - (time.monotonic() - self.began)
            if left <= 0:
                raise OutOfTime
            # Again, but not before all is tidied up: an exception in a finalizer, as collections call them, is dropped.
            signal.setitimer(signal.ITIMER_REAL, left, REPEAT)

    def stop(self) -> None:
        """Stop the alarm.

        Call this outside of the code that catches OutOfTime: the alarm may ring until then.
        """
        if self._before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
            self._before = None

    @staticmethod
    def _ring(number: int, frame: FrameType | None) -> None:
        caller = frame
        while caller is not None:
            if caller.f_code.co_filename.startswith("<frozen importlib"):  # half of a module would stay
                signal.setitimer(signal.ITIMER_REAL, IMPORTING, REPEAT)
                return
            caller = caller.f_back
        raise OutOfTime


class Budget:
    """The seconds that a number of cases share; None sets no limit."""

    def __init__(self, seconds: float | None, cases: int):
        self.deadline = math.inf if seconds is None else time.monotonic() + seconds
        self.cases = cases

    def share(self) -> Share:
        """Return the share of the next case."""
        part = (self.deadline - time.monotonic()) / max(self.cases, 1)
        self.cases -= 1
        return Share(part)
