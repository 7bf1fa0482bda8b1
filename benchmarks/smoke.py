"""A smoke test of every kernel on a GPU, each in a process of its own and checked against float64.

    OK       all results are within their tolerance
    WRONG    one is not; the line says which
    HANG     no result in time: the process was ended
    ERROR    an exception, or the process died
    SKIPPED  no time was left

Lines come out as soon as they are known. First all jobs with the defaults; then, as long as there is time, each with
every other value of each choice that is about its kernels (`illada.ops.variants`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from illada.ops.variants import use_variants, variants

from . import dry_run, isolated, jsonl, smoke_jobs
from .choices import concerns
from .isolated import ERROR, HANG, OK, SKIPPED, WRONG, Outcome, Step, Task, WrongError
from .smoke_jobs import Job


def checked(job: Job, values: dict[str, str]) -> dict[str, Any]:
    """Return the job's errors under these choices.

    WrongError: one of them is not allowed, or not a number.
    """
    with use_variants(**values):
        checks = job.run(torch.device("cuda", 0))
        torch.cuda.synchronize()
    found = {what: [error, allowed] for what, (error, allowed) in checks.items()}
    wrong = [f"{what} {error:.1e}, allowed {allowed:.1e}" for what, (error, allowed) in checks.items()
             if not error <= allowed]  # fmt: skip
    if wrong:
        raise WrongError("; ".join(wrong), found)
    return found


def task(jobs: Sequence[Job], values: dict[str, str]) -> Task:
    """Return a task that runs these jobs under these choices, one after the other."""

    def step(job: Job) -> Step:
        def run(known: Mapping[str, Any]) -> dict[str, Any]:
            return checked(job, values)

        return Step(job.name, run)

    name = ", ".join(f"{choice}={value}" for choice, value in values.items()) or "default"
    return Task(name, [step(job) for job in jobs])


def covering(jobs: Sequence[Job]) -> list[Job]:
    """Return a few jobs that together launch each kernel for each head dim."""
    found: list[Job] = []
    seen: set[tuple[str, int | None]] = set()
    for job in jobs:
        mine = {(kernel, job.dim) for kernel in job.kernels}
        if not mine <= seen:
            found.append(job)
            seen |= mine
    return found


def passes(jobs: Sequence[Job]) -> tuple[list[Task], list[Task]]:
    """Return the tasks of the first and of the second pass.

    First each job by itself with the defaults; then a task for each value of a choice, of kernels' own choices first.
    """
    choices = sorted(variants(), key=lambda choice: sum(concerns(choice.name, job.kind, job.dim) for job in jobs))
    second = []
    for choice in choices:
        mine = [job for job in jobs if concerns(choice.name, job.kind, job.dim)]
        second += [task(mine, {choice.name: value}) for value in choice.values if value != choice.default]
    return [task([job], {}) for job in jobs], second


def line(outcome: Outcome) -> str:
    """Return the outcome's line of the table."""
    if outcome.status == OK:
        ratios = [error / allowed for error, allowed in outcome.value.values() if allowed]
        about = f"{max(ratios):.2f} of what is allowed" if ratios else "exact"
    else:
        about = outcome.message
    under = "" if outcome.task == "default" else f" [{outcome.task}]"
    return f"{outcome.status:<7} {outcome.seconds:5.1f} s  {outcome.step}{under}: {about}"


def in_process(name: str) -> int:
    """Run one job in this process, without isolation, and return the exit status.

    0: right, 1: wrong, 2: there is no such job.
    """
    job = next((job for job in smoke_jobs.jobs() if job.name == name), None)
    if job is None:
        print(f"there is no job {name!r}; --list names them", file=sys.stderr)
        return 2
    dry_run.prepare()
    try:
        print(checked(job, {}))
    except WrongError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all that ran is right. 1: something is not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m benchmarks.smoke --json smoke.jsonl\n"
        "  python -m benchmarks.smoke --only 'attention backward' --defaults\n"
        "  python -m benchmarks.smoke --list",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="a line for each outcome; replaces the file")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="for all of it (default 120)")
    parser.add_argument("--limit", type=float, default=20, metavar="S", help="for a job, its process included (20)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="processes side by side (default 8)")
    parser.add_argument("--only", metavar="TEXT", help="jobs whose name contains TEXT")
    parser.add_argument("--defaults", action="store_true", help="without the second pass over the choices")
    parser.add_argument("--in-process", metavar="JOB", help="this job alone, in this process: for debuggers")
    parser.add_argument("--list", action="store_true", help="print the jobs with their kernels and stop")
    options = parser.parse_args(arguments)
    if options.in_process:
        return in_process(options.in_process)
    jobs = [job for job in smoke_jobs.jobs() if options.only is None or options.only in job.name]
    if not jobs:
        parser.error(f"no job contains {options.only!r}; --list names them")
    if dry_run.ACTIVE:
        jobs = covering(jobs)
    if options.list:
        print("\n".join(f"{job.name}: {' '.join(job.kernels)}" for job in jobs))
        return 0
    if options.json:
        Path(options.json).write_text("", encoding="utf-8")
    deadline = time.monotonic() + options.seconds

    def report(outcome: Outcome) -> None:
        print(line(outcome), flush=True)
        if options.json:
            jsonl.append(options.json, [vars(outcome)])

    def prepare() -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.at_once))  # the references share the host
        dry_run.prepare()

    first, second = passes(jobs)
    if dry_run.ACTIVE:
        second = [Task(t.name, t.steps[-1:]) for t in second[:2]]
    outcomes = []
    for tasks in (first,) if options.defaults else (first, second):
        outcomes += isolated.run(
            tasks, at_once=options.at_once, limit=options.limit, deadline=deadline, prepare=prepare,
            report=report,
        )  # fmt: skip
    counts = Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{counts[status]} {status}" for status in (OK, WRONG, HANG, ERROR, SKIPPED) if counts[status]))
    return 1 if any(counts[status] for status in (WRONG, HANG, ERROR)) else 0


if __name__ == "__main__":
    sys.exit(main())
