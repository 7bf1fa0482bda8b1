"""Plots of runs, from the records of their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from illada.files import replaced

Records = Sequence[Mapping[str, Any]]

#: What the horizontal axis may be: the key of a record, and its label.
AXES = {"step": "step", "tokens": "tokens seen", "seconds": "seconds of this process"}


def draw(runs: Mapping[str, Records], file: Path, *, panels: Sequence[str] | None = None, axis: str = "step") -> None:
    """Draw runs over each other.

    Args:
        runs: {name: records of metrics.jsonl, in order}.
        file: PNG, SVG or PDF, by its suffix; it is replaced whole.
        panels: Names of `PANELS`; None: all.
        axis: A key of `AXES`.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(PANELS) if panels is None else list(panels)
    rows = (len(shown) + 1) // 2 if len(shown) > 1 else 1
    # No pyplot: no global state, no display.
    figure = Figure(figsize=(8 if len(shown) == 1 else 13, 4.5 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 1 if len(shown) == 1 else 2, squeeze=False).flat
    for axes, panel in zip(grid, shown, strict=False):
        for number, (name, records) in enumerate(runs.items()):
            PANELS[panel](axes, records, axis, f"C{number % 10}", name if len(runs) > 1 else "")
        axes.set_xlabel("t, the share of masked tokens" if panel == "loss_by_t" else AXES[axis])
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    for axes in list(grid)[len(shown) :]:
        axes.set_visible(False)
    known = canvas.get_supported_filetypes()
    kind = file.suffix.removeprefix(".").lower()
    if kind not in known:
        raise ValueError(f"the suffix of {file} must be one of .{', .'.join(sorted(known))}")
    with replaced(file) as stream:
        figure.savefig(stream, format=kind, dpi=120)


def _points(records: Records, kind: str, key: str, axis: str) -> tuple[list[float], list[float]]:
    """Return the values of `key` in the records of a kind, and where they lie on the axis."""
    xs: list[float] = []
    ys: list[float] = []
    tokens = 0
    for record in records:
        tokens = record.get("tokens_seen", tokens)  # a validation has none: those of the training line before
        place = tokens if axis == "tokens" else record.get(axis)
        if record["kind"] == kind and record.get(key) is not None and place is not None:
            xs.append(place)
            ys.append(record[key])
    return xs, ys


def _label(run: str, what: str) -> str:
    return f"{run}: {what}" if run else what


def _loss(axes: Any, records: Records, axis: str, color: str, run: str) -> None:
    xs, ys = _points(records, "train", "loss", axis)
    if xs:
        faint = {"color": color, "alpha": 0.35} if run else {"color": "0.7"}
        axes.plot(xs, ys, linewidth=1, label=_label(run, "training loss (1/t weighted)"), **faint)
    xs, ys = _points(records, "validation", "bound", axis)
    if xs:
        axes.plot(xs, ys, marker="o", markersize=3, color=color, label=_label(run, "validation bound"))
        entropies = {record["unigram_entropy"] for record in records if record["kind"] == "validation"}
        for entropy in entropies if not run else ():
            axes.axhline(entropy, color="C1", linestyle="--", linewidth=1, label="unigram entropy")
    for at in _points(records, "decay", "step", axis)[0]:
        axes.axvline(at, color=color, linestyle=":", linewidth=1, label=_label(run, "decay begins"))
    axes.set_ylabel("nats per token")


def _loss_by_t(axes: Any, records: Records, axis: str, color: str, run: str) -> None:
    lines = [record for record in records if record["kind"] == "train" and record.get("loss_by_t")]
    if not lines:
        return
    buckets = len(lines[-1]["loss_by_t"])
    last = [line for line in lines[-max(1, len(lines) // 10) :] if len(line["loss_by_t"]) == buckets]
    means = []
    for bucket in range(buckets):
        values = [line["loss_by_t"][bucket] for line in last if line["loss_by_t"][bucket] is not None]
        means.append(sum(values) / len(values) if values else float("nan"))
    places = [(bucket + 0.5) / buckets for bucket in range(buckets)]
    axes.plot(places, means, marker="o", markersize=3, color=color, label=_label(run, "last tenth of the run"))
    axes.set_ylabel("nats per masked token")


def _value(key: str, unit: str) -> Callable[..., None]:
    def panel(axes: Any, records: Records, axis: str, color: str, run: str) -> None:
        xs, ys = _points(records, "train", key, axis)
        if xs:
            axes.plot(xs, ys, linewidth=1, color=color, label=_label(run, unit) if run else None)
        axes.set_ylabel(unit)

    return panel


#: {name: function that draws one run into one panel}.
PANELS: dict[str, Callable[..., None]] = {
    "loss": _loss,
    "loss_by_t": _loss_by_t,
    "grad_norm": _value("grad_norm", "gradient norm"),
    "tokens_per_second": _value("tokens_per_second", "tokens/s"),
    "learning_rate": _value("learning_rate", "learning rate"),
}
