"""`illada train`: train the model of a TOML file."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illada.checkpoints.folders import state_file
from illada.cli.shipped import configuration
from illada.cli.signals import importing

if TYPE_CHECKING:
    from illada.train.config import TrainConfig


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "train",
        help="train a model",
        description="Train the model of a TOML file. Any setting can be overridden: --section.key=value.\n"
        "Ctrl-C, SIGTERM and SIGHUP save and exit (130, 143, 129); the same command goes on, bit for bit.",
        epilog="example:\n  illada train configs/demo.toml --train.steps=2000 --optimizer.learning_rate=1e-3\n"
        "  illada train demo       a name alone: a configuration that comes with illada, here the same\n"
        "  illada train --print-config > my.toml      every setting, with what it means\n"
        "  illada train illada_8b --dry-run --ranks 256 --peak-tflops 989      what it would take\n"
        "  illada train --decay-now runs/demo         the run begins to decay its learning rate now",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="illada train CONFIG.toml [--section.key=value ...] [--resume auto|never|PATH] [--print-config]\n"
        "       illada train --decay-now RUN",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml")
    parser.add_argument("--resume", default="auto", help="auto: go on where out_dir stopped; never; or a checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the settings as commented TOML and exit")
    parser.add_argument(
        "--decay-now", metavar="RUN", help="ask the run in this folder to begin the decay of its learning rate"
    )
    dry = parser.add_argument_group("what a run takes, by arithmetic: nothing is allocated")
    dry.add_argument("--dry-run", action="store_true", help="print parameters, memory, FLOP and time, and exit")
    dry.add_argument("--ranks", type=int, default=1, help="devices that share a step (%(default)s)")
    dry.add_argument("--peak-tflops", type=float, metavar="P", help="dense peak of one: 989 for bfloat16 on an H100")
    dry.add_argument("--mfu", type=float, default=0.4, help="share of that peak that is reached (%(default)s)")
    dry.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if wrong := [text for text in options.overrides if not (text.startswith("--") and "=" in text and "." in text)]:
        raise ValueError(f"unknown argument {wrong[0]!r:.80}; settings look like --section.key=value")
    if options.decay_now is not None:
        return _decay_now(options)
    if options.config is None and not options.print_config:
        raise ValueError("train needs a configuration file; `illada train --print-config > my.toml` writes a template")
    with importing():
        from illada.data.dataset import TokenDataset
        from illada.train import load_config

    file = None if options.config is None else configuration(options.config)
    config = load_config(file, options.overrides)
    if options.print_config:
        print(config.to_toml(commented=True))
        return 0
    if options.dry_run:
        return _dry_run(config, options)
    given = {"--ranks": options.ranks != 1, "--peak-tflops": options.peak_tflops is not None,
             "--mfu": options.mfu != 0.4, "--json": options.json}  # fmt: skip
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"{wrong[0]} belongs to --dry-run: a run is one process and writes metrics.jsonl")
    TokenDataset(config.data.path)  # the errors of paths come before torch, which takes seconds to load
    if options.resume not in ("auto", "never"):
        state_file(Path(options.resume))
    with importing():
        from illada.train import train

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second time: at once, without saving
        received.append(number)
        with contextlib.suppress(OSError):  # unbuffered: a handler may interrupt a print; the terminal may be gone
            os.write(2, f"illada: {signal.Signals(number).name}, saving\n".encode())

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}  # nohup's choice stays
    try:
        result = train(config, resume=options.resume, should_stop=lambda: bool(received))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if result.finished or not received else 128 + received[0]


def _decay_now(options: argparse.Namespace) -> int:
    from illada.train.requests import request_decay

    if options.config is not None or options.overrides or options.print_config or options.dry_run:
        raise ValueError("--decay-now RUN stands alone: the run has its configuration")
    request_decay(Path(options.decay_now))
    print(f"asked the run in {options.decay_now}; its log says when the decay begins, at once or when it is resumed")
    return 0


def _dry_run(config: TrainConfig, options: argparse.Namespace) -> int:
    with importing():
        from illada.data.dataset import TokenDataset
        from illada.train.estimate import describe, estimate

    has_corpus = (Path(config.data.path) / "corpus.json").is_file()  # else the vocabulary of the preset
    model = config.model_config(TokenDataset(config.data.path).header if has_corpus else {})
    found = estimate(config, model, ranks=options.ranks, peak_tflops=options.peak_tflops, mfu=options.mfu)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    for line in describe(found, config):
        print(line)
    if options.ranks > 1:
        print("`illada train` is one process; docs/embedding.md says how to train on many ranks with the ops")
    return 0
