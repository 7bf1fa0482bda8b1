"""A comparison of predicted and measured times, for each case and kernel.

It shows where the simulator's timing model was wrong.

Reads what `run_on_gpu.sh` leaves (kernels.jsonl, tune.jsonl, results.jsonl) and what a benchmark's --json writes; of
those only what was measured with the default choices between kernels. A line each: the predicted time and its range,
the measured time, their ratio, and whether the range holds it:

    ok      within the predicted range
    SLOWER  than the slow end: look at what the prediction rests on, or at the kernel
    FASTER  than the fast end: the model is too careful
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import jsonl

PREDICTED = Path(__file__).resolve().parent / "predicted.json"
OK, SLOWER, FASTER = "ok", "SLOWER", "FASTER"


@dataclass(frozen=True)
class Line:
    """A predicted and a measured time, of one kernel or, where `kernel` is None, of the whole case."""

    case: str
    kernel: str | None
    how: str  # of the measurement: events, graph, kernels
    expected: float  # microseconds, as are the next three
    low: float
    high: float
    measured: float
    group: str

    @property
    def ratio(self) -> float:
        """The measured time divided by the predicted one."""
        return self.measured / self.expected

    @property
    def verdict(self) -> str:
        """Return whether the measurement is within the range, slower or faster."""
        return SLOWER if self.measured > self.high else FASTER if self.measured < self.low else OK


def read_lines(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return all lines of all files; errors are those of `jsonl.read`."""
    return [line for path in paths for line in jsonl.read(path)]


def read_predicted(path: str) -> dict[str, Any]:
    """Return what `predict` wrote.

    ValueError: it is no such file, or so old that something is missing.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(case, dict) for case in found.values()):
        raise ValueError(f"{path} is not what `make predict` writes")
    for name, case in found.items():
        lacking = [key for key in ("expected_us", "range_us", "group", "machine", "rests_on") if key not in case]
        if lacking:
            raise ValueError(f"{path}: {name!r} has no {', '.join(lacking)}; `make predict` writes it again")
    return found


def measurements(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str | None, str], float]:
    """Return the measured microseconds by (case, kernel or None, how).

    They are medians where something was measured more than once.
    """
    found: dict[tuple[str, str | None, str], list[float]] = {}
    for line in lines:
        if "case" not in line:
            continue
        if "kernel" in line:
            if line.get("us") is not None:
                found.setdefault((line["case"], line["kernel"], "kernels"), []).append(line["us"])
        elif line.get("provider") in ("illada", "illada raw") and line.get("median_ms") is not None:
            if line.get("variants") in (None, "default"):
                # the kernels alone are what is predicted, where there is such a provider
                how = (line.get("timing") or "clock") + (", raw" if line["provider"] == "illada raw" else "")
                found.setdefault((line["case"], None, how), []).append(1e3 * line["median_ms"])
    return {key: statistics.median(values) for key, values in found.items()}


def compare(lines: Sequence[Mapping[str, Any]], predicted: Mapping[str, Any]) -> tuple[list[Line], list[str]]:
    """Return the lines of all that was predicted and measured, and the cases that were not measured.

    Lines are in the order of the predictions.
    """
    found, missing, measured = [], [], measurements(lines)
    for case, about in predicted.items():
        kernels = about.get("kernels", {})
        mine = {key: us for key, us in measured.items() if key[0] == case}
        if not mine:
            missing.append(case)
        for (_, kernel, how), us in sorted(mine.items(), key=lambda item: (item[0][1] or "", item[0][2])):
            part = about if kernel is None else kernels.get(kernel)
            if part:
                low, high = part["range_us"]
                found.append(Line(case, kernel, how, part["expected_us"], low, high, us, about["group"]))
    return found, missing


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = ["| case | kernel | measured by | predicted us | range | measured us | ratio | |",
            "| --- | --- | --- | ---: | --- | ---: | ---: | --- |"]  # fmt: skip
    for x in lines:
        numbers = f"{x.expected:.1f} | {x.low:.1f} to {x.high:.1f} | {x.measured:.1f} | {x.ratio:.2f}"
        rows.append(f"| {x.case} | {x.kernel or 'all'} | {x.how} | {numbers} | {x.verdict} |")
    return "\n".join(rows)


def summary(lines: Sequence[Line], predicted: Mapping[str, Any]) -> list[str]:
    """Return, for each group of cases, how far off the model is.

    Under it is what the predictions beyond their range rest on.
    """
    found = []
    for group in dict.fromkeys(x.group for x in lines):
        mine = [x for x in lines if x.group == group]
        mean = math.exp(statistics.fmean(math.log(x.ratio) for x in mine))
        beyond = [x for x in mine if x.verdict != OK]
        text = f"- {group}: measured {mean:.2f} times the predicted time on average, "
        found.append(text + f"{len(mine) - len(beyond)} of {len(mine)} within their range")
        for why in dict.fromkeys(predicted[x.case]["rests_on"] for x in beyond):
            found.append(f"  - beyond it; rests on: {why}")
    return found


def main(arguments: list[str] | None = None, prog: str = "python -m benchmarks compare") -> int:
    """Run the command and return its exit status.

    0: compared. 1: nothing was both predicted and measured.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"examples:\n  {prog} runs/gpu/kernels.jsonl runs/gpu/tune.jsonl\n"
        "  make predict     # the predictions again, after a kernel has changed",
    )  # fmt: skip
    parser.add_argument("measured", nargs="+", metavar="MEASURED.jsonl", help="as above")
    parser.add_argument("--predicted", metavar="PATH", default=str(PREDICTED), help="default: predicted.json here")
    options = parser.parse_args(arguments)
    try:
        predicted, measured = read_predicted(options.predicted), read_lines(options.measured)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines, missing = compare(measured, predicted)
    if not lines:
        print("Nothing was both predicted and measured with the default choices.")
        return 1
    machines = sorted({predicted[x.case]["machine"] for x in lines})
    devices = sorted({line["device"] for line in measured if line.get("device")})
    print(f"## Predicted ({', '.join(machines)}) against measured ({', '.join(devices) or 'device unknown'})\n")
    print(table(lines) + "\n\n" + "\n".join(summary(lines, predicted)))
    if missing:
        print(f"- not measured: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
