"""Timers of a call.

Each has a name, which stands in every record under `timing`:

    clock     wall time of a call that returns when it is done: CPUs
    thread    processor time of the calling thread: what a call costs its host, on a GPU as well
    events    CUDA events around one call, caches cold
    graph     many calls captured in a CUDA graph, the replay's time shared among them: no launch gaps

Nothing here waits for the device inside a timed call.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import dry_run

CPU = torch.device("cpu")

#: The least number of bytes that are written, and read, to push everything else out of the L2 cache.
LEAST_COLD_BYTES = 256 << 20

#: Calls of a graph: the gap before a replay's first kernel, some 5 us, is then shared by at least so many.
GRAPH_CALLS = 20


class Clock:
    """A timer that measures calls by the host's clock."""

    timing = "clock"

    def measure(self, call: Callable[[], Any]) -> float:
        """Time one call; what this returns goes to `milliseconds`."""
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def milliseconds(self, readings: Sequence[float]) -> list[float]:
        """Return the milliseconds of each call."""
        return list(readings)


class ThreadClock(Clock):
    """A timer that measures the processor time of this thread.

    Other threads that are running add less to it than to the clock.
    """

    timing = "thread"

    def measure(self, call: Callable[[], Any]) -> float:
        """Time one call; what this returns goes to `milliseconds`."""
        began = time.thread_time()
        call()
        return 1e3 * (time.thread_time() - began)


class Events:
    """A timer that measures calls between two CUDA events on the current stream.

    Nothing of the inputs is in the L2 cache before a call.

    flush_bytes: written, and as many others read, before each call.
    """

    timing = "events"

    def __init__(self, device: torch.device, flush_bytes: int | None = None):
        size = cold_bytes(device) if flush_bytes is None else flush_bytes
        self.written = torch.empty(size // 4, dtype=torch.int32, device=device)
        self.read = torch.zeros_like(self.written)
        self.sum = torch.zeros((), dtype=torch.int32, device=device)

    def measure(self, call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue one call; what this returns goes to `milliseconds`."""
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The read throws the written lines out, which the timed call would else have to write back to memory. Both
        # together also keep the device busy (0.2 ms on an H100) while the host enqueues the call.
        self.written.zero_()
        torch.sum(self.read, dim=0, dtype=torch.int32, out=self.sum)
        began.record()
        call()
        ended.record()
        return began, ended

    def milliseconds(self, readings: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        """Return the milliseconds of each call, after a wait for the last one."""
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) for began, ended in readings]


def timer(device: torch.device) -> Clock | Events:
    """Return the way to time single calls on `device`."""
    return Events(device) if device.type == "cuda" else Clock()


def cold_bytes(device: torch.device) -> int:
    """Return the bytes that push all else out of the L2 cache: twice its size, at least LEAST_COLD_BYTES."""
    if dry_run.ACTIVE:
        return LEAST_COLD_BYTES
    return max(LEAST_COLD_BYTES, 2 * torch.cuda.get_device_properties(device).L2_cache_size)


def input_sets(bytes_each: int, device: torch.device) -> int:
    """Return how many inputs of that size a graph must rotate over.

    So many that none is still cached when its turn comes.
    """
    if device.type != "cuda":
        return 1
    if dry_run.ACTIVE:
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(2, -(-2 * l2 // max(bytes_each, 1))), 512)  # 512: a graph of some thousand kernels at most


def capture(calls: Sequence[Callable[[], Any]], device: torch.device) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph that repeats all calls until there are GRAPH_CALLS, and how many it holds."""
    rounds = -(-GRAPH_CALLS // len(calls))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:  # libraries make their workspaces at the first call on a stream
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph, rounds * len(calls)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that one call allocates on a GPU at its worst moment, results included, inputs not."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def extra_memory(call: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> int:
    """Return the bytes that one call allocates at its worst moment beyond its inputs and the tensors that it returns.

    On a CPU of what torch allocates: the scratch of its matrix products is not seen, nor is malloc's own overhead.
    """
    sizes: list[int] = []

    def sized() -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in call()}
        sizes.append(sum(storages.values()))

    peak = peak_memory(sized, device) if device.type == "cuda" else _peak_on_cpu(sized)
    return peak - sizes[0]


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log goes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def kernels(call: Callable[[], Any], device: torch.device) -> dict[str, tuple[float, int]]:
    """Return the time and launches of each of our kernels in one call with cold caches.

    Name -> (microseconds in all, launches). Empty without a profiler.
    """
    timer = Events(device)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            timer.measure(call)
            torch.cuda.synchronize()
    except RuntimeError:
        return {}
    found: dict[str, tuple[float, int]] = {}
    for event in seen.events():
        name = re.search(r"illada_([a-z0-9_]+)", event.name)
        if event.device_type == torch.autograd.DeviceType.CUDA and name:
            us, count = found.get(name[1], (0.0, 0))
            found[name[1]] = (us + event.time_range.elapsed_us(), count + 1)
    return found


def launches(call: Callable[[], Any]) -> int | None:
    """Return the number of kernels, copies and fills that one call puts on a GPU.

    None where the profiler sees none, or may not look.
    """
    if dry_run.ACTIVE:
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events()) or None


def device_name(device: torch.device = CPU) -> str:
    """Return the name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "cpu"
