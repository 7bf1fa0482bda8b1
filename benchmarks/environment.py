"""The conditions that a time depends on beside the code.

They are the processor, its threads and load; of a GPU its driver, clocks and power.

All of it stands in every record, null where it is not known. Nothing here starts CUDA: a process that must never use
the GPU may ask as well.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from typing import Any

import torch

from . import dry_run, timing
from .timing import CPU

#: What `nvidia-smi` is asked for, and the unit that it adds: none.
GPU_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")


def machine(device: torch.device, name: str) -> dict[str, Any]:
    """Return the conditions that stay the same during a run on the named device.

    They are cpu, gpu, driver, cuda (torch's) and threads.
    """
    on_gpu = device.type == "cuda"
    return {
        "cpu": timing.device_name(CPU),
        "gpu": name if on_gpu else None,
        "driver": _ask_gpu(device).get("driver_version") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
    }


def state(device: torch.device) -> dict[str, Any]:
    """Return the conditions that change during a run.

    They are load (of the last minute), clocks in MHz and power in watts.

    clocks: {"cpu"}, the mean of all cores, or {"sm", "memory", "sm max"}; power, of a GPU: {"draw", "limit"}.
    """
    try:
        load = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    if device.type != "cuda":
        mhz = _cpu_mhz()
        return {"load": load, "clocks": None if mhz is None else {"cpu": mhz}, "power": None}
    said = _ask_gpu(device)
    clocks = {"sm": said.get("clocks.sm"), "memory": said.get("clocks.mem"), "sm max": said.get("clocks.max.sm")}
    power = {"draw": said.get("power.draw"), "limit": said.get("power.limit")}
    return {"load": load, **{k: _known(v) for k, v in (("clocks", clocks), ("power", power))}}


def _known(values: dict[str, str | None]) -> dict[str, float] | None:
    """Return the values that are numbers, or None without any."""
    found = {}
    for name, text in values.items():
        try:
            found[name] = float(text or "")
        except ValueError:  # "[N/A]"
            continue
    return found or None


def _cpu_mhz() -> float | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = [float(line.split(":", 1)[1]) for line in file if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return None
    return round(statistics.fmean(found)) if found else None


def _ask_gpu(device: torch.device) -> dict[str, str]:
    """Return the answers of nvidia-smi about the device.

    There are none without a GPU, and on a simulator.
    """
    if dry_run.ACTIVE:
        return {}
    if torch.cuda.is_initialized():
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        which = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    else:
        which = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_QUERY, (part.strip() for part in said.splitlines()[0].split(",")), strict=False))
