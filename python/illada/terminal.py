"""A check for a terminal to show progress on."""

from __future__ import annotations

import sys


def shows(progress: bool = True) -> bool:
    """Return whether to draw a progress bar: it is wanted, and standard error is a terminal, not closed or None."""
    try:
        return progress and sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
