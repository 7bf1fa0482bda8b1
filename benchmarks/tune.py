"""A search for the fastest value of each choice between kernels.

It says what to write into the defaults.

Every value of the choices that are about a job's kernels is first held against float32 or float64, then timed in turn
with the default, one choice at a time; at last the best values together. Each job runs in a process of its own: one
that hangs at a value is ended, the value is recorded as HANG, and another process goes on with the next one. Values
that are wrong, or hang, are never chosen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from illada.ops.variants import Variant, use_variants, variants

from . import dry_run, environment, isolated, report, runner, timing, tune_jobs
from .choices import matters_on, others
from .isolated import OK, SKIPPED, Outcome, Step, Task, WrongError
from .tune_jobs import Job

Values = dict[str, str]  # choice: value; all others have their defaults

TURNS = 15  # timed calls of each of the two that are compared
LEAST_GAIN = 1.01  # what is less than 1% faster is noise
TOGETHER = "the best together"
RIGHT, TIME = "right", "time"  # the first words of steps


def text(values: Values) -> str:
    """Return the values as they stand in the names of steps."""
    return ", ".join(f"{choice}={value}" for choice, value in values.items()) or "default"


class Bench:
    """A job's inputs, timer and calls, which a child process keeps from step to step.

    Whichever child needs them makes them again.
    """

    def __init__(self, job: Job):
        self.job = job
        self.inputs: tune_jobs.Inputs | None = None
        self.timer: Any = None
        self.calls: dict[str, tuple[Any, int]] = {}  # what is timed, and how many calls of the job it is

    def right(self, values: Values) -> dict[str, float]:
        """Return the error of the result under these values.

        WrongError: it is too large.
        """
        if self.inputs is None:
            self.inputs = self.job.make()
        with use_variants(**values):
            error = self.inputs.error(self.inputs.bind()[0]())
        if not error <= self.inputs.allowed:
            raise WrongError(f"off by {error:.1e}, {self.inputs.allowed:.1e} is allowed", {"error": error})
        return {"error": error}

    def call(self, values: Values) -> tuple[Any, int]:
        """Return a call under these choices and how many calls of the job it makes.

        Short calls are captured in a graph.
        """
        if text(values) not in self.calls:
            if self.inputs is None:
                self.inputs = self.job.make()
            calls = self.inputs.bind()
            for call in calls:
                call()
            if len(calls) > 1:
                graph, count = timing.capture(calls, torch.device("cuda", 0))
                self.calls[text(values)] = (graph.replay, count)
            else:
                self.calls[text(values)] = (calls[0], 1)
        return self.calls[text(values)]

    def time(self, values: Values, known: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the median milliseconds of these choices.

        Those of the defaults are measured in turn with them, where the defaults are right.
        """
        turns = 2 if dry_run.ACTIVE else TURNS
        if self.timer is None:
            self.timer = timing.Events(torch.device("cuda", 0), 1 << 20 if dry_run.ACTIVE else None)
        with_default = bool(values) and f"{RIGHT} default" in known
        readings: dict[bool, list[Any]] = {True: [], False: []}
        counts = {}
        for turn in range(turns + 1):  # the first one warms up
            for is_default in (True, False) if with_default else (False,):
                mine = {} if is_default else values
                with use_variants(**mine):
                    call, counts[is_default] = self.call(mine)
                    reading = self.timer.measure(call)
                if turn:
                    readings[is_default].append(reading)
        ms = {
            which: sorted(x / counts[which] for x in self.timer.milliseconds(r)) for which, r in readings.items() if r
        }
        tuned, default = ms[False], ms.get(True)
        return {
            "ms": statistics.median(tuned),
            "p20_ms": tuned[int(0.2 * (len(tuned) - 1))],
            "p80_ms": tuned[int(0.8 * (len(tuned) - 1) + 0.5)],
            "default_ms": None if default is None else statistics.median(default),
            "timing": "events" if counts[False] == 1 else "graph",
        }


def gain(found: Mapping[str, Any]) -> float:
    """Return how many times as fast as the defaults a value is; 0 without a time of the defaults."""
    return found["default_ms"] / found["ms"] if found["default_ms"] else 0.0


def best_values(job: Job, known: Mapping[str, Any], choices: list[Variant]) -> Values:
    """Return the value that gains most of each choice in which one gains something."""
    best: dict[str, tuple[float, str]] = {}
    for choice, value in others(choices, job.kind, job.dim):
        if found := known.get(f"{TIME} {choice}={value}"):
            best[choice] = max(best.get(choice, (LEAST_GAIN, "")), (gain(found), value))
    return {choice: value for choice, (_, value) in best.items() if value}


def task(job: Job, choices: list[Variant]) -> Task:
    """Return the task that checks and times each value of a job's choices.

    Its steps: right default, right A=a, .., time default, time A=a, .., then the best together if they are of two
    choices.
    """
    bench = Bench(job)
    settings: list[Values] = [{}, *({choice: value} for choice, value in others(choices, job.kind, job.dim))]

    def right(values: Values) -> Step:
        return Step(f"{RIGHT} {text(values)}", lambda known: bench.right(values))

    def timed(values: Values) -> Step:
        def run(known: Mapping[str, Any]) -> dict[str, float | None] | None:
            return bench.time(values, known) if f"{RIGHT} {text(values)}" in known else None

        return Step(f"{TIME} {text(values)}", run)

    def together(known: Mapping[str, Any]) -> dict[str, Any] | None:
        values = best_values(job, known, choices)
        if len(values) < 2:
            return None
        return {"values": values, **bench.right(values), **bench.time(values, known)}

    return Task(job.name, [*map(right, settings), *map(timed, settings), Step(TOGETHER, together)])


# -------------------------------------------------------------------------------------------------------------- results


def result(job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return one job's result: each value's status and times, and the fastest right values."""
    steps = {outcome.step: outcome for outcome in outcomes}
    values: list[dict[str, Any]] = []
    best: dict[str, Any] = {"values": {}, "ms": None, "gain": 1.0}
    for name, outcome in steps.items():
        if not name.startswith(f"{RIGHT} "):
            continue
        setting = name.removeprefix(f"{RIGHT} ")
        timed = steps.get(f"{TIME} {setting}")
        # A value may also hang or fail while it is timed.
        bad = next((o for o in (outcome, timed) if o is not None and o.status != OK), None)
        choice, _, value = setting.partition("=")
        entry: dict[str, Any] = {
            "choice": choice if value else None,
            "value": value or "default",
            "status": OK if bad is None else bad.status,
            "message": "" if bad is None else bad.message,
            "error": (outcome.value or {}).get("error"),
            "ms": None, "default_ms": None, "gain": None,
        }  # fmt: skip
        if bad is None and timed is not None and timed.value:
            entry |= timed.value
            entry["gain"] = gain(timed.value) if value else 1.0
            if best["ms"] is None or entry["gain"] > max(best["gain"], LEAST_GAIN) or not best["gain"]:
                best = {"values": {choice: value} if value else {}, "ms": entry["ms"], "gain": entry["gain"]}
        values.append(entry)
    if (last := steps.get(TOGETHER)) is not None and last.status == OK and last.value:
        if gain(last.value) > best["gain"]:
            best = {"values": last.value["values"], "ms": last.value["ms"], "gain": gain(last.value)}
    together = None if last is None else {"status": last.status, "message": last.message, **(last.value or {})}
    return {"job": job.name, "kind": job.kind, "values": values, "together": together, "best": best}


def advice(results: Sequence[Mapping[str, Any]], choices: Sequence[Variant]) -> list[str]:
    """Return what to write into the defaults: a line for each choice that was tried."""
    lines = []
    for choice in choices:
        gains: dict[str, dict[str, float]] = {value: {} for value in choice.values}
        bad: dict[str, list[str]] = {}
        for found in results:
            entries = {e["value"]: e for e in found["values"] if e["choice"] in (choice.name, None)}
            if not any(e["choice"] == choice.name for e in entries.values()):
                continue
            for value in choice.values:
                entry = entries.get("default" if value == choice.default else value)
                if entry and entry["gain"]:
                    gains[value][found["job"]] = entry["gain"]
                elif entry and entry["status"] not in (OK, SKIPPED):
                    bad.setdefault(value, []).append(f"{entry['status']} at {found['job']}")
        tried = {job for mine in gains.values() for job in mine} | ({"?"} if bad else set())
        if not tried:
            continue
        means = {v: math.exp(statistics.fmean(map(math.log, mine.values()))) for v, mine in gains.items()
                 if mine and v not in bad}  # fmt: skip
        failures = "".join(f"; {value}: {', '.join(where)}" for value, where in bad.items())
        best = max(means, key=means.__getitem__, default=None)
        if best is None:
            lines.append(f"{choice.name}: no value is right everywhere{failures}")
        elif best == choice.default or (means[best] < LEAST_GAIN and choice.default not in bad):
            lines.append(f"{choice.name}: keep {choice.default!r}{_where(gains, choice.default)}{failures}")
        else:
            spread = f"{means[best] - 1:+.1%} on average, {min(gains[best].values()) - 1:+.1%} to " \
                     f"{max(gains[best].values()) - 1:+.1%} over {len(gains[best])} shapes"  # fmt: skip
            lines.append(
                f'{choice.name}: write "{best}" first in its values in csrc/common/variants.cpp ({spread})'
                f"{_where(gains, best)}{failures}"
            )
    return lines


def _where(gains: Mapping[str, Mapping[str, float]], chosen: str) -> str:
    """Return, as text, the jobs at which another value is faster than the chosen one."""
    found = []
    for job, mine in gains[chosen].items():
        value, times = max(((v, g[job]) for v, g in gains.items() if job in g), key=lambda x: x[1])
        if times > LEAST_GAIN * mine and value != chosen:
            found.append(f"{value} is {times / mine - 1:.1%} faster at {job}")
    return f"; {', '.join(found)}" if found else ""


def records(job: Job, found: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Return the times in the form of the benchmarks, a line for each value that was timed.

    `compare` and `report` read them.
    """
    gpu = torch.device("cuda", 0)
    same = {
        "bench": job.bench, "case": job.name, "flops": job.flops, "bytes": job.bytes, "device": device,
        "torch": torch.__version__, "commit": runner.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment.machine(gpu, device), **environment.state(gpu),
    }  # fmt: skip
    lines = []
    for entry in found["values"]:
        if entry["ms"] is None:
            continue
        choice = "default" if entry["choice"] is None else f"{entry['choice']}={entry['value']}"
        times = {"median_ms": entry["ms"], "p20_ms": entry["p20_ms"], "p80_ms": entry["p80_ms"]}
        more = {"provider": "illada", "error": entry["error"], "timing": entry["timing"], "variants": choice}
        lines.append({**dict.fromkeys(runner.KEYS), **same, **times, **more})
    return lines


def device_of(known: Mapping[str, Any]) -> tuple[str, int]:
    """Return the device's name and the first number of its compute capability.

    This is asked in a child: the process itself must not use the GPU.
    """
    device = torch.device("cuda", 0)
    return timing.device_name(device), torch.cuda.get_device_capability(device)[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: done, 1: no default could be timed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m benchmarks.tune --json tune.json --records tune.jsonl\n"
        "  python -m benchmarks.tune --only 'bwd 1x8192' --seconds 60\n"
        "  ILLADA_VARIANT_NAME=value python -m benchmarks attention    # one value by hand; `illada info` lists them",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="all of it, rewritten after every job")
    parser.add_argument("--records", metavar="PATH", help="append the times as lines that `compare` reads")
    parser.add_argument("--seconds", type=float, default=240, metavar="S", help="for all of it (default 240)")
    parser.add_argument("--limit", type=float, default=20, metavar="S", help="for one value, without a result (20)")
    parser.add_argument("--only", metavar="TEXT", help="jobs whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print jobs and the values that they try, and stop")
    options = parser.parse_args(arguments)
    jobs = [job for job in tune_jobs.jobs(torch.device("cuda", 0)) if options.only is None or options.only in job.name]
    if not jobs:
        parser.error(f"no job contains {options.only!r}; --list names them")
    deadline = time.monotonic() + options.seconds
    limits = {"limit": options.limit, "deadline": deadline, "prepare": dry_run.prepare}
    (who,) = isolated.run([Task("device", [Step("name", device_of)])], **limits)
    device, major = who.value or (f"unknown ({who.message})", None)
    choices, results = [choice for choice in variants() if matters_on(choice.name, major)], []
    if options.list:
        for job in jobs:
            print(f"{job.name}: {', '.join(f'{c}={v}' for c, v in others(choices, job.kind, job.dim)) or 'no choice'}")
        return 0
    for job in jobs:
        outcomes = isolated.run([task(job, choices)], **limits)
        found = result(job, outcomes)
        results.append(found)
        print_result(job, found)
        if options.records:
            report.write_json(records(job, found, device), options.records)
        if options.json:
            whole = {"device": device, "commit": runner.commit(), "jobs": results, "advice": advice(results, choices)}
            Path(options.json).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print("\n".join(["", "What to write into the defaults:", *(advice(results, choices) or ["nothing was tried"])]))
    return 0 if any(e["ms"] for found in results for e in found["values"] if e["choice"] is None) else 1


def print_result(job: Job, found: Mapping[str, Any]) -> None:
    """Print the table of one job, flushed."""
    best = found["best"]
    fastest = f"the fastest is {text(best['values'])}, {best['gain'] - 1:+.1%}" if best["ms"] else "nothing was right"
    print(f"{job.name}: {fastest}")
    for entry in found["values"]:
        name = "default" if entry["choice"] is None else f"{entry['choice']}={entry['value']}"
        if entry["ms"] is None:
            about = entry["message"] or entry["status"]
        else:
            rate = f", {job.flops / entry['ms'] / 1e9:.0f} TFLOP/s" if job.flops else ""
            about = f"{entry['ms']:.4f} ms, {(entry['gain'] or 1) - 1:+.1%}{rate}"
        print(f"  {entry['status']:<7} {name}: {about}")
    if found["together"] and found["together"].get("values"):
        print(f"  together {text(found['together']['values'])}: {gain(found['together']) - 1:+.1%}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
