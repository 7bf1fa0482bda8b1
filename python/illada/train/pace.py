"""A check whether a CPU is shared with others.

Threads that wait for each other then cost far more than the others' share.
"""

from __future__ import annotations

import os

_FEWEST = 10  # steps that say something
_SPREAD = 2.0  # slow steps by fast ones; masks, whose number differs by step, make about 1.3


class Pace:
    """The times of a run's steps, which give a hint at most once."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._said = False

    def add(self, seconds: float) -> None:
        """Add the seconds of one more step, without saving and validating."""
        self._seconds.append(seconds)

    def hint(self, threads: int) -> str | None:
        """Return a remark on the steps since the last call.

        There is one where the slow tenth took twice as long as the fast one.
        """
        seconds, self._seconds = sorted(self._seconds), []
        if self._said or len(seconds) < _FEWEST:
            return None
        tenth = len(seconds) // 10
        fast, slow = seconds[tenth], seconds[-1 - tenth]
        if slow <= _SPREAD * fast:
            return None
        self._said = True
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        said = (
            f"step times vary, {1000 * fast:.0f} to {1000 * slow:.0f} ms: load {os.getloadavg()[0]:.1f} on "
            f"{cpus} CPUs, {threads} threads here"
        )
        if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
            said += (
                ". Where others use the CPUs, threads that sleep while they wait are faster (OMP_WAIT_POLICY=passive)"
            )
        elif threads > 1:
            said += f". Where others use the CPUs, fewer threads may be faster (OMP_NUM_THREADS={threads // 2})"
        return said
