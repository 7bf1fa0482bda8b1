"""`illada plot`: the curves of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from illada.cli.signals import importing


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "plot",
        help="draw the curves of runs",
        description="Draw the curves of one or several runs over each other: loss and validation bound, loss by t,\n"
        "gradient norm, tokens/s, learning rate. A run that is going on is drawn as far as it is.",
        epilog="example:\n  illada plot runs/demo\n"
        "  illada plot runs/a runs/b --axis tokens --panels loss --output ab.svg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (train.out_dir), or a metrics.jsonl")
    parser.add_argument("--output", default="runs.png", metavar="FILE", help="PNG, SVG or PDF to write (%(default)s)")
    parser.add_argument(
        "--panels", metavar="NAME,...", help="loss, loss_by_t, grad_norm, tokens_per_second, learning_rate (all)"
    )
    parser.add_argument(
        "--axis", choices=["step", "tokens", "seconds"], default="step", help="horizontal axis (%(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    with importing():
        from illada.train.log import read_metrics
        from illada.train.plot import PANELS, draw

    panels = None
    if options.panels is not None:
        panels = [name.strip() for name in options.panels.split(",") if name.strip()]
        if unknown := [name for name in panels if name not in PANELS] or ([] if panels else [options.panels]):
            raise ValueError(f"--panels: there is no {unknown[0]!r:.80}; there are {', '.join(PANELS)}")
    runs = {}
    for name in options.runs:
        file = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        if not file.is_file():
            raise FileNotFoundError(f"{name} is not a run (no metrics.jsonl)")
        runs[name] = read_metrics(file)
        if not runs[name]:
            raise ValueError(f"{file} has no line yet")
    try:
        draw(runs, Path(options.output), panels=panels, axis=options.axis)
    except ImportError:
        raise ImportError("plot needs matplotlib; `pip install illada[plot]`") from None
    print(f"written to {options.output}")
    return 0
