"""Yardsticks of what the machine can do at most, which are measured once in every run.

Every row is compared with them.

Their records are of the bench BENCH.

copy SIZE MiB      one buffer to another; every byte is read once and written once
matmul N DTYPE     torch.mm of two square matrices, by the library that torch calls
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import dry_run
from .runner import Case, Provider, generator

BENCH = "ceiling"
YARDSTICKS = {"copy": "bytes", "matmul": "flops"}  # provider -> what it is the measure of
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}  # beyond the caches
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # at most; half of it or a quarter on a CPU that has no units for the dtype
MATMUL_SECONDS = 0.5
REPEATS = {"cpu": 7, "cuda": 30}


def cases(measured: Sequence[Case], device: torch.device) -> list[Case]:
    """Return the yardsticks of these cases.

    They are a copy where bytes are counted, and a product of each dtype where FLOPs are.
    """
    found = [copy(device)] if any(case.bytes for case in measured) else []
    dtypes = dict.fromkeys(case.dtype for case in measured if case.flops and case.dtype is not None)
    return found + [matmul(dtype, device) for dtype in dtypes]


def copy(device: torch.device) -> Case:
    """Return the case of a copy on the device, which measures the bandwidth."""
    size = 1 << 20 if dry_run.ACTIVE else COPY_BYTES[device.type]

    def make() -> list[Provider]:
        source = torch.arange(size // 8, device=device)
        target = torch.empty_like(source)
        return [Provider("copy", lambda: target.copy_(source))]

    return Case(f"copy {size / 2**20:g} MiB", make, bytes=2 * size, repeats=REPEATS[device.type], yardstick=True)


def matmul(dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of a product of square matrices, which measures the operations per second of a dtype."""
    size = 64 if dry_run.ACTIVE else _matmul_size(dtype, device)

    def make() -> list[Provider]:
        a, b = (torch.randn(size, size, device=device, generator=generator(device, i)).to(dtype) for i in range(2))
        out = torch.empty_like(a)
        return [Provider("matmul", lambda: torch.mm(a, b, out=out))]

    name = f"matmul {size} {str(dtype).removeprefix('torch.')}"
    return Case(name, make, flops=2.0 * size**3, dtype=dtype, repeats=REPEATS[device.type], yardstick=True)


def _matmul_size(dtype: torch.dtype, device: torch.device) -> int:
    """Return the largest size that takes less than MATMUL_SECONDS; bfloat16 is 50 times slower on some CPUs."""
    most = MATMUL_SIZE[device.type]
    if device.type == "cuda":
        return most
    size = most // 4
    while size < most:
        a = torch.ones(size, size, dtype=dtype)
        torch.mm(a, a)
        began = time.perf_counter()
        torch.mm(a, a)
        if 8 * (time.perf_counter() - began) > MATMUL_SECONDS:
            break
        size *= 2
    return size


def middle(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record of each yardstick on each device.

    Where several processes or runs measured it, this is the middle one.
    """
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for r in records:
        if r["provider"] in YARDSTICKS:
            found.setdefault((r["case"], r["device"]), []).append(r)
    return [sorted(same, key=lambda r: r["median_ms"])[(len(same) - 1) // 2] for same in found.values()]


def share(records: Sequence[dict[str, Any]], record: dict[str, Any], what: str) -> float | None:
    """Return `what` (bytes or flops) per second as a share of the yardstick in the records; None without one."""
    bars = [
        r[what] / r["median_ms"]
        for r in records
        if YARDSTICKS.get(r["provider"]) == what and r["device"] == record["device"]
        if what == "bytes" or r["dtype"] == record["dtype"]
    ]
    if not bars or not record[what]:
        return None
    return record[what] / record["median_ms"] / statistics.median(bars)
