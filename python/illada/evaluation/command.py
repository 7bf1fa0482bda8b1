"""lm_eval's own command, which knows the models of `illada.evaluation.lm_eval` once that is imported; and its logs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch


def main() -> None:
    """Run lm_eval's command.

    Packs are as large as memory allows unless --batch_size says otherwise.
    """
    from lm_eval.__main__ import cli_evaluate

    evaluates = _given("--tasks", "-t") and sys.argv[1] != "validate"
    if evaluates and not _given("--batch_size", "-b"):
        sys.argv += ["--batch_size", "auto"]
    # lm_eval's own default is cuda:0.
    if evaluates and not _given("--device", "--config", "-C") and not torch.cuda.device_count():
        if os.environ.get("RANK", "0") == "0":
            print("no GPU here and no --device given: on the CPU", file=sys.stderr)
        sys.argv += ["--device", "cpu"]
    cli_evaluate()


def _given(option: str, *more: str) -> bool:
    """Return whether one of these options is on the command line.

    The forms are `--name value`, `--name=value`, `-n value` and `-nvalue`.
    """
    names = (option, *more)
    short = tuple(name for name in names if not name.startswith("--"))
    return any(part.partition("=")[0] in names or part.startswith(short) for part in sys.argv[1:])


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Let lm_eval and datasets log only warnings within the context."""

    def matters(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()  # said of every task that reads its own files

    names = ("lm_eval", "datasets", "lm_eval.api.task")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
        logger.addFilter(matters)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.removeFilter(matters)
