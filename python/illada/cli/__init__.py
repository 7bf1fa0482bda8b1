"""The `illada` command, with one file for each subcommand."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from illada.cli import agreement, benchmark, chat, convert, evaluate, generate, info, plot, prepare, score, train
from illada.cli.signals import Ended, as_exceptions, say
from illada.text.files import check_text

_EXAMPLES = """\
from nothing to text, on a CPU:
  illada prepare --source stdlib --out data/stdlib
  illada train demo --data.path=data/stdlib
  illada generate runs/demo --prompt "def main("
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 2: bad usage, configuration or input, said in one line (ILLADA_DEBUG=1 shows where it came from).
    1: an error that nobody expected, in one line as well.
    130, 143, 129: ended by SIGINT, SIGTERM or SIGHUP; training saved a checkpoint before it went. 141: what read its
    output is gone, likewise.
    """
    return guarded(lambda: _main(arguments))


def guarded(run: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    Where a signal ended it, or its output lost the reader, it is the status for that.
    """
    _open_standard_streams()
    try:
        with as_exceptions():
            return run()
    except KeyboardInterrupt:
        say("illada: interrupted")
        return 130
    except Ended as end:
        return 128 + end.number
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # what is buffered has no reader, and is not flushed at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _open_standard_streams() -> None:
    """Open closed standard streams on the null device, so that no opened file gets their descriptors."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this
            os.set_inheritable(descriptor, True)
        if name != "stdin" and getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", errors="replace", closefd=False))


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "train":
        options.overrides = rest
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or locale that lacks a character gets its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _check_texts(options)
            status = options.run(options)
            sys.stdout.flush()  # a reader that is gone is noticed here, not at the exit
            return status
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, ArithmeticError) as error:
        if _debugs():
            raise
        say(f"illada: error: {error}")
        return 2
    except MemoryError as error:
        if _debugs():
            raise
        say(f"illada: error: out of memory{f': {error}' if str(error) else ''}")
        return 2
    except Exception as error:
        if _debugs():
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        say(f"illada: error: {type(error).__name__}: {first} (ILLADA_DEBUG=1 shows where it came from)")
        return 1


def _debugs() -> bool:
    return os.environ.get("ILLADA_DEBUG", "") not in ("", "0")


def _show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
    """Print a warning in one line, like an error.

    Where in the code it came from helps no user.
    """
    print(f"illada: warning: {message}", file=sys.stderr)


def _check_texts(options: argparse.Namespace) -> None:
    """Raise ValueError if an argument that a model gets, not a path, was not UTF-8."""
    for name in ("prompt", "context", "candidate", "system", "stop", "end_think"):
        value = getattr(options, name, None)
        for text in [value] if isinstance(value, str) else value or []:
            check_text(text, f"--{name.replace('_', '-')}")


class _Version(argparse.Action):
    """The option --version, whose value is looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from illada._native import package_version

        print(f"illada {package_version()}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="illada",
        description="Train, sample, score, convert and inspect masked diffusion language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (prepare, train, plot, generate, chat, score, evaluate, agreement, convert, benchmark, info):
        command.add_parser(commands)
    return parser
