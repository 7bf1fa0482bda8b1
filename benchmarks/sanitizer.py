"""Runs of compute-sanitizer on the smoke jobs, each tool and job in a process of its own.

A report, never a verdict: memcheck and racecheck misjudge some of what wgmma and TMA do, so the exit status is 0
whatever they find.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from . import commands, smoke, smoke_jobs
from .commands import Ended

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 99  # the exit status that the sanitizer is told to use


def find(given: str | None) -> str | None:
    """Return the program: as given, on PATH, or beside nvcc."""
    beside = Path(os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").with_name(
        "compute-sanitizer"
    )
    return shutil.which(given) if given else shutil.which("compute-sanitizer") or shutil.which(str(beside))


def judge(ended: Ended) -> dict[str, object]:
    """Return the status of a tool on a job, and the sanitizer's first complaint."""
    if ended.code is None:
        status = "OUT OF TIME"
    else:
        status = {0: "clean", FOUND: "FOUND"}.get(ended.code, "ERROR")
    complaints = re.findall(r"^========= (?!COMPUTE-SANITIZER|ERROR SUMMARY)(\S.*)$", ended.output, re.MULTILINE)
    words = [line for line in ended.output.splitlines() if line.strip()]
    first = complaints[0] if complaints else words[-1] if words else ""
    tool, _, job = ended.name.partition(": ")
    about = "" if status == "clean" else first[:200]
    return {"tool": tool, "job": job, "status": status, "seconds": round(ended.seconds, 1), "message": about}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0 except for wrong usage.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitizer", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m benchmarks.sanitizer --json sanitizer.json --log sanitizer.log\n"
        "  python -m benchmarks.sanitizer --only 'attention forward' --tool racecheck --seconds 600",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="an entry for each tool and job, rewritten after each")
    parser.add_argument("--log", metavar="PATH", help="append the output of what was not clean")
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="for all of it (default 120)")
    parser.add_argument("--limit", type=float, default=100, metavar="S", help="for a tool on a job (default 100)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="processes side by side (default 8)")
    parser.add_argument("--only", metavar="TEXT", help="jobs whose name contains TEXT (default: one for each kernel)")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="may be repeated (default: all)")
    parser.add_argument("--program", metavar="PATH", help="compute-sanitizer (default: on PATH, or beside nvcc)")
    options = parser.parse_args(arguments)
    jobs = smoke_jobs.jobs()
    chosen = [job for job in jobs if options.only in job.name] if options.only else smoke.covering(jobs)
    entries: list[dict[str, object]] = []

    def write() -> None:
        if options.json:
            Path(options.json).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

    program = find(options.program)
    write()
    if program is None:
        print("skipped: compute-sanitizer was not found")
        return 0

    def report(ended: Ended) -> None:
        entry = judge(ended)
        entries.append(entry)
        print(f"{entry['status']:<11} {entry['seconds']:6.1f} s  {ended.name}: {entry['message']}", flush=True)
        if options.log and entry["status"] != "clean":
            commands.append(options.log, f"=== {ended.name}\n{ended.output}\n")
        write()

    # torch makes API calls that fail and handles the errors, so errors of API calls are not reported
    flags = ["--report-api-errors", "no", "--error-exitcode", str(FOUND)]
    work = {
        f"{tool}: {job.name}": [program, "--tool", tool, *flags, sys.executable, "-m", f"{__package__}.smoke",
                                "--in-process", job.name]
        for tool in options.tool or TOOLS for job in chosen
    }  # fmt: skip
    # the caching allocator hides overruns
    commands.run(
        work, at_once=options.at_once, limit=options.limit, deadline=time.monotonic() + options.seconds,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, report=report,
    )  # fmt: skip
    for tool in options.tool or TOOLS:
        number = Counter(entry["status"] for entry in entries if entry["tool"] == tool)
        print(f"{tool}: " + ", ".join(f"{count} {status}" for status, count in number.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
