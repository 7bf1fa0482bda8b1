"""Plots of records: bars for a few cases of one bench, else a dot plot.

Times are relative to illada's in the same case, timed in the same way. Colours are those of Okabe and Ito, which people
see apart who are blind to some.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ceiling
from .ceiling import YARDSTICKS
from .runner import NOISY, is_ours, noisy, once

Record = dict[str, Any]
Records = Sequence[Record]

MOST_PANELS = 12
OURS, VARIANT, PEER = "#0072B2", "#56B4E9", "#BBBBBB"
PEERS = ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#999999", "#F0E442")
MARKERS = "osD^vP*X<>hdp8"


# ----------------------------------------------------------------------------------------------------- what is written


def about(records: Records) -> str:
    """Return, for a title, the properties that all records share.

    These are device, threads, torch, commit and date.
    """

    def values(key: str) -> list[str]:
        found = dict.fromkeys(r.get(key) for r in records)
        return [str(x)[:10] if key == "date" else str(x) for x in found if x is not None]

    def said(key: str, text: str) -> str:
        found = list(dict.fromkeys(values(key)))
        return text.format(" and ".join(found)) if found else ""

    parts = [
        said("device", "{}"), said("threads", "{} threads"), said("torch", "torch {}"),
        said("commit", "commit {}"), said("date", "{}"),
    ]  # fmt: skip
    return ", ".join(part for part in parts if part).replace(", 1 threads", ", 1 thread")


def time_text(ms: float) -> str:
    """Return a time with three digits and a unit."""
    scale, unit = (1e-3, "s") if ms >= 999.5 else (1e3, "us") if ms < 0.9995 else (1.0, "ms")
    return f"{_digits(ms * scale)} {unit}"


def _digits(value: float) -> str:
    """Return a number with three digits."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _ceilings(records: Records) -> str:
    """Return, as text, the rates of the copy and the products among the records."""
    found = []
    for r in ceiling.middle(records):
        if work := r[YARDSTICKS[r["provider"]]]:
            rate = work / r["median_ms"] / 1e6
            found.append(f"{r['case']}: {_digits(rate)} {'GB/s' if r['provider'] == 'copy' else 'GFLOP/s'}")
    return "; ".join(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------------------------- panels


class Panel:
    """A case timed in one way, with the last record of each provider.

    Illada's time is 1; without it, the shortest is.

    compared: the records are of the same job.
    """

    def __init__(self, title: str, records: Records, compared: bool = True):
        self.compared = compared
        self.records = list({r["provider"]: r for r in records}.values())
        ours = next((r for r in self.records if r["provider"] == "illada"), None)
        self.base = ours or min(self.records, key=lambda r: r["median_ms"])
        self.title = title if ours or not compared else f"{title} ({self.base['provider']} = 1)"

    def relative(self, record: Record) -> float:
        """Return the record's median, divided by that of the panel's base."""
        return record["median_ms"] / self.base["median_ms"]

    def ends(self, record: Record) -> tuple[float, float]:
        """Return how far p20 and p80 are from the median, divided by the median of the panel's base."""
        if record["p20_ms"] is None or record["p80_ms"] is None:
            return 0.0, 0.0
        median, base = record["median_ms"], self.base["median_ms"]
        return max(0.0, median - record["p20_ms"]) / base, max(0.0, record["p80_ms"] - median) / base


def panels(records: Records) -> list[Panel]:
    """Return the panels of the cases that several providers ran."""
    return [Panel(title, mine) for title, mine in _cases(records).items() if len({r["provider"] for r in mine}) > 1]


def alone(records: Records) -> list[Panel]:
    """Return one panel with a line for each case, for records without a comparison; nothing without records."""
    last = [{**mine[-1], "provider": f"{mine[-1]['provider']}, {title}"} for title, mine in _cases(records).items()]
    return [Panel("", last, compared=False)] if last else []


def _cases(records: Records) -> dict[str, list[Record]]:
    """Return the records by case and way of timing."""
    found: dict[str, list[Record]] = {}
    for r in records:
        if r["provider"] not in YARDSTICKS:
            found.setdefault(r["case"] + (", CUDA graph" if r["timing"] == "graph" else ""), []).append(r)
    return found


def _groups(records: Records) -> list[tuple[str, list[Panel]]]:
    """Return a title and the panels of each bench on each device."""
    mine = [r for r in records if r["provider"] not in YARDSTICKS]
    devices = {r["device"] for r in mine}
    keys = dict.fromkeys((r["bench"], r["device"]) for r in mine)
    return [
        (bench if len(devices) == 1 else f"{bench}: {about(some)}", found)
        for bench, device in keys
        if (some := [r for r in mine if (r["bench"], r["device"]) == (bench, device)]) and (found := panels(some))
    ]


# ------------------------------------------------------------------------------------------------------------- figures


def plot(records: Records, path: str | Path) -> None:
    """Draw all records into one picture."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _groups(records)
    few = len(groups) == 1 and len(groups[0][1]) <= MOST_PANELS
    shown = [panel for _, found in groups for panel in found] or alone(records)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "hatch.linewidth": 0.6}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if few or not groups:
            _bars(figure, shown)
        else:
            _dots(figure, groups)
        benches = ", ".join(dict.fromkeys(r["bench"] for panel in shown for r in panel.records)) or "no results"
        what = "time relative to illada (= 1), less is better" if groups else "time, nothing to compare with"
        said = about(records) if len({r["device"] for r in records}) == 1 else ""  # of several: above each part
        figure.suptitle(f"{benches}: {what}\n{said}", fontsize=10)
        legend = _legend([r for panel in shown for r in panel.records], records, bool(groups) and not few)
        figure.supxlabel(legend, fontsize=8, color="0.3")
        # without the library's version, so that the same records give the same file
        figure.savefig(path, dpi=120, metadata={"Software": None} if Path(path).suffix == ".png" else None)


def _legend(shown: Records, records: Records, dots: bool) -> str:
    """Return the meaning of the signs, and the rates that the machine reaches."""
    lines = ["beside each case illada's median; " if dots else ""]
    lines[0] += "whiskers from p20 to p80"
    if any(map(noisy, shown)):
        lines[0] += f"; ~ noisy: they are more than {NOISY:.0%} of the median apart"
    if any(map(once, shown)):
        lines[0] += f"; {'hollow' if dots else 'hatched'}: one call"
    return "\n".join(line for line in (*lines, _ceilings(records)) if line)


def _bars(figure: Any, found: list[Panel]) -> None:
    """Draw each panel as bars with a linear axis of its own."""
    if not found:
        return
    columns = 1 if len(found) == 1 else 2 if len(found) <= 4 else 3
    lines = [found[i : i + columns] for i in range(0, len(found), columns)]
    heights = [0.55 + 0.26 * max(len(panel.records) for panel in line) for line in lines]
    figure.set_size_inches(max(8, 4.2 * columns + 0.6), sum(heights) + 1.1)
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    for row, line in enumerate(lines):
        for column, panel in enumerate(line):
            axes = figure.add_subplot(grid[row, column])
            _bar_panel(axes, panel)


def _bar_panel(axes: Any, panel: Panel) -> None:
    mine = panel.records[::-1]
    furthest = max(panel.relative(r) + panel.ends(r)[1] for r in mine)
    for y, r in enumerate(mine):
        x, (low, high) = panel.relative(r), panel.ends(r)
        color = OURS if r["provider"].split(",")[0] == "illada" else VARIANT if is_ours(r["provider"]) else PEER
        axes.barh(
            y, x, height=0.72, color=color, hatch="////" if once(r) else None, edgecolor="white" if once(r) else None
        )
        if low or high:
            axes.errorbar(x, y, xerr=[[low], [high]], color="0.2", elinewidth=0.9, capsize=2)
        text = f"{'~' if noisy(r) else ''}{time_text(r['median_ms'])}"
        text += "" if r is panel.base or not panel.compared else f", {_digits(x)}x"
        if r["peak_memory_bytes"]:
            text += f", {r['peak_memory_bytes'] / 2**20:,.0f} MiB"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # over the line at 1
        axes.annotate(
            text, (x + high, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box, zorder=4
        )
    axes.set_yticks(range(len(mine)), [r["provider"] for r in mine], fontsize=8)
    axes.set_xlim(0, 1.5 * furthest)
    if panel.compared:
        axes.axvline(1, color=OURS, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    else:
        axes.set_xticks([])
    axes.tick_params(axis="x", labelsize=7, colors="0.3")
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _dots(figure: Any, groups: Sequence[tuple[str, list[Panel]]]) -> None:
    """Draw a line for each case, a point for each provider, and a part of the picture for each bench and device."""
    heights = [0.7 + max(0.22 * len(found), 0.17 * len(_peers(found)) + 0.2) for _, found in groups]
    figure.set_size_inches(10, sum(heights) + 1.0)
    grid = figure.add_gridspec(len(groups), 1, height_ratios=heights)
    for i, (title, found) in enumerate(groups):
        axes = figure.add_subplot(grid[i, 0])
        _dot_panel(axes, found)
        axes.set_title(title if len(groups) > 1 else "", fontsize=9, loc="left")


def _peers(found: list[Panel]) -> list[str]:
    return list(dict.fromkeys(r["provider"] for panel in found for r in panel.records if r["provider"] != "illada"))


def _dot_panel(axes: Any, found: list[Panel]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    names = _peers(found)
    axes.axvline(1, color=OURS, linewidth=1.2)
    for i, name in enumerate(names):
        color = VARIANT if is_ours(name) else PEERS[i % len(PEERS)]
        style = {"color": color, "marker": MARKERS[i % len(MARKERS)]}
        for y, panel in enumerate(found):
            for r in (r for r in panel.records if r["provider"] == name):
                x, (low, high) = panel.relative(r), panel.ends(r)
                axes.errorbar(
                    x, y, xerr=[[low], [high]], markersize=5, elinewidth=0.8, linestyle="none",
                    markerfacecolor="white" if once(r) else style["color"], **style,
                )  # fmt: skip
                if noisy(r):
                    axes.annotate("~", (x, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.plot([], [], label=name, linestyle="none", markersize=5, **style)
    labels = [
        f"{panel.title}   {'~' if noisy(panel.base) else ''}{time_text(panel.base['median_ms'])}" for panel in found
    ]
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    shown = [(panel.relative(r), *panel.ends(r)) for panel in found for r in panel.records if r is not panel.base]
    ratios = [1.0, *(x - low for x, low, _ in shown), *(x + high for x, _, high in shown)]
    if max(ratios) > 4 * min(ratios):
        axes.set_xscale("log")
        wide = max(ratios) / min(ratios)
        subs = (1, 2, 3, 5) if wide < 50 else (1, 3) if wide < 1000 else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(ratios) / 1.15, max(ratios) * 1.15)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
