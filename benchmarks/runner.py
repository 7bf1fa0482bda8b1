"""Timing that can be believed on a noisy machine: all providers of a case in one process, taking turns.

A record is a dict with the keys of KEYS; null where something does not apply.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

KEYS = (
    "bench", "case", "provider", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "peak_memory_bytes", "error",
    "device", "torch", "commit",
)  # fmt: skip


@dataclass
class Provider:
    """One way to do the job.

    call: does it once; what it returns is handed to the case's `error`.
    unavailable: why it cannot run here, or None.
    """

    name: str
    call: Callable[[], Any]
    unavailable: str | None = None


@dataclass
class Case:
    """One job on one input.

    make: builds the inputs and the providers, ours first; called when the case runs, so that memory is not held.
    flops, bytes: of the job itself, whoever does it; the formulas stand where they are set.
    error: how wrong a provider's result is, in the bench's own terms.
    peak_memory: bytes that a provider needs beyond its inputs, where it can be measured.
    """

    name: str
    make: Callable[[], list[Provider]]
    flops: float | None = None
    bytes: float | None = None
    error: Callable[[Any], float] | None = None
    peak_memory: Callable[[str], int] | None = None
    repeats: int = 7
    slow: set[str] = field(default_factory=set)  # providers timed a third as often


@dataclass
class Goal:
    """A promise of the design and whether this run kept it."""

    text: str
    met: bool


def run(
    bench: str, cases: Sequence[Case], *, providers: Sequence[str] | None = None, repeats: int | None = None
) -> list[dict[str, Any]]:
    """Time every provider of every case: a warm-up call each, then calls in turn."""
    records = []
    for case in tqdm(cases, desc=bench, unit=" cases", disable=not sys.stderr.isatty()):
        offered = [p for p in case.make() if not providers or p.name in providers]
        errors = {}
        for provider in offered:
            if not provider.unavailable:
                try:
                    result = provider.call()
                except Exception as error:  # a peer that does not run here is no reason to stop
                    if provider.name == "illada":
                        raise
                    first_line, _, _ = str(error).strip().partition("\n")
                    provider.unavailable = f"{type(error).__name__}: {first_line}"
                else:
                    errors[provider.name] = None if case.error is None else case.error(result)
                    del result
            if provider.unavailable:
                print(f"{case.name}: {provider.name} left out: {provider.unavailable}", file=sys.stderr)
        offered = [p for p in offered if not p.unavailable]
        times = _interleave(offered, repeats or case.repeats, case.slow)
        for provider in offered:
            ms = sorted(times[provider.name])
            records.append(
                {
                    "bench": bench,
                    "case": case.name,
                    "provider": provider.name,
                    "median_ms": statistics.median(ms),
                    "p20_ms": ms[int(0.2 * (len(ms) - 1))],
                    "p80_ms": ms[int(0.8 * (len(ms) - 1) + 0.5)],
                    "flops": case.flops,
                    "bytes": case.bytes,
                    "peak_memory_bytes": case.peak_memory(provider.name) if case.peak_memory else None,
                    "error": errors[provider.name],
                    "device": device_name(),
                    "torch": torch.__version__,
                    "commit": commit(),
                }
            )
        del offered
        gc.collect()
    return records


def _interleave(offered: list[Provider], repeats: int, slow: set[str]) -> dict[str, list[float]]:
    """Milliseconds of each call; the order turns, so that no provider always follows the same other."""
    times: dict[str, list[float]] = {p.name: [] for p in offered}
    for turn in range(repeats):
        for i in range(len(offered)):
            provider = offered[(turn + i) % len(offered)]
            if provider.name in slow and turn % 3:
                continue
            began = time.perf_counter()
            provider.call()
            times[provider.name].append(1e3 * (time.perf_counter() - began))
    return times


def ratio(records: Sequence[dict[str, Any]], case: str, provider: str, key: str = "median_ms") -> float | None:
    """How many times what illada needs this provider needs, or None if one of them did not run."""
    values = {r["provider"]: r[key] for r in records if r["case"] == case}
    if values.get("illada") is None or values.get(provider) is None:
        return None
    return values[provider] / values["illada"]


def print_table(records: Sequence[dict[str, Any]]) -> None:
    """Rows of case and provider, the ratio to illada last."""
    print(f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    names = ("median", "p20", "p80", "GB/s", "GFLOP/s", "memory", "error", "ratio")
    widths = (10, 9, 9, 6, 8, 9, 9, 6)
    columns = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    header = f"{'case':<28} {'provider':<10} {columns}"
    print(header + "\n" + "-" * len(header))
    for r in records:
        seconds = r["median_ms"] / 1e3
        rate = f"{r['bytes'] / seconds / 1e9:.1f}" if r["bytes"] else "-"
        flops = f"{r['flops'] / seconds / 1e9:.0f}" if r["flops"] else "-"
        memory = f"{r['peak_memory_bytes'] / 2**20:.0f} MiB" if r["peak_memory_bytes"] is not None else "-"
        error = f"{r['error']:.1e}" if r["error"] is not None else "-"
        times = ratio(records, r["case"], r["provider"])
        print(
            f"{r['case']:<28} {r['provider']:<10} {r['median_ms']:>7.2f} ms {r['p20_ms']:>9.2f} {r['p80_ms']:>9.2f} "
            f"{rate:>6} {flops:>8} {memory:>9} {error:>9} {'-' if times is None else f'{times:.2f}x':>6}"
        )


def write_json(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Append the records as JSON lines."""
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({key: record[key] for key in KEYS}) + "\n")


def plot(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Median times as horizontal bars, one panel a case, p20 to p80 as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["case"] for r in records))
    figure = Figure(figsize=(8, 1 + 1.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        mine = [r for r in records if r["case"] == name][::-1]
        medians = [r["median_ms"] for r in mine]
        spread = [[r["median_ms"] - r["p20_ms"] for r in mine], [r["p80_ms"] - r["median_ms"] for r in mine]]
        colors = ["C0" if r["provider"] == "illada" else "0.7" for r in mine]
        axes.barh([r["provider"] for r in mine], medians, xerr=spread, color=colors)
        axes.set_title(name, fontsize="medium", loc="left")
        for i, median in enumerate(medians):
            axes.annotate(f" {median:.1f}", (median, i), va="center", fontsize="small")
    axes.set_xlabel(f"ms, median with p20 and p80; {device_name()}")
    figure.savefig(path, dpi=120)


def device_name() -> str:
    """The processor that ran it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "cpu"


def commit() -> str | None:
    """Of the checkout that the benchmarks are in, with a + where it has changes; None outside of one."""
    root = Path(__file__).resolve().parent.parent
    try:
        git = ["git", "-C", str(root)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
