"""The `illada` command; one file a subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from illada.cli import agreement, chat, convert, evaluate, generate, info, prepare, score, train

_EXAMPLES = """\
from nothing to text, on a CPU:
  illada prepare --source stdlib --out data/stdlib
  illada train configs/demo.toml
  illada generate runs/demo --prompt "def main("
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    0: done. 2: bad usage, configuration or input, said in one line (ILLADA_DEBUG=1 shows where it came from).
    130, 143: training was stopped by SIGINT or SIGTERM; it saved a checkpoint before it went.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "train":
        options.overrides = rest
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, ArithmeticError) as error:
        if os.environ.get("ILLADA_DEBUG", "") not in ("", "0"):
            raise
        print(f"illada: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("illada: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    import illada

    parser = argparse.ArgumentParser(
        prog="illada",
        description="Train, sample, score, convert and inspect masked diffusion language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"illada {illada.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (prepare, train, generate, chat, score, evaluate, agreement, convert, info):
        command.add_parser(commands)
    return parser
