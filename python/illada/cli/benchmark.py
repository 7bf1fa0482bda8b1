"""`illada benchmark`: ours against its peers on this machine, as `python -m benchmarks` in a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from illada.cli.shipped import PACKAGE, shipped
from illada.cli.signals import importing


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser.

    Its options are those of the benchmarks, which import torch.
    """
    parser = commands.add_parser(
        "benchmark",
        help="time the ops, generation, scoring and training against their peers",
        add_help=False,
        prefix_chars="\0",  # nothing begins with it, so every argument goes on to the benchmarks
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    folder = shipped("benchmarks")
    name = "illada.benchmarks"
    if folder.parent != PACKAGE:
        sys.path.insert(0, str(folder.parent))
        name = "benchmarks"
    with importing():
        import torch  # noqa: F401

        module = importlib.import_module(f"{name}.__main__")
    status: int = module.main(options.arguments, prog="illada benchmark")
    return status
