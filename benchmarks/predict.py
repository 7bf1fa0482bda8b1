"""Predictions of the kernels' times with the simulator's timing model, as ranges, in a JSON file.

Of each case the kernels' machine code is replayed on a model of one multiprocessor; the range is what comes out between
the fast and the slow end of what is uncertain, which the file names. `python -m benchmarks compare` holds measurements
against it. Cases that are not predicted this time keep what the file says of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import predict_cases, runner
from .predict_cases import ESTIMATES, LAUNCH_US, Case

ROOT = Path(__file__).resolve().parent.parent
PREDICTED = ROOT / "benchmarks" / "predicted.json"
PIPES = {"HBM share": "memory", "L2 share": "the L2 cache", "tensor": "tensor cores", "mufu/xu": "exponentials"}


@dataclass
class Launch:
    """The launch of one kernel in a replay."""

    kernel: str  # without "illada_"
    us: float
    busy: dict[str, float]  # percent of the time, by pipe


def parse(text: str) -> list[Launch]:
    """Return the launches that `cusim time` prints."""
    found = []
    for block in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        name = re.search(r"illada_([a-z0-9_]+)", block)
        us = re.search(r"predicted ([\d.]+) us", block)
        if not name or not us:
            raise ValueError(f"not what the timing model prints: {block[:200]!r}")
        line = re.search(r"busy: (.*)", block)
        pipes = re.findall(r"([a-zA-Z0-9/ ]+?) ([\d.]+)%", line[1]) if line else []
        found.append(Launch(name[1], float(us[1]), {pipe.strip(): float(share) for pipe, share in pipes}))
    return found


def counted(case: Case, launches: Sequence[Launch]) -> list[Launch]:
    """Return the launches scaled to the case, without those that are empty in it."""
    found: list[Launch] = []
    for launch in launches:
        if launch.kernel in [x.kernel for x in found] and any(part in launch.kernel for part in case.once):
            continue
        scale = next((factor for part, factor in case.scale.items() if part in launch.kernel), 1.0)
        found.append(Launch(launch.kernel, LAUNCH_US + (launch.us - LAUNCH_US) * scale, launch.busy))
    return found


def busiest(slots: Sequence[Sequence[Launch]]) -> list[Launch]:
    """Return, for each launch, the slot that takes longest, with which the launch ends."""
    return [max(same, key=lambda launch: launch.us) for same in zip(*slots, strict=True)]


def bound(launches: Sequence[Launch]) -> str:
    """Return, as text, the pipe that limits the longest kernel, or that latency does."""
    longest = max(launches, key=lambda launch: launch.us)
    pipe = max(longest.busy, key=lambda name: longest.busy[name], default="")
    share = longest.busy.get(pipe, 0.0)
    name = PIPES.get(pipe, pipe)
    return (
        f"{name}, {min(share, 100):.0f}% busy" if share >= 50 else f"latency; the busiest pipe is {name}, {share:.0f}%"
    )


def entry(case: Case, expected: Sequence[Launch], fast: Sequence[Launch], slow: Sequence[Launch],
          machine: str) -> dict[str, Any]:  # fmt: skip
    """Return the entry of a case in the file; times are in microseconds."""
    estimate = ESTIMATES[case.estimate]
    low, high = estimate.factors
    kernels: dict[str, dict[str, Any]] = {}
    for launch, least, most in zip(expected, fast, slow, strict=True):
        # The model knows little of a launch's cost; between kernels in a stream it is one to four microseconds.
        bounds = (1 + low * (least.us - LAUNCH_US), LAUNCH_US + 1 + high * (most.us - LAUNCH_US))
        mine = kernels.setdefault(launch.kernel, {"expected_us": 0.0, "range_us": [0.0, 0.0]})
        mine["expected_us"] = round(mine["expected_us"] + launch.us, 2)
        mine["range_us"] = [round(a + b, 2) for a, b in zip(mine["range_us"], bounds, strict=True)]
    ends = [sum(kernel["range_us"][i] for kernel in kernels.values()) for i in (0, 1)]
    total = sum(launch.us for launch in expected) + case.more_us
    found = {
        "group": case.group,
        "expected_us": round(total, 1),
        "range_us": [round(ends[0] + case.more_us / 2, 1), round(ends[1] + case.more_us, 1)],
        "bound": bound(expected),
        "rests_on": "; ".join(part for part in (estimate.text, case.note) if part),
        "machine": machine,
        "commit": runner.commit(),
        "kernels": kernels,
    }
    if case.flops:
        found["expected_tflops"] = round(case.flops / total / 1e6)
    return found


# ----------------------------------------------------------------------------------------------------------- simulator


def record(command: Sequence[str], kernel: str, slot: int, folder: Path, cusim: Path) -> list[str]:
    """Record a slot's share of the kernels that a command launches.

    Returns the paths of the traces, in the order of the launches.
    """
    environment = {
        **os.environ,
        "CUSIM_TIMING": str(folder),
        "CUSIM_TIMING_FAST": "1",
        "CUSIM_TIMING_KERNEL": kernel,
        "CUSIM_TIMING_FIRST": str(slot),
        "CUSIM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(cusim), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [str(cusim / "cusim"), "run", "--", *command], env=environment, capture_output=True, text=True
    )
    found = sorted(map(str, folder.glob("*.trace")))
    if done.returncode or not found:
        output = f"{done.stdout}{done.stderr}"[-2000:]
        raise RuntimeError(f"{shlex.join(command)}: exit {done.returncode}, {len(found)} traces\n{output}")
    return found


def trace(case: Case, slot: int, folder: Path, cusim: Path) -> list[str]:
    """Record a slot's share of the case's kernels."""
    command = [sys.executable, "-m", "benchmarks.predict", "--inside", case.name]
    return record(command, case.kernel, slot, folder, cusim)


def replay(traces: Sequence[str], cusim: Path, machine: str, settings: Mapping[str, float]) -> list[Launch]:
    """Return the launches' times on a machine with these parameters."""
    options = [f"--set={name}={value}" for name, value in settings.items()]
    flat = [part for option in options for part in option.split("=", 1)]
    command = [str(cusim / "cusim"), "time", "--timing-sm", machine, *flat, "--brief", *traces]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def predict(case: Case, cusim: Path, machine: str) -> dict[str, Any]:
    """Predict all slots of a case, at the expected, the fast and the slow end of its estimate."""
    estimate = ESTIMATES[case.estimate]
    ends: dict[str, list[list[Launch]]] = {"expected": [], "fast": [], "slow": []}
    for slot in case.slots:
        with tempfile.TemporaryDirectory() as folder:
            traces = trace(case, slot, Path(folder), cusim)
            for end, settings in (("expected", {}), ("fast", estimate.fast), ("slow", estimate.slow)):
                same = end != "expected" and not settings
                launches = ends["expected"][-1] if same else counted(case, replay(traces, cusim, machine, settings))
                ends[end].append(launches)
    expected, fast, slow = (busiest(ends[end]) for end in ("expected", "fast", "slow"))
    return entry(case, expected, fast, slow, machine)


def pretty(predicted: Mapping[str, Any]) -> str:
    """Return the predictions as JSON whose ranges stand in one line."""
    text = json.dumps(predicted, indent=1)
    return re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", text) + "\n"


def inside(name: str) -> None:
    """Run the case's kernels, in a process under the simulator."""
    import torch_on_cusim

    torch_on_cusim.enable()
    import torch

    next(case for case in predict_cases.cases() if case.name == name).run()
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all were predicted. 1: not all; the others are written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples (a Python with a CUDA build of torch and the `sim` build of illada):\n"
        "  make predict                     # all of them\n"
        "  make predict ONLY=backward       # those of which the group or the name contains the text\n"
        "  CUSIM=/path/to/cusim python -m benchmarks.predict --only 'fwd 1x8192' --out /tmp/p.json",
    )  # fmt: skip
    parser.add_argument("--out", metavar="PATH", default=str(PREDICTED), help="updated (default: predicted.json here)")
    parser.add_argument("--only", metavar="TEXT", help="cases whose group or name contains TEXT")
    parser.add_argument("--machine", default="h200", choices=["h100", "h200"], help="default h200")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="simulations side by side (default 2)")
    parser.add_argument("--list", action="store_true", help="print groups and cases and stop")
    parser.add_argument("--inside", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        inside(options.inside)
        return 0
    mine = [c for c in predict_cases.cases() if not options.only or options.only in c.group or options.only in c.name]
    if not mine:
        parser.error(f"no case or group contains {options.only!r}; --list names them")
    if options.list:
        print("\n".join(f"{case.group}: {case.name}" for case in mine))
        return 0
    cusim = Path(os.environ.get("CUSIM", "")).resolve()
    if not (cusim / "cusim").is_file():
        parser.error(f"CUSIM is {os.environ.get('CUSIM', '')!r} and names no folder of a simulator")
    out, failed = Path(options.out), 0
    try:  # before hours of simulation
        before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    except ValueError as error:
        parser.error(f"--out {out}: {error}")
    if not isinstance(before, dict):
        parser.error(f"--out {out}: it is there and is not what this command writes")

    def one(case: Case) -> tuple[dict[str, Any] | str, float]:
        began = time.monotonic()
        try:
            return predict(case, cusim, options.machine), time.monotonic() - began
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            return str(error), time.monotonic() - began

    with ThreadPoolExecutor(options.at_once) as pool:
        for case, (found, seconds) in zip(mine, pool.map(one, mine), strict=True):
            if isinstance(found, str):
                failed += 1
                print(f"{case.name}: FAILED: {found}", flush=True)
                continue
            whole = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
            whole = {**whole, case.name: found}
            order = {case.name: i for i, case in enumerate(predict_cases.cases())}
            whole = dict(sorted(whole.items(), key=lambda item: order.get(item[0], len(order))))
            out.write_text(pretty(whole), encoding="utf-8")
            rate = f", {found['expected_tflops']} TFLOP/s" if "expected_tflops" in found else ""
            low, high = found["range_us"]
            text = f"{found['expected_us']} us ({low} to {high}){rate}; {found['bound']}"
            print(f"{case.name}: {text}; {seconds:.0f} s of simulation", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
