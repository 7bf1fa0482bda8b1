"""`illada generate`: continue prompts, or fill their masks."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

from illada.cli import sampling


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "generate",
        help="generate text",
        description="Continue prompts by iterative un-masking. All prompts run in one pack.",
        epilog='example:\n  illada generate runs/demo --prompt "import os" --prompt "def f(" --temperature 0.5\n'
        "  illada generate runs/demo --mode fixed --gen-length 64 --block-length 16 --steps 32 < prompt.txt\n"
        '  illada generate runs/demo --mode infill --special-tokens-in-prompt --prompt "def <[MASK]>(self):"\n'
        "  illada generate LLaDA-8B-Instruct --apply-chat-template --mode fixed --gen-length 512 \\\n"
        "    --block-length 512 --steps 512 --delay-tokens eos,eot < question\n"
        "  illada generate iLLaDA-8B-Instruct --apply-chat-template --end-think-boost 100 --gen-length 2048 < question",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sampling.add_model_options(parser)
    sampling.add_prompt_options(parser)
    sampling.add_sampling_options(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="most sequences at a time (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    parser.add_argument("--output", metavar="FILE", help="write to a file, which appears complete or not at all")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import time

    sampling.check_output(options.output)
    model, tokenizer = sampling.load(options)
    from illada.generation import generate

    prompts, ids = sampling.read_prompts(options, model, tokenizer)
    config = sampling.make_config(options, tokenizer, model.config)
    began = time.monotonic()
    results = generate(
        model, ids, config, seed=options.seed, tokenizer=tokenizer, batch_size=options.batch_size,
        cuda_graphs=not options.no_cuda_graphs, progress=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    out = sys.stdout if options.output is None else io.StringIO()
    for prompt, result in zip(prompts, results, strict=True):
        if options.json:
            sampling.print_json({"prompt": prompt, **dataclasses.asdict(result)}, out)
            continue
        text = result.text if config.mode == "infill" or options.apply_chat_template else f"{prompt}{result.text}"
        print(text, file=out)
        print(f"--- {len(result.tokens)} tokens, {result.forwards} forwards, {result.finish_reason}", file=out)
    if isinstance(out, io.StringIO):
        _write(options.output, out.getvalue())
    count = sum(len(r.tokens) for r in results)
    print(f"{count} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} tokens/s", file=sys.stderr)
    return 0


def _write(file: str, text: str) -> None:
    """Write the file, or print the text and raise OSError where that fails.

    The text took its time, so it is not to be lost: it goes to standard output instead.
    """
    from illada.files import write_text

    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError:
        print(text, end="", flush=True)
        raise
    print(f"written to {file}", file=sys.stderr)
