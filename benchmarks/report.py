"""Reports of records: a table for the terminal or in Markdown, JSON lines, CSV.

`python -m benchmarks.report FILE...` shows files that `python -m benchmarks BENCH --json FILE` wrote, old ones too.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import jsonl, plots, registry
from .ceiling import YARDSTICKS, middle, share
from .runner import KEYS, Goal, marks, once, ratio, spread

Records = Sequence[dict[str, Any]]

#: Keys that are calculated with, and keys that rows are told apart by; null, or of that type.
NUMBERS = ("p20_ms", "p80_ms", "n", "flops", "bytes", "peak_memory_bytes", "load")
TEXTS = ("device", "timing", "dtype", "torch")
WORDS = ("case", "provider", "timing", "")  # columns to the left; the others are numbers


def _rate(r: dict[str, Any]) -> float:
    """Return the floating-point operations per second of a record."""
    return 1e3 * (r["flops"] or 0) / r["median_ms"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _cells(records: Records, r: dict[str, Any]) -> dict[str, str]:
    """Return the columns of one record; "-" where something does not apply."""
    seconds = r["median_ms"] / 1e3
    prefix, digits = ("T", 1) if any(_rate(other) >= 1e13 for other in records) else ("G", 0)
    times = ratio(records, r["case"], r["provider"], timing=r["timing"])
    cells = {
        "case": r["case"],
        "provider": r["provider"],
        "timing": r["timing"] or "-",
        "median ms": f"{r['median_ms']:.4f}",
        "spread": "-" if once(r) else _percent(spread(r)),
        "GB/s": f"{r['bytes'] / seconds / 1e9:.1f}" if r["bytes"] else "-",
        "% of copy": _percent(share(records, r, "bytes")),
        f"{prefix}FLOP/s": f"{_rate(r) / {'G': 1e9, 'T': 1e12}[prefix]:.{digits}f}" if r["flops"] else "-",
        "% of matmul": _percent(share(records, r, "flops")),
        "MiB": f"{r['peak_memory_bytes'] / 2**20:.1f}" if r["peak_memory_bytes"] is not None else "-",
        "error": f"{r['error']:.1e}" if isinstance(r["error"], int | float) else "-",
        "ratio": "-" if times is None else f"{times:.2f}x",
    }
    found = r["counts"] or {}
    for name in dict.fromkeys(name for other in records for name in other["counts"] or ()):
        count = found.get(name)
        if any("tokens" in (other["counts"] or ()) for other in records):  # a job, not a kernel: what it did per second
            cells[f"{name}/s"] = "-" if count is None else f"{count / seconds:.1f}"
        else:  # what it was given, and needed
            cells[name] = "-" if count is None else f"{count:.1e}" if isinstance(count, float) else str(count)
    return {**cells, "": marks(r)}


def _rows(records: Records) -> list[dict[str, str]]:
    """Return the cells of all records, without columns that say nothing about any of them."""
    rows = [_cells(records, r) for r in records]
    said = [name for name in (rows[0] if rows else ()) if any(row[name] not in ("", "-") for row in rows)]
    return [{name: row[name] for name in said} for row in rows]


def print_table(records: Records) -> None:
    """Print a row for each case and provider, under a line of what is the same for all."""
    print(plots.about(records) if records else "nothing ran")
    rows = _rows(records)
    widths = {name: max([len(name), *(len(row[name]) for row in rows)]) for name in (rows[0] if rows else ())}

    def line(row: dict[str, str]) -> str:
        return " ".join(f"{row[n]:<{w}}" if n in WORDS else f"{row[n]:>{w}}" for n, w in widths.items())

    header = line({name: name for name in widths})
    print("\n".join([header, "-" * len(header), *map(line, rows)]))


def markdown(records: Records) -> str:
    """Return the same table in Markdown; empty without records."""
    rows = _rows(records)
    if not rows:
        return ""
    rule = ["---" if name in WORDS else "---:" for name in rows[0]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (rows[0].keys(), rule, *(row.values() for row in rows)))


def goal_line(goal: Goal) -> str:
    """Return the line of a goal, which says whether it is met or missed."""
    return f"{'met   ' if goal.met else 'MISSED'} {goal.text}"


def goals(records: Records) -> list[Goal]:
    """Return the goals of the records' bench; none where that bench is unknown here."""
    module = registry.BENCHES.get(records[0]["bench"])
    return importlib.import_module(module, __package__).goals(records) if module else []


def groups(records: Records) -> list[list[dict[str, Any]]]:
    """Return the records of each table.

    A table is of one bench on one device, with the yardsticks of that device.
    """
    found: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for r in records:
        if r["provider"] not in YARDSTICKS:
            found.setdefault((r["bench"], r["device"]), []).append(r)
    return [with_ceilings(mine, records) for mine in found.values()]


def with_ceilings(mine: Records, records: Records) -> list[dict[str, Any]]:
    """Return these records, followed by the yardsticks of their devices and kinds.

    The yardsticks are those among `records`; those of several runs are one.
    """
    devices = {r["device"] for r in mine}
    dtypes = {r["dtype"] for r in mine if r["flops"]} | ({None} if any(r["bytes"] for r in mine) else set())
    return [*mine, *(r for r in middle(records) if r["device"] in devices and r["dtype"] in dtypes)]


def left_out(lines: Records) -> list[str]:
    """Return a line for each provider that did not run, with the reason."""
    counted = Counter((r["bench"], r["provider"], r["error"]) for r in lines if r["median_ms"] is None)
    return [
        f"- {bench}: {provider} left out of {count} case{'s' if count > 1 else ''}: {why}"
        for (bench, provider, why), count in counted.items()
    ]


def write_json(records: Records, path: str | Path) -> None:
    """Append the records as JSON lines."""
    jsonl.append(path, ({key: record[key] for key in KEYS} for record in records))


def read_json(path: str | Path) -> list[dict[str, Any]]:
    """Return the records that `write_json` wrote, now or in an earlier version.

    Keys that an older file lacks are null, and unknown ones are kept.

    Errors are those of `jsonl.read`. A line that is no result is reported and skipped.
    """
    found = []
    for line in jsonl.read(path):
        record = {**dict.fromkeys(KEYS), **line}
        if _is_result(record):
            found.append(record)
        else:
            print(f"skipped a line of {path} that is no result: {json.dumps(line)[:100]}", file=sys.stderr)
    return found


def _is_result(record: dict[str, Any]) -> bool:
    ms = record["median_ms"]
    measured = ms is None or (isinstance(ms, int | float) and 0 < ms < float("inf"))
    return (
        measured
        and all(isinstance(record[key], str) for key in ("bench", "case", "provider"))
        and all(record[key] is None or isinstance(record[key], int | float) for key in NUMBERS)
        and all(record[key] is None or isinstance(record[key], str) for key in TEXTS)
        and isinstance(record["counts"], dict | None)
    )


def write_csv(records: Records, path: str | Path) -> None:
    """Write a row for each record, including those left out, and a column for each key; null is empty."""
    names = list(dict.fromkeys([*KEYS, *(name for r in records for name in r)]))
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for r in records:
            writer.writerow({key: json.dumps(v) if isinstance(v, dict | list) else v for key, v in r.items()})


def main(arguments: list[str] | None = None) -> int:
    """Show files of results: a table for each bench and device, the goals, and who was left out."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.report", description=main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  python -m {__package__}.report out.jsonl --plot out.png --csv out.csv --markdown",
    )  # fmt: skip
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help=f"written by `python -m {__package__} BENCH --json FILE`"
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--csv", metavar="PATH", help="write all records as CSV")
    parser.add_argument("--plot", metavar="PATH", help="draw them (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        lines = [line for path in options.files for line in read_json(path)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    records = [r for r in lines if r["median_ms"] is not None]
    if not records:
        print("No results.")
    for mine in groups(records):
        if options.markdown:
            print(f"## {mine[0]['bench']} on {plots.about(mine)}\n\n{markdown(mine)}")
        else:
            print(f"{mine[0]['bench']}:")
            print_table(mine)
        print("".join(f"- {goal_line(goal)}\n" for goal in goals(mine)))
    for line in left_out(lines):
        print(line)
    try:
        if options.csv:
            write_csv(lines, options.csv)
        if options.plot:
            plots.plot(records, options.plot)
    except ImportError as error:
        parser.error(f"--plot needs matplotlib: {error}; pip install 'illada[plot]'")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    from illada.cli import guarded

    sys.exit(guarded(main))
