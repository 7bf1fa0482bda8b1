"""A runner of tasks in processes of their own, several at a time.

A kernel that hangs then costs seconds and nothing else.

A task is a list of steps. A child process, forked from this one, carries them out in their order. A step that takes
longer than it may, raises, or takes its process with it is recorded, and a new child goes on with the next one. A fork
is there at once where a new Python would import torch for seconds; therefore this process must never use the GPU.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

OK, WRONG, HANG, ERROR, SKIPPED = "OK", "WRONG", "HANG", "ERROR", "SKIPPED"
GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_NEW_PROCESS = 75  # exit status: the step's outcome was reported, but nothing more can be done in this process


class WrongError(Exception):
    """The error of a step whose result is wrong; `value` is recorded with it."""

    def __init__(self, message: str, value: Any = None):
        super().__init__(message)
        self.value = value


@dataclass(frozen=True)
class Step:
    """A named step of a task.

    run: gets the values of the task's steps that were OK so far, by name; returns something that JSON holds.
    """

    name: str
    run: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Task:
    """Steps that share a process as long as none fails."""

    name: str
    steps: Sequence[Step]


@dataclass
class Outcome:
    """The result of a step."""

    task: str
    step: str
    status: str
    seconds: float = 0.0
    value: Any = None
    message: str = ""


@dataclass
class _Child:
    task: Task
    step: int  # the one that it is at
    known: dict[str, Any]
    path: Path  # with .json: what it reports, .log: what it printed
    pid: int = 0
    read: int = 0  # bytes of the report
    since: float = field(default_factory=time.monotonic)  # the start, or the last report
    killed: float | None = None  # when it got SIGTERM
    status: str = ERROR  # of the step at which it ends without a report
    message: str = ""


def run(
    tasks: Sequence[Task],
    *,
    at_once: int = 1,
    limit: float = 20.0,
    deadline: float = math.inf,
    most_hangs: int = 3,
    prepare: Callable[[], None] = lambda: None,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run all tasks and return the outcomes; `report` gets each of them as soon as it is known.

    limit: seconds that a step may take, with the start of its process. deadline, of time.monotonic(): steps that have
    not ended by then are SKIPPED. most_hangs: of a task, whose other steps are then SKIPPED. prepare: called first in
    each child.
    """
    waiting, running, outcomes = list(tasks)[::-1], [], []

    def tell(child: _Child, status: str, seconds: float, value: Any = None, message: str = "") -> None:
        step = child.task.steps[child.step].name
        outcomes.append(Outcome(child.task.name, step, status, seconds, value, message))
        report(outcomes[-1])
        child.step += 1

    with tempfile.TemporaryDirectory() as folder:
        started = 0

        def start(task: Task, step: int, known: dict[str, Any]) -> None:
            nonlocal started
            child = _Child(task, step, known, Path(folder) / str(started))
            hangs = sum(o.task == task.name and o.status == HANG for o in outcomes)
            if time.monotonic() >= deadline or hangs >= most_hangs:
                while child.step < len(task.steps):
                    tell(child, SKIPPED, 0.0, message="after other hangs" if hangs >= most_hangs else "no time left")
            elif step < len(task.steps):
                started += 1
                _fork(child, prepare, limit)
                running.append(child)

        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    start(waiting.pop(), 0, {})
                time.sleep(0.005)
                for child in list(running):
                    if _ended(child, limit, deadline, tell):
                        running.remove(child)
                        start(child.task, child.step, child.known)
        finally:
            for child in running:
                _kill(child, signal.SIGKILL)
    return outcomes


def _ended(child: _Child, limit: float, deadline: float, tell: Callable[..., None]) -> bool:
    """Report what is new and return whether the child has ended.

    It also counts as ended where nobody can end it. A new child is then to begin at `child.step`.
    """
    pid, status = os.waitpid(child.pid, os.WNOHANG)  # before the report is read: then it is complete
    with child.path.with_suffix(".json").open("rb") as file:
        file.seek(child.read)
        for line in file:
            if not line.endswith(b"\n"):
                break
            child.read += len(line)
            child.since = time.monotonic()
            found = json.loads(line)
            if found["status"] == OK:
                child.known[child.task.steps[child.step].name] = found["value"]
            tell(child, **found)
    now = time.monotonic()
    if pid:
        if child.step < len(child.task.steps) and os.waitstatus_to_exitcode(status) != _NEW_PROCESS:
            tell(child, child.status, now - child.since, message=child.message or _last_words(child, status))
        return True
    if child.killed is None and (now - child.since > limit or now >= deadline):
        if now >= deadline:
            child.status, child.message = SKIPPED, "no time left"
        else:
            child.status, child.message = HANG, f"no result after {now - child.since:.0f} s"
        child.killed = now
        _kill(child, signal.SIGTERM)
    elif child.killed is not None and now - child.killed > GRACE:
        _kill(child, signal.SIGKILL)
        if now - child.killed > 3 * GRACE:  # it is stuck in the driver
            tell(child, child.status, now - child.since, message=f"{child.message}; cannot be killed")
            return True
    return False


def _kill(child: _Child, number: int) -> None:
    """Kill the child and the processes that it has started."""
    for kill in (os.killpg, os.kill):  # it may not be a group's leader yet
        try:
            kill(child.pid, number)
            return
        except ProcessLookupError:
            pass


def _last_words(child: _Child, status: int) -> str:
    """Return how a child ended that reported nothing, with the last line that it printed."""
    code = os.waitstatus_to_exitcode(status)
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    lines = child.path.with_suffix(".log").read_text(encoding="utf-8", errors="replace").split("\n")
    return ": ".join([how, *[line.strip() for line in lines if line.strip()][-1:]])


def _fork(child: _Child, prepare: Callable[[], None], limit: float) -> None:
    child.path.with_suffix(".json").touch()
    sys.stdout.flush()
    sys.stderr.flush()
    child.pid = os.fork()
    if child.pid == 0:
        _carry_out(child, prepare, limit)


def _carry_out(child: _Child, prepare: Callable[[], None], limit: float) -> NoReturn:
    """Run the child's steps in its process, and write a line of JSON for each."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = sys.stderr = child.path.with_suffix(".log").open("a", encoding="utf-8", buffering=1)
        for stream in (1, 2):  # and what native code prints
            os.dup2(sys.stdout.fileno(), stream)
        with child.path.with_suffix(".json").open("a", encoding="utf-8", buffering=1) as file:  # written line by line
            code = _steps(child, prepare, limit, lambda line: file.write(json.dumps(line) + "\n"))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        os._exit(code)  # no clean-up: it could hang, and the parent's is not the child's


def _steps(child: _Child, prepare: Callable[[], None], limit: float, write: Callable[[dict], Any]) -> int:
    """Return the child's exit status."""
    for number, step in enumerate(child.task.steps[child.step :]):
        # Without the parent, nothing else would end a step that hangs; the default action needs no Python.
        signal.alarm(math.ceil(limit + 4 * GRACE))
        began, found = time.monotonic(), {"status": OK, "value": None, "message": ""}
        try:
            if number == 0:
                prepare()
            found["value"] = child.known[step.name] = step.run(child.known)
        except WrongError as error:
            child.known.pop(step.name, None)
            found |= {"status": WRONG, "value": error.value, "message": str(error)}
        except Exception as error:
            found |= {"status": ERROR, "message": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        write({**found, "seconds": round(time.monotonic() - began, 3)})
        if found["status"] == ERROR:  # of CUDA's errors many stay with their process
            return _NEW_PROCESS
    return 0
