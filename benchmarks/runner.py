"""Timing that is reliable on a noisy machine: all providers of a case take turns in one process.

A record is a dict with the keys of KEYS; null where something does not apply. Of a provider that did not run, median_ms
is null and `error` says why; such records are handed to `after_case` alone. n: timed calls; the keys after it are those
of `environment`; dtype: of the case's matrix products. Readers take a key that a line does not have for null: older
files have fewer.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from illada.cli.signals import Ended
from illada.ops import variants
from illada.terminal import shows

from . import dry_run, environment, timing
from .budget import Budget, OutOfTime, Share
from .timing import CPU

KEYS = (
    "bench", "case", "provider", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "peak_memory_bytes", "error",
    "counts", "device", "torch", "commit", "timing", "variants", "date", "dtype",
    "n", "threads", "load", "cpu", "gpu", "driver", "cuda", "clocks", "power",
)  # fmt: skip
#: A row whose p20 and p80 are further apart than this share of its median is marked.
NOISY = 0.2
#: Why a case or provider was left out that did not fit into a budget.
NO_TIME = "no time left of --time-budget"


@dataclass
class Provider:
    """A provider: one implementation that can do the job of a case.

    call: does it once; what it returns is handed to `error`.
    unavailable: why it cannot run here, or None.
    error: how wrong the result is, in the bench's own terms.
    counts: how much of what one call did, such as tokens and forwards (the table shows them per second), or of what the
        job consists; anything else that is worth a column.
    memory: bytes that one call needs, as the bench defines them; default: on a GPU all that it allocates.
    calls: how many jobs one `call` does, where a job is too short for the clock; its time is shared among them.
    rotating: the same call on each of several inputs, too large together for the L2 cache. On a GPU these are also
        timed in a CUDA graph; none of them may wait for the device.
    """

    name: str
    call: Callable[[], Any]
    unavailable: str | None = None
    error: Callable[[Any], float] | None = None
    counts: Callable[[Any], Mapping[str, float]] | None = None
    memory: Callable[[], int] | None = None
    rotating: Sequence[Callable[[], Any]] = ()
    calls: int = 1


@dataclass
class Case:
    """A job on one input, with what is measured of it.

    make: builds the inputs and the providers, ours first; called when the case runs, so that memory is not held.
    flops, bytes: of the job itself, whoever does it; the formulas stand where they are set.
    dtype: of its matrix products; the machine's own product of that dtype is what its FLOPs are held against.
    peak_memory: bytes that a provider needs beyond its inputs; on a GPU the runner measures it.
    timer: what times it; default: what times calls on the device.
    yardstick: what the others are measured by; runs whichever cases and providers were asked for.
    """

    name: str
    make: Callable[[], list[Provider]]
    flops: float | None = None
    bytes: float | None = None
    peak_memory: Callable[[str], int] | None = None
    repeats: int = 7
    slow: set[str] = field(default_factory=set)  # providers timed a third as often
    yardstick: bool = False
    dtype: torch.dtype | None = None
    timer: Any = None


@dataclass
class Goal:
    """A promise of the design and whether this run kept it."""

    text: str
    met: bool


@dataclass
class Timed:
    """A call that is timed in turn with others; it does `count` jobs of `provider`."""

    provider: Provider
    timing: str
    call: Callable[[], Any]
    count: int = 1


def run(
    bench: str,
    cases: Sequence[Case],
    *,
    providers: Sequence[str] | None = None,
    repeats: int | None = None,
    device: torch.device = CPU,
    after_case: Callable[[list[dict[str, Any]]], None] | None = None,
    keep_going: bool = False,
    budget: Budget | None = None,
) -> list[dict[str, Any]]:
    """Time every provider of every case: warm-up calls, then calls in turn.

    after_case: gets the records of each case as soon as they are there. keep_going: ours is left out for an error as
    its peers are, where it would otherwise end the run. budget: what does not fit into it is left out. A signal ends
    the run after the records of what there was.
    """
    timer, name = timing.timer(device), timing.device_name(device)
    same = {
        "device": name,
        "torch": torch.__version__,
        "commit": commit(),
        "variants": variants.describe() if device.type == "cuda" else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **environment.machine(device, name),
    }
    records = []
    budget = budget or Budget(None, len(cases))
    for case in tqdm(cases, desc=bench, unit=" cases", disable=not shows()):
        job, share = _Job(case, timer, providers, repeats, device, keep_going), budget.share()
        unfinished, ended = None, None
        try:
            share.start()
            job.measure(share)
        except OutOfTime:
            unfinished = NO_TIME
        except (KeyboardInterrupt, Ended) as error:
            unfinished, ended = "ended by a signal", error
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            unfinished = reason(error)
        finally:
            with contextlib.suppress(OutOfTime):
                share.stop()
            share.stop()  # in case the alarm rang in the line before
        now = environment.state(device)
        mine = [{**record, "bench": bench, **same, **now} for record in job.records(unfinished)]
        records += [record for record in mine if record["median_ms"] is not None]
        if after_case is not None:
            after_case(mine)
        if ended:
            raise ended
        del job
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records


class _Job:
    """A case while it is measured.

    `records` returns what there is, also when `measure` was ended in the middle.
    """

    def __init__(
        self,
        case: Case,
        timer: timing.Clock | timing.Events,
        providers: Sequence[str] | None,
        repeats: int | None,
        device: torch.device,
        keep_going: bool,
    ):
        self.case, self.timer, self.device, self.keep_going = case, case.timer or timer, device, keep_going
        self.wanted, self.repeats = providers, repeats or case.repeats
        self.offered: list[Provider] = []
        self.timed: list[Timed] = []
        self.readings: list[list[Any]] = []  # of each of `timed`
        self.errors: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}
        self.memory: dict[str, int] = {}

    def measure(self, share: Share) -> None:
        """Do everything that takes time: make the case, warm up and time the calls."""
        case = self.case
        self.offered = [p for p in case.make() if not self.wanted or p.name in self.wanted or case.yardstick]
        for i, provider in enumerate(self.offered):
            try:
                if i and not provider.unavailable:  # peers are not to take the time in which all are timed
                    if share.spent() > 0.5:
                        raise OutOfTime
                    share.ring_at(0.7)
                self._warm_up(provider)
                share.ring_at(1)
            except OutOfTime:
                share.ring_at(1)  # raises where all of it is over
                provider.unavailable = provider.unavailable or NO_TIME
            if provider.unavailable:
                print(f"{case.name}: {provider.name} left out: {provider.unavailable}", file=sys.stderr)
        self.timed = [t for t in self.timed if not t.provider.unavailable]
        self.readings = [[] for _ in self.timed]
        _interleave(self.timed, self.readings, self.timer, self.repeats, case.slow, share)
        if case.peak_memory is not None and self.device.type != "cuda":
            for entry in self.timed:
                self.memory[entry.provider.name] = case.peak_memory(entry.provider.name)

    def _warm_up(self, provider: Provider) -> None:
        """Make the first call, examine its result, and make a graph; or record why the provider is not available."""
        on_gpu, name = self.device.type == "cuda", provider.name
        if not provider.unavailable:
            try:
                result = provider.call()
                self.errors[name] = None if provider.error is None else provider.error(result)
                self.counts[name] = None if provider.counts is None else provider.counts(result)
                del result
                if provider.memory is not None:
                    self.memory[name] = provider.memory()
                elif on_gpu:
                    self.memory[name] = timing.peak_memory(provider.call, self.device)
                self.timed.append(Timed(provider, self.timer.timing, provider.call, provider.calls))
            except Exception as error:  # a peer that does not run here is no reason to stop
                # nor is an op of ours without a kernel for this device, or too little memory; anything else of ours is
                legal = self.keep_going or isinstance(error, NotImplementedError) or lacks_memory(error)
                if name == "illada" and not legal:
                    raise
                provider.unavailable = reason(error)
            if on_gpu and provider.unavailable:  # what it had allocated is not to be missing to the next one
                gc.collect()
                torch.cuda.empty_cache()
        if on_gpu and provider.rotating and not provider.unavailable:
            try:
                graph, count = timing.capture(provider.rotating, self.device)
                self.timed.append(Timed(provider, "graph", graph.replay, count))
            except Exception as error:  # its single calls still count
                if name == "illada" and not self.keep_going:
                    raise
                print(f"{self.case.name}: {name} not in a graph: {reason(error)}", file=sys.stderr)

    def records(self, unfinished: str | None = None) -> list[dict[str, Any]]:
        """Return the case's records, without what is the same for all cases.

        unfinished: why `measure` was ended, if it was.
        """
        found = [
            self._record(entry, sorted(ms / entry.count for ms in self.timer.milliseconds(readings)))
            for entry, readings in zip(self.timed, self.readings, strict=False)  # no readings before the first turn
            if readings
        ]
        if unfinished:
            there = {record["provider"] for record in found}
            absent = [p for p in self.offered if not p.unavailable and p.name not in there]
            for provider in absent:
                provider.unavailable = unfinished
            who = "all" if not self.offered else ", ".join(p.name for p in absent)
            if who:
                print(f"{self.case.name}: {who} left out: {unfinished}", file=sys.stderr)
        left_out = {p.name: p.unavailable for p in self.offered if p.unavailable}
        if unfinished and not self.offered:  # nor is it known who would be
            left_out["all"] = unfinished
        for name, why in left_out.items():
            about = {"case": self.case.name, "provider": name, "timing": self.timer.timing, "error": why}
            found.append({**dict.fromkeys(KEYS), **about})
        return found

    def _record(self, entry: Timed, ms: list[float]) -> dict[str, Any]:
        """Return the record of one provider from its milliseconds, which are in ascending order."""
        name = entry.provider.name
        return {
            "case": self.case.name,
            "provider": name,
            "median_ms": statistics.median(ms),
            "p20_ms": ms[int(0.2 * (len(ms) - 1))],
            "p80_ms": ms[int(0.8 * (len(ms) - 1) + 0.5)],
            "flops": self.case.flops,
            "bytes": self.case.bytes,
            "dtype": None if self.case.dtype is None else str(self.case.dtype).removeprefix("torch."),
            "peak_memory_bytes": self.memory.get(name),
            "error": self.errors[name],
            "counts": self.counts[name],
            "timing": entry.timing,
            "n": len(ms),
        }


def lacks_memory(error: Exception) -> bool:
    """Return whether there was too little memory.

    Torch has a class of errors for that on GPUs, but only a text on CPUs.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def reason(error: Exception) -> str:
    """Return the first line of an error, its class before it; 200 characters of it."""
    first_line, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first_line}"[:200]


def _interleave(
    timed: list[Timed], readings: list[list[Any]], timer: Any, repeats: int, slow: set[str], share: Share
) -> None:
    """Add to the readings of each timed call, in turn.

    The order changes from turn to turn, so that no provider always follows the same other one.
    """
    longest = 0.0
    for turn in range(repeats):
        before = share.left()
        if turn and before < 1.2 * longest:
            return
        for i in range(len(timed)):
            which = (turn + i) % len(timed)
            if timed[which].provider.name in slow and turn % 3:
                continue
            readings[which].append(timer.measure(timed[which].call))
        if share.seconds < math.inf:
            timer.milliseconds(())  # waits for a GPU: only then the turn has taken its time
            longest = max(longest, before - share.left())


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Return a random number generator of a device, with the same numbers in every run."""
    return torch.Generator(CPU if dry_run.ACTIVE else device).manual_seed(seed)  # a simulator draws on its CPU


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under torch.compile, for one shape alone.

    Without the reset, what an earlier case compiled would make it dynamic, and slower.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def no_compiler() -> str | None:
    """Return why torch.compile cannot run here, or None."""
    return None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


def ratio(
    records: Sequence[dict[str, Any]], case: str, provider: str, key: str = "median_ms", timing: str | None = None
) -> float | None:
    """Return the provider's value of `key` divided by illada's, or None if one of them did not run.

    timing: compare what was timed in this way; default single calls.
    """
    values = {
        r["provider"]: r[key]
        for r in records
        if r["case"] == case and (r["timing"] == timing if timing else r["timing"] != "graph")
    }
    if values.get("illada") is None or values.get(provider) is None:
        return None
    return values[provider] / values["illada"]


def is_ours(provider: str) -> bool:
    """Return whether our code takes part, as in "illada", "illada raw" and "mm+illada"."""
    return "illada" in provider


def on_gpu(record: dict[str, Any]) -> bool:
    """Return whether the record was measured on a GPU.

    Old records do not name one, and of these only the ones of CPUs have no `timing`.
    """
    return record["gpu"] is not None or record["timing"] in ("events", "graph")


def spread(record: dict[str, Any]) -> float | None:
    """Return the distance from p20 to p80 as a share of the median; None where they are not known."""
    if any(record[key] is None for key in ("median_ms", "p20_ms", "p80_ms")):
        return None
    return (record["p80_ms"] - record["p20_ms"]) / record["median_ms"]


def once(record: dict[str, Any]) -> bool:
    """Return whether a single call was timed.

    Old records do not say; several calls never have two equal ends.
    """
    return record["n"] == 1 if record.get("n") is not None else spread(record) == 0


def noisy(record: dict[str, Any]) -> bool:
    """Return whether the calls differ so much that small ratios mean nothing."""
    return not once(record) and (spread(record) or 0) > NOISY


def marks(record: dict[str, Any]) -> str:
    """Return the marks of an unreliable row: that it varies, or that it was timed once.

    The text is empty where there is none.
    """
    return "timed once" if once(record) else f"varies {spread(record):.0%}" if noisy(record) else ""


def commit() -> str | None:
    """Return the commit of the checkout that the benchmarks are in, with a + where it has changes.

    Outside of a checkout it is ILLADA_COMMIT.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed, maybe into the environment of another project's checkout
        return os.environ.get("ILLADA_COMMIT")
    try:
        git = ["git", "-C", str(root)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ILLADA_COMMIT")
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
