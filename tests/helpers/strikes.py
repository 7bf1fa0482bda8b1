"""A fault at an exact moment: what happens when a command touches the files below a folder for the n-th time."""

import contextlib
import itertools
import signal
import sys

_EVENTS = ("open", "os.mkdir", "os.rename", "os.chmod", "os.remove")
_hooked = []
_now = None


class Strike:
    """A counter of events (all, or those of one kind) on paths that begin with `start`, which acts at the n-th."""

    def __init__(self, start, at, action, events=_EVENTS):
        self.start, self.at, self.action, self.events, self.count = str(start), at, action, events, 0

    def see(self, event, arguments):
        if event in self.events and str(arguments[0]).startswith(self.start):
            self.count += 1
            if self.count == self.at:
                self.action()


def _hook(event, arguments):
    if _now is not None and event in _EVENTS:
        _now.see(event, arguments)


@contextlib.contextmanager
def strike(start, at, action, events=_EVENTS):
    global _now
    if not _hooked:
        sys.addaudithook(_hook)  # for good; it does nothing outside of this block
        _hooked.append(True)
    _now = Strike(start, at, action, events)
    try:
        yield _now
    finally:
        _now = None


def spread(total, count):
    """Return `count` moments among `total` events, first and last included, each with a signal that ends a command."""
    moments = [1 + i * (total - 1) // (count - 1) for i in range(count)]
    return list(zip(moments, itertools.cycle((signal.SIGTERM, signal.SIGHUP, signal.SIGINT)), strict=False))
