"""The `illada` command: prepare, train, generate, info."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


# ------------------------------------------------------------------------------------------------------------ prepare


def _prepare(options: argparse.Namespace) -> int:
    from illada.data import parse_special, prepare

    header = prepare(
        options.source,
        options.out,
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        special=parse_special(options.special) if options.special else None,
        validation_fraction=options.validation_fraction,
        overwrite=options.overwrite,
    )
    for split, size in header["splits"].items():
        print(f"{split:<10} {size['documents']:>8,} documents {size['tokens']:>13,} tokens {size['bytes']:>14,} bytes")
    if header["held_out"] == "ends":
        print("held out the end of each document: they are too few or too unequal to hold whole ones out")
    print(f"vocabulary {header['vocab_size']:,}, {header['dtype']}; unigram entropy of the held-out tokens "
          f"{header['validation_unigram_entropy']:.4f} nats")  # fmt: skip
    print(f"written to {options.out}")
    return 0


# -------------------------------------------------------------------------------------------------------------- train


def _train(options: argparse.Namespace) -> int:
    from illada.train import load_config, train

    if wrong := [text for text in options.overrides if not (text.startswith("--") and "=" in text and "." in text)]:
        raise ValueError(f"unknown argument {wrong[0]!r}; settings look like --section.key=value")
    config = load_config(options.config, options.overrides)
    if options.print_config:
        print(config.to_toml(commented=True))
        return 0
    if options.config is None:
        raise ValueError("train needs a configuration file; `illada train --print-config > my.toml` writes a template")
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second time: at once, without saving
        received.append(number)
        print(f"illada: {signal.Signals(number).name}, saving", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = train(config, resume=options.resume, should_stop=lambda: bool(received))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if result.finished or not received else 128 + received[0]


# ----------------------------------------------------------------------------------------------------------- generate


def _generate(options: argparse.Namespace) -> int:
    import time

    from illada.checkpoint import load_pretrained, read_config
    from illada.data import load_tokenizer, tokenizer_sha256
    from illada.generate import GenerationConfig, generate

    path = _checkpoint_of(options.checkpoint)
    tokenizer_path = Path(options.tokenizer or path)
    tokenizer = load_tokenizer(tokenizer_path)
    expected = read_config(path).get("tokenizer_sha256")
    if expected is not None and tokenizer_sha256(tokenizer_path) != expected:
        raise ValueError(f"{tokenizer_path} is not the tokenizer that {path} was trained with")
    prompts = list(options.prompt or [])
    if options.prompt_file:
        prompts += Path(options.prompt_file).read_text(encoding="utf-8").splitlines()
    if not prompts:
        prompts = [sys.stdin.read()] if not sys.stdin.isatty() else [""]
    config = GenerationConfig(
        mode=options.mode,
        gen_length=options.gen_length,
        block_length=options.block_length,
        steps=options.steps,
        temperature=options.temperature,
        rule=options.rule,
        threshold=options.threshold,
        measure=options.measure,
        stop_strings=tuple(options.stop or ()),
    )
    model = load_pretrained(path)
    tokenizer.encode_special_tokens = not options.special_tokens_in_prompt
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    began = time.monotonic()
    results = generate(model, ids, config, seed=options.seed, tokenizer=tokenizer, progress=True)
    seconds = time.monotonic() - began
    if options.json:
        for prompt, result in zip(prompts, results, strict=True):
            print(json.dumps({"prompt": prompt, **dataclasses.asdict(result)}, ensure_ascii=False))
        return 0
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{prompt}{result.text}")
        print(f"--- {len(result.tokens)} tokens, {result.forwards} forwards, {result.finish_reason}")
    print(f"{sum(len(r.tokens) for r in results)} tokens in {seconds:.1f} s", file=sys.stderr)
    return 0


def _checkpoint_of(path: str) -> Path:
    """A checkpoint folder, or the newest one of a training run's folder."""
    from illada.train.checkpoint import newest

    folder = Path(path)
    if not (folder / "config.json").is_file() and (found := newest(folder / "checkpoints")) is not None:
        return found
    return folder


# --------------------------------------------------------------------------------------------------------------- info


def _info(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        print(f"{name:<16} {value if value not in (None, '', []) else 'none'}")
    return 0


def _facts() -> dict[str, Any]:
    """What is installed and what was built; missing parts are said, not raised."""
    import illada

    facts: dict[str, Any] = {"illada": illada.__version__, "python": platform.python_version()}
    try:
        build = illada.build_info()
        facts["native module"] = f"built with {build['compiler']}, OpenMP {'on' if build['openmp'] else 'off'}"
        facts["cpu kernels"] = build["cpu_isa"]
        facts["cuda toolkit"] = build["cuda_version"] or "none: this build has no CUDA kernels"
        facts["cuda archs"] = build["cuda_archs"]
    except ImportError as error:
        facts["native module"] = str(error).splitlines()[0]
    import torch

    facts["torch"] = torch.__version__
    facts["threads"] = torch.get_num_threads()
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    for package in ("numpy", "tokenizers", "safetensors", "matplotlib"):
        try:
            from importlib.metadata import version

            facts[package] = version(package)
        except ImportError:
            facts[package] = None
    return facts


# ------------------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    import illada

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="illada",
        description="Train, sample and inspect masked diffusion language models.",
        epilog=_EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"illada {illada.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare",
        help="turn text into token files",
        description="Turn text into a corpus: tokens, document offsets, tokenizer, held-out split.",
        epilog="example:\n  illada prepare --source dir:~/books --out data/books --vocab-size 8192\n"
        "  illada prepare --source jsonl:chat.jsonl --out data/chat --tokenizer data/books/tokenizer.json",
        formatter_class=raw,
        allow_abbrev=False,
    )
    prepare.add_argument("--source", required=True, help="stdlib (Python's own source), dir:PATH or jsonl:PATH")
    prepare.add_argument("--out", required=True, metavar="DIR", help="folder to write; appears complete or not at all")
    prepare.add_argument("--vocab-size", type=int, default=4096, help="of the BPE tokenizer to train (%(default)s)")
    prepare.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer.json instead of training one")
    prepare.add_argument(
        "--special", metavar="NAME=ID,...", help="special ids of a given tokenizer: bos, pad, eos, mask"
    )
    prepare.add_argument(
        "--validation-fraction", type=float, default=0.05, help="share of the text to hold out (%(default)s)"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    prepare.set_defaults(run=_prepare)

    train = commands.add_parser(
        "train",
        help="train a model",
        description="Train the model of a TOML file. Any setting can be overridden: --section.key=value.\n"
        "Ctrl-C or SIGTERM saves and exits (130, 143); the same command goes on, bit for bit as if uninterrupted.",
        epilog="example:\n  illada train configs/demo.toml --train.steps=2000 --optimizer.learning_rate=1e-3\n"
        "  illada train --print-config > my.toml      every setting, with what it means",
        formatter_class=raw,
        allow_abbrev=False,
        usage="illada train CONFIG.toml [--section.key=value ...] [--resume auto|never|PATH] [--print-config]",
    )
    train.add_argument("config", nargs="?", metavar="CONFIG.toml")
    train.add_argument("--resume", default="auto", help="auto: go on where out_dir stopped; never; or a checkpoint")
    train.add_argument("--print-config", action="store_true", help="print the settings as commented TOML and exit")
    train.set_defaults(run=_train)

    generate = commands.add_parser(
        "generate",
        help="generate text",
        description="Continue prompts by iterative un-masking. All prompts run in one pack.",
        epilog='example:\n  illada generate runs/demo --prompt "import os" --prompt "def f(" --temperature 0.5\n'
        "  illada generate runs/demo --mode fixed --gen-length 64 --block-length 16 --steps 32 < prompt.txt",
        formatter_class=raw,
        allow_abbrev=False,
    )
    generate.add_argument("checkpoint", help="checkpoint folder, or a training run (its newest checkpoint)")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    generate.add_argument("--prompt-file", metavar="PATH", help="one prompt a line")
    generate.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    generate.add_argument(
        "--mode", default="var", help="var: append a block at a time; fixed: whole canvas (%(default)s)"
    )
    generate.add_argument("--gen-length", type=int, default=64, help="most tokens to generate (%(default)s)")
    generate.add_argument("--block-length", type=int, default=32, help="tokens filled together (%(default)s)")
    generate.add_argument(
        "--steps", type=int, default=32, help="forwards: of a block (var), of all (fixed) (%(default)s)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="of the Gumbel noise; 0 is greedy")
    generate.add_argument("--rule", default="top_k", help="top_k or threshold (%(default)s)")
    generate.add_argument("--threshold", type=float, default=0.9, help="confidence to commit at (%(default)s)")
    generate.add_argument("--measure", default="probability", help="probability, margin, entropy or random")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given several times")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--special-tokens-in-prompt", action="store_true", help="<[MASK]> in a prompt is the token, not text"
    )
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="show what is installed and built", allow_abbrev=False)
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    return parser
