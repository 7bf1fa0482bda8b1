"""Timing that can be believed on a noisy machine: all providers of a case in one process, taking turns.

A record is a dict with the keys of KEYS; null where something does not apply. Of a provider that did not run, median_ms
is null and `error` says why; such records are handed to `after_case` alone. n: timed calls; the keys after it are those
of `environment`. Readers take a key that a line does not have for null: older files have fewer.
"""

from __future__ import annotations

import datetime
import gc
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import dry_run, environment, timing
from benchmarks.timing import CPU
from illada.ops import variants
from illada.terminal import shows

KEYS = (
    "bench", "case", "provider", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "peak_memory_bytes", "error",
    "counts", "device", "torch", "commit", "timing", "variants", "date",
    "n", "threads", "load", "cpu", "gpu", "driver", "cuda", "clocks", "power",
)  # fmt: skip
#: A row whose p20 and p80 are further apart than this share of its median is marked.
NOISY = 0.2


@dataclass
class Provider:
    """One way to do the job.

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
    counts: Callable[[Any], dict[str, float]] | None = None
    memory: Callable[[], int] | None = None
    rotating: Sequence[Callable[[], Any]] = ()
    calls: int = 1


@dataclass
class Case:
    """One job on one input.

    make: builds the inputs and the providers, ours first; called when the case runs, so that memory is not held.
    flops, bytes: of the job itself, whoever does it; the formulas stand where they are set.
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
    timer: Any = None


@dataclass
class Goal:
    """A promise of the design and whether this run kept it."""

    text: str
    met: bool


@dataclass
class Timed:
    """Something that is timed in turn with others: `call` does `count` jobs of `provider`."""

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
) -> list[dict[str, Any]]:
    """Time every provider of every case: warm-up calls, then calls in turn.

    after_case: gets the records of each case as soon as they are there. keep_going: ours is left out for an error as
    its peers are, where it would otherwise end the run.
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
    for case in tqdm(cases, desc=bench, unit=" cases", disable=not shows()):
        mine = [
            {**record, "bench": bench, **same, **environment.state(device)}
            for record in _run_case(case, timer, providers, repeats, device, keep_going)
        ]
        records += [record for record in mine if record["median_ms"] is not None]
        if after_case is not None:
            after_case(mine)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return records


def _run_case(
    case: Case,
    timer: timing.Clock | timing.Events,
    providers: Sequence[str] | None,
    repeats: int | None,
    device: torch.device,
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """The records of one case, without what is the same for all."""
    on_gpu = device.type == "cuda"
    timer = case.timer or timer
    offered = [p for p in case.make() if not providers or p.name in providers or case.yardstick]
    errors, counts, memory, timed = {}, {}, {}, []
    for provider in offered:
        if not provider.unavailable:
            try:
                result = provider.call()
                errors[provider.name] = None if provider.error is None else provider.error(result)
                counts[provider.name] = None if provider.counts is None else provider.counts(result)
                del result
                if provider.memory is not None:
                    memory[provider.name] = provider.memory()
                elif on_gpu:
                    memory[provider.name] = timing.peak_memory(provider.call, device)
                timed.append(Timed(provider, timer.timing, provider.call, provider.calls))
            except Exception as error:  # a peer that does not run here is no reason to stop
                # nor is an op of ours without a kernel for this device, or too little memory; anything else of ours is
                legal = keep_going or isinstance(error, NotImplementedError | torch.OutOfMemoryError)
                if provider.name == "illada" and not legal:
                    raise
                provider.unavailable = reason(error)
            if on_gpu and provider.unavailable:  # what it had allocated is not to be missing to the next one
                gc.collect()
                torch.cuda.empty_cache()
        if on_gpu and provider.rotating and not provider.unavailable:
            try:
                graph, count = timing.capture(provider.rotating, device)
                timed.append(Timed(provider, "graph", graph.replay, count))
            except Exception as error:  # its single calls still count
                if provider.name == "illada" and not keep_going:
                    raise
                print(f"{case.name}: {provider.name} not in a graph: {reason(error)}", file=sys.stderr)
        if provider.unavailable:
            print(f"{case.name}: {provider.name} left out: {provider.unavailable}", file=sys.stderr)
    timed = [t for t in timed if not t.provider.unavailable]
    if case.peak_memory is not None and not on_gpu:
        memory = {t.provider.name: case.peak_memory(t.provider.name) for t in timed}
    records: list[dict[str, Any]] = []
    for entry, ms in zip(timed, _interleave(timed, timer, repeats or case.repeats, case.slow), strict=True):
        ms.sort()
        records.append(
            {
                "case": case.name,
                "provider": entry.provider.name,
                "median_ms": statistics.median(ms),
                "p20_ms": ms[int(0.2 * (len(ms) - 1))],
                "p80_ms": ms[int(0.8 * (len(ms) - 1) + 0.5)],
                "flops": case.flops,
                "bytes": case.bytes,
                "peak_memory_bytes": memory.get(entry.provider.name),
                "error": errors[entry.provider.name],
                "counts": counts[entry.provider.name],
                "timing": entry.timing,
                "n": len(ms),
            }
        )
    for provider in offered:
        if provider.unavailable:
            left_out = {"case": case.name, "provider": provider.name, "timing": timer.timing}
            records.append({**dict.fromkeys(KEYS), **left_out, "error": provider.unavailable})
    return records


def reason(error: Exception) -> str:
    """The first line of an error, its class before it; 200 characters of it."""
    first_line, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first_line}"[:200]


def _interleave(timed: list[Timed], timer: Any, repeats: int, slow: set[str]) -> list[list[float]]:
    """Milliseconds of each job; the order turns, so that no provider always follows the same other."""
    readings: list[list[Any]] = [[] for _ in timed]
    for turn in range(repeats):
        for i in range(len(timed)):
            which = (turn + i) % len(timed)
            if timed[which].provider.name in slow and turn % 3:
                continue
            readings[which].append(timer.measure(timed[which].call))
    return [[ms / t.count for ms in timer.milliseconds(r)] for t, r in zip(timed, readings, strict=True)]


def copy_case(device: torch.device, size: int = 1 << 30) -> Case:
    """A device-to-device copy of `size` bytes: the bandwidth that everything else is held against."""

    def make() -> list[Provider]:
        source = torch.randint(256, (size,), dtype=torch.uint8, device=device, generator=generator(device))
        target = torch.empty_like(source)
        return [Provider("copy", lambda: target.copy_(source))]

    # every byte read once and written once
    return Case(f"copy {size / 2**20:g} MiB", make, bytes=2 * size, repeats=30, yardstick=True)


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Random numbers of a device, the same in every run."""
    return torch.Generator(CPU if dry_run.ACTIVE else device).manual_seed(seed)  # a simulator draws on its CPU


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.compile, for one shape alone: what an earlier case compiled would make it dynamic, and slower."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def no_compiler() -> str | None:
    """Why torch.compile cannot run here, or None."""
    return None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


def ratio(
    records: Sequence[dict[str, Any]], case: str, provider: str, key: str = "median_ms", timing: str | None = None
) -> float | None:
    """How many times what illada needs this provider needs, or None if one of them did not run.

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


def marks(record: dict[str, Any]) -> str:
    """What one must know before one believes a row: that it varies, or was timed once; empty: nothing."""
    found = []
    if record["median_ms"] and (record["p80_ms"] - record["p20_ms"]) > NOISY * record["median_ms"]:
        found.append(f"varies {(record['p80_ms'] - record['p20_ms']) / record['median_ms']:.0%}")
    if record.get("n") == 1:
        found.append("timed once")
    return ", ".join(found)


def copy_share(records: Sequence[dict[str, Any]], record: dict[str, Any]) -> float | None:
    """Bytes a second as a share of the copy bandwidth measured beside it, or None without a copy or bytes."""
    copies = [r["bytes"] / r["median_ms"] for r in records if r["provider"] == "copy"]
    if not copies or not record["bytes"]:
        return None
    return record["bytes"] / record["median_ms"] / statistics.median(copies)


def commit() -> str | None:
    """Of the checkout that the benchmarks are in, with a + where it has changes; ILLADA_COMMIT outside of one."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ILLADA_COMMIT")
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
