"""What was measured: a table, JSON lines, a plot, Markdown. `python -m benchmarks.report FILE` prints the last."""

from __future__ import annotations

import argparse
import importlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner import KEYS, Goal, copy_share, ratio

Records = Sequence[dict[str, Any]]


def _rate(r: dict[str, Any]) -> float:
    """Floating-point operations a second."""
    return 1e3 * (r["flops"] or 0) / r["median_ms"]


def _cells(records: Records, r: dict[str, Any]) -> dict[str, str]:
    """The columns of one record; "-" where something does not apply."""
    seconds = r["median_ms"] / 1e3
    prefix, digits = ("T", 1) if any(_rate(other) >= 1e13 for other in records) else ("G", 0)
    share, times = copy_share(records, r), ratio(records, r["case"], r["provider"], timing=r["timing"])
    cells = {
        "case": r["case"],
        "provider": r["provider"],
        "timing": r["timing"],
        "median ms": f"{r['median_ms']:.4f}",
        "p20": f"{r['p20_ms']:.4f}",
        "p80": f"{r['p80_ms']:.4f}",
        "GB/s": f"{r['bytes'] / seconds / 1e9:.1f}" if r["bytes"] else "-",
        "of copy": "-" if share is None else f"{share:.0%}",
        f"{prefix}FLOP/s": f"{_rate(r) / {'G': 1e9, 'T': 1e12}[prefix]:.{digits}f}" if r["flops"] else "-",
        "MiB": f"{r['peak_memory_bytes'] / 2**20:.1f}" if r["peak_memory_bytes"] is not None else "-",
        "error": f"{r['error']:.1e}" if r["error"] is not None else "-",
        "ratio": "-" if times is None else f"{times:.2f}x",
    }
    counted = dict.fromkeys(name for other in records for name in other.get("counts") or ())
    if "tokens" in counted:  # a job, not a kernel: what it did per second
        for name in ("GB/s", "of copy", f"{prefix}FLOP/s", "MiB"):
            del cells[name]
        for name, count in (r.get("counts") or {}).items():
            cells[f"{name}/s"] = f"{count / seconds:.1f}"
        for name in counted:
            cells.setdefault(f"{name}/s", "-")
    else:  # what it was given, and needed
        found = r.get("counts") or {}
        cells |= {name: f"{x:.1e}" if isinstance(x := found.get(name, "-"), float) else str(x) for name in counted}
    return cells


def print_table(records: Records) -> None:
    """Rows of case and provider, the ratio to illada last."""
    device = records[0]["device"] if records else "nothing ran"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows = [_cells(records, r) for r in records]
    widths = {name: max([len(name), *(len(row[name]) for row in rows)]) for name in (rows[0] if rows else ())}
    # the words to the left, the numbers to the right
    header = " ".join(f"{n:<{w}}" if n in ("case", "provider", "timing") else f"{n:>{w}}" for n, w in widths.items())
    print(header + "\n" + "-" * len(header))
    for row in rows:
        print(
            " ".join(
                f"{row[n]:<{w}}" if n in ("case", "provider", "timing") else f"{row[n]:>{w}}" for n, w in widths.items()
            )
        )


def markdown(records: Records) -> str:
    """The same table in Markdown; empty without records."""
    rows = [_cells(records, r) for r in records]
    if not rows:
        return ""
    rule = ["---" if name in ("case", "provider", "timing") else "---:" for name in rows[0]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (rows[0].keys(), rule, *(row.values() for row in rows)))


def goal_line(goal: Goal) -> str:
    """One line, met or missed."""
    return f"{'met   ' if goal.met else 'MISSED'} {goal.text}"


def write_json(records: Records, path: str | Path) -> None:
    """Append the records as JSON lines."""
    with Path(path).open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({key: record[key] for key in KEYS}) + "\n")


def read_json(path: str | Path) -> list[dict[str, Any]]:
    """What `write_json` wrote; no file is no records."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def plot(records: Records, path: str | Path) -> None:
    """Median times as horizontal bars, one panel a case, p20 to p80 as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["case"] for r in records))
    figure = Figure(figsize=(8, 1 + 1.3 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        mine = [r for r in records if r["case"] == name][::-1]
        labels = [r["provider"] + (", graph" if r["timing"] == "graph" else "") for r in mine]
        medians = [r["median_ms"] for r in mine]
        spread = [[r["median_ms"] - r["p20_ms"] for r in mine], [r["p80_ms"] - r["median_ms"] for r in mine]]
        colors = ["C0" if r["provider"] == "illada" else "0.7" for r in mine]
        axes.barh(labels, medians, xerr=spread, color=colors)
        axes.set_title(name, fontsize="medium", loc="left")
        for i, median in enumerate(medians):
            axes.annotate(f" {median:.3g}", (median, i), va="center", fontsize="small")
    axes.set_xlabel(f"ms, median with p20 and p80; {records[0]['device']}")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of a file of JSON lines, one for each bench and device, the goals, and who was left out."""
    from benchmarks.__main__ import BENCHES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("file", help="written by `python -m benchmarks BENCH --json FILE`")
    lines = read_json(parser.parse_args(arguments).file)
    records = [r for r in lines if r["median_ms"] is not None]
    if not records:
        print("No results.")
    for bench, device in dict.fromkeys((r["bench"], r["device"]) for r in records):
        mine = [r for r in records if (r["bench"], r["device"]) == (bench, device)]
        print(f"## {bench} on {device}, torch {mine[0]['torch']}, commit {mine[0]['commit']}\n\n{markdown(mine)}")
        for goal in importlib.import_module(BENCHES[bench]).goals(mine):
            print(f"- {goal_line(goal)}")
        print()
    left_out = Counter((r["bench"], r["provider"], r["error"]) for r in lines if r["median_ms"] is None)
    for (bench, provider, why), count in left_out.items():
        print(f"- {bench}: {provider} left out of {count} case{'s' if count > 1 else ''}: {why}")


if __name__ == "__main__":
    main()
