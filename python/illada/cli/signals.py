"""Handlers that turn signals into exceptions, so that temporary files are removed and results are saved.

While C++ is imported, they end the process instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """The exception that SIGTERM or SIGHUP raises, so that temporary files are removed on its way."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Ended`, as SIGINT raises KeyboardInterrupt.

    A signal that nohup ignores stays ignored.
    """

    def end(number: int, frame: object) -> None:
        raise Ended(number)

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        # An exception in a finalizer or a weakref's callback, as every import has them, is dropped: send it again.
        if isinstance(lost.exc_value, KeyboardInterrupt | Ended):
            number = lost.exc_value.number if isinstance(lost.exc_value, Ended) else signal.SIGINT
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        else:
            hook(lost)

    hook = sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        with _handled(end, [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]):
            yield
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Make signals end the process at once within the context.

    An exception during an import of torch can abort in its C++.

    For the imports at the beginning of a command, when there is nothing to tidy up.
    """

    def leave(number: int, frame: object) -> None:
        if number == signal.SIGINT:
            say("illada: interrupted")
        os._exit(128 + number)

    with _handled(leave, [n for n in (signal.SIGINT, *_ENDING) if callable(signal.getsignal(n))]):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None], numbers: list[signal.Signals]) -> Iterator[None]:
    here = threading.current_thread() is threading.main_thread()  # the only one that may
    before = {number: signal.signal(number, handler) for number in numbers if here}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def say(line: str) -> None:
    """Print a line on standard error, also where its terminal is gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
