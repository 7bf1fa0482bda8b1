"""Predictions for CUTLASS's own GEMM kernels on the product of the fused head's logits.

docs/notebook/cutlass.md has ours beside them. It takes nvcc, CUTLASS's headers (as `make ptxas` finds them) and the
simulator:

    CUSIM=/path/to/cusim python -m benchmarks.stock_gemm [--only ping-pong]

Each schedule is compiled (a minute and 3 GB each) and run on a part of the vocabulary, as in predict_cases; the
busiest of the first, middle and last pair of multiprocessors counts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import predict
from .predict_cases import LAUNCH_US, VOCAB, WIDTH

ROWS, SMALL_VOCAB = 4096, 33 * 256
PAIRS = 66  # of multiprocessors: a cluster is a pair of CTAs, whose tiles are neighbours in M


@dataclass(frozen=True)
class Schedule:
    """A GEMM kernel of CUTLASS.

    Its fields are the names of its main loop's and its epilogue's schedule, and the tile of a CTA, 64 deep.
    """

    name: str
    mainloop: str
    epilogue: str
    tile_m: int
    tile_n: int

    def rounds(self, vocab: int) -> int:
        """Return the number of tiles that the busiest pair computes one after the other."""
        return -(-(ROWS // (2 * self.tile_m) * -(-vocab // self.tile_n)) // PAIRS)


COOPERATIVE = ("KernelTmaWarpSpecializedCooperative", "TmaWarpSpecializedCooperative")
PINGPONG = ("KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized")
SCHEDULES = (
    Schedule("cooperative 128x256x64", *COOPERATIVE, 128, 256),
    Schedule("ping-pong 64x256x64", *PINGPONG, 64, 256),
    Schedule("ping-pong 128x128x64", *PINGPONG, 128, 128),
)


def headers() -> str:
    """Return the folder of CUTLASS's headers, as cmake/ptxas.py finds it."""
    sys.path.insert(0, str(predict.ROOT / "cmake"))
    return str(importlib.import_module("ptxas").cutlass_include())


def build(schedule: Schedule, folder: Path) -> Path:
    """Return the program for one schedule.

    Without NDEBUG, asserts would make ptxas serialize wgmma.
    """
    program = folder / schedule.name.replace(" ", "_")
    subprocess.run(
        [shutil.which(os.environ.get("CUDACXX") or "nvcc") or "nvcc", "-std=c++17", "-O3", "-DNDEBUG",
         "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=compute_90a", "--no-compress",
         "-cudart", "shared", "-isystem", headers(), f"-DKERNEL_SCHEDULE={schedule.mainloop}",
         f"-DEPILOGUE_SCHEDULE={schedule.epilogue}", f"-DTILE_M={schedule.tile_m}", f"-DTILE_N={schedule.tile_n}",
         predict.ROOT / "benchmarks" / "stock_gemm.cu", "-o", program],
        check=True,
    )  # fmt: skip
    return program


def predict_us(schedule: Schedule, program: Path, cusim: Path, machine: str) -> float:
    """Predict the microseconds for the whole vocabulary."""
    found = []
    for slot in (0, PAIRS // 2, PAIRS - 1):
        with tempfile.TemporaryDirectory() as folder:
            command = [str(program), str(ROWS), str(SMALL_VOCAB), str(WIDTH)]
            traces = predict.record(command, "stock_gemm", slot, Path(folder), cusim)
            (launch,) = predict.replay(traces, cusim, machine, {})
            found.append(launch.us)
    return LAUNCH_US + (max(found) - LAUNCH_US) * schedule.rounds(VOCAB) / schedule.rounds(SMALL_VOCAB)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each schedule."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stock_gemm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="schedules whose name contains TEXT")
    parser.add_argument("--machine", default="h200", choices=["h100", "h200"], help="default h200")
    options = parser.parse_args(arguments)
    cusim = Path(os.environ.get("CUSIM", "")).resolve()
    if not (cusim / "cusim").is_file():
        parser.error(f"CUSIM is {os.environ.get('CUSIM', '')!r} and names no folder of a simulator")
    if not (mine := [schedule for schedule in SCHEDULES if options.only in schedule.name]):
        parser.error(f"no schedule contains {options.only!r}; there are {', '.join(each.name for each in SCHEDULES)}")
    with tempfile.TemporaryDirectory() as folder:
        for schedule in mine:
            us = predict_us(schedule, build(schedule, Path(folder)), cusim, options.machine)
            rate = 2.0 * ROWS * VOCAB * WIDTH / us / 1e6
            print(f"{schedule.name}: {us:.0f} us, {rate:.0f} TFLOP/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
