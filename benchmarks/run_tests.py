"""A runner of the tests on CUDA, with a time limit for each test and each file.

Several files and processes run at a time.

pytest-xdist shares a file's tests out to processes, pytest-timeout ends a test that hangs; without them a file that
hangs loses its other tests, and no more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import commands, dry_run
from .commands import Ended

ROOT = Path(__file__).resolve().parent.parent
#: The files that run first: those that compare the kernels with float64.
FIRST = (
    "ops_attention",
    "ops_attention_backward",
    "attention",
    "attention_backward",
    "ops_linear_loss",
    "linear_loss_sm90",
    "ops_linear_sampling",
    "linear_sample_tokens",
    "ops_sampling",
    "sample_tokens",
    "ops_loss",
    "loss",
    "ops_remask",
    "remask",
)


def files(only: str | None = None) -> list[Path]:
    """Return the files of tests/cuda, and those of tests/ops with tests that take `device`."""
    first = {f"test_{name}.py": i for i, name in enumerate(FIRST)}
    takes_device = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    found = [*(ROOT / "tests" / "cuda").glob("test_*.py")]
    found += [path for path in (ROOT / "tests" / "ops").glob("test_*.py") if takes_device.search(path.read_text())]
    found.sort(key=lambda path: (first.get(path.name, 99), path.name))
    return [path for path in found if only is None or only in path.name]


def command(path: Path, xml: Path, workers: int, limit: float, has: Sequence[str]) -> list[str]:
    """Return the command that runs pytest on one file.

    has: the plugins that are installed.
    """
    parts = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), f"--junitxml={xml}"]
    if "xdist" in has and workers > 1:
        parts += ["-n", str(workers)]
    if "pytest_timeout" in has:
        # thread: a signal's handler does not run while the main thread waits for the device
        parts += [f"--timeout={limit:g}", "--timeout-method=thread"]
    if dry_run.ACTIVE:
        parts += ["-p", "torch_on_cusim"]
    return parts


def counts(output: str) -> dict[str, int]:
    """Return passed, failed (with errors) and skipped, from the last line of pytest that has numbers."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    numbers = {key: int(n) for n, key in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")}
    failed = numbers.get("failed", 0) + numbers.get("error", 0)
    return {"passed": numbers.get("passed", 0), "failed": failed, "skipped": numbers.get("skipped", 0)}


def failures(xml: Path) -> list[str]:
    """Return names and messages of a JUnit report; none where there is no report."""
    try:
        cases = list(ElementTree.parse(xml).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    found = []
    for case in cases:
        for what in (*case.iter("failure"), *case.iter("error")):
            message = (what.get("message") or "").partition("\n")[0][:200]
            found.append(f"{case.get('name')}: {message}")
    return found


def judge(ended: Ended, xml: Path) -> dict[str, Any]:
    """Return the entry of one file in the JSON."""
    names = failures(xml)
    if ended.code is None:
        status = "OUT OF TIME"
    elif ended.code in (0, 5):  # 5: no test was selected
        status = "OK"
    else:
        status = "FAILED"
    words = [line for line in ended.output.splitlines() if line.strip()]
    message = words[-1][:200] if words and status == "FAILED" and not names else ""
    numbers = counts(ended.output)
    return {"file": ended.name, "status": status, "seconds": round(ended.seconds, 1), **numbers, "failures": names,
            "message": message}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: nothing failed; what ran out of time is no failure.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run_tests", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m benchmarks.run_tests --json tests.json --log tests.log\n"
        "  python -m benchmarks.run_tests --only backward --workers 8",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="an entry for each file, rewritten after every file")
    parser.add_argument("--log", metavar="PATH", help="append pytest's output")
    parser.add_argument("--seconds", type=float, default=240, metavar="S", help="for all of it (default 240)")
    parser.add_argument("--file-seconds", type=float, default=150, metavar="S", help="for a file (default 150)")
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="for a test, with pytest-timeout (60)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes of a file, with xdist (4)")
    parser.add_argument("--at-once", type=int, default=3, metavar="N", help="files at a time (default 3)")
    parser.add_argument("--only", metavar="TEXT", help="files whose name contains TEXT")
    options = parser.parse_args(arguments)
    chosen = files("test_variants" if dry_run.ACTIVE and options.only is None else options.only)
    if not chosen:
        parser.error(f"no file of tests on CUDA contains {options.only!r}")
    has = [name for name in ("xdist", "pytest_timeout") if importlib.util.find_spec(name)]
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def xml(name: str) -> Path:
            return Path(folder) / f"{name}.xml"

        def report(ended: Ended) -> None:
            entry = judge(ended, xml(ended.name))
            entries.append(entry)
            print(line(entry), flush=True)
            for failure in entry["failures"]:
                print(f"    {failure}", flush=True)
            if options.log:
                commands.append(options.log, f"=== {ended.name}\n{ended.output}\n")
            if options.json:
                Path(options.json).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")

        commands.run(
            {path.name: command(path, xml(path.name), options.workers, options.limit, has) for path in chosen},
            at_once=options.at_once, limit=options.file_seconds, deadline=time.monotonic() + options.seconds,
            environment={"ILLADA_REQUIRE_CUDA": "1"}, report=report,
        )  # fmt: skip
    total = {key: sum(entry[key] for entry in entries) for key in ("passed", "failed", "skipped")}
    late = [entry["file"] for entry in entries if entry["status"] == "OUT OF TIME"]
    print(", ".join(f"{n} {key}" for key, n in total.items()) + (f"; out of time: {', '.join(late)}" if late else ""))
    return 1 if any(entry["status"] == "FAILED" for entry in entries) else 0


def line(entry: dict[str, Any]) -> str:
    """Return the outcome of a file as a line."""
    numbers = ", ".join(f"{entry[key]} {key}" for key in ("passed", "failed", "skipped") if entry[key])
    about = ": ".join(part for part in (numbers or "no test ended", entry["message"]) if part)
    return f"{entry['status']:<11} {entry['seconds']:6.1f} s  {entry['file']}: {about}"


if __name__ == "__main__":
    sys.exit(main())
