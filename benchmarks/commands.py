"""A runner of commands, several at a time and each with a time limit.

What a command started ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LEAST_SECONDS = 5.0  # with less left nothing is begun


@dataclass
class Ended:
    """The result of a command that has ended."""

    name: str
    code: int | None  # None: it was ended for lack of time, or not begun
    seconds: float
    output: str  # stdout and stderr


def run(
    commands: Mapping[str, Sequence[str]],
    *,
    at_once: int,
    limit: float,
    deadline: float,
    environment: Mapping[str, str] | None = None,
    report: Callable[[Ended], None] = lambda ended: None,
) -> list[Ended]:
    """Run the named commands, `at_once` at a time, and return their results.

    Each may take at most `limit` seconds, and none runs beyond `deadline` of time.monotonic().
    """

    def one(name: str) -> Ended:
        ended = _run_one(name, commands[name], min(limit, deadline - time.monotonic()), environment)
        report(ended)
        return ended

    # A shell that starts this in the background has it ignore INT, and commands would inherit that. A handler ends at
    # exec: with one, commands begin with the default.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, commands))
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_one(name: str, command: Sequence[str], seconds: float, environment: Mapping[str, str] | None) -> Ended:
    if seconds < LEAST_SECONDS:
        return Ended(name, None, 0.0, "")
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return Ended(name, process.returncode, time.monotonic() - began, output)
    except subprocess.TimeoutExpired:
        output = ""
    # INT: pytest still writes what it has
    for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=patience)
            break
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            pass
    return Ended(name, None, time.monotonic() - began, output)


def append(path: str | Path, text: str) -> None:
    """Append text to a log file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(text)
