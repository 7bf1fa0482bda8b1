"""`illada generate`: continue prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "generate",
        help="generate text",
        description="Continue prompts by iterative un-masking. All prompts run in one pack.",
        epilog='example:\n  illada generate runs/demo --prompt "import os" --prompt "def f(" --temperature 0.5\n'
        "  illada generate runs/demo --mode fixed --gen-length 64 --block-length 16 --steps 32 < prompt.txt",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="checkpoint folder, or a training run (its newest checkpoint)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", metavar="PATH", help="one prompt a line")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    parser.add_argument(
        "--mode", default="var", help="var: append a block at a time; fixed: whole canvas (%(default)s)"
    )
    parser.add_argument("--gen-length", type=int, default=64, help="most tokens to generate (%(default)s)")
    parser.add_argument("--block-length", type=int, default=32, help="tokens filled together (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=32, help="forwards: of a block (var), of all (fixed) (%(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of the Gumbel noise; 0 is greedy")
    parser.add_argument("--rule", default="top_k", help="top_k or threshold (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence to commit at (%(default)s)")
    parser.add_argument("--measure", default="probability", help="probability, margin, entropy or random")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--special-tokens-in-prompt", action="store_true", help="<[MASK]> in a prompt is the token, not text"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import time

    from illada.cli.checkpoints import load
    from illada.generation import GenerationConfig, generate

    model, tokenizer = load(options.checkpoint, options.tokenizer)
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
    parse = options.special_tokens_in_prompt
    ids = [tokenizer.encode(prompt, parse_special_tokens=parse) for prompt in prompts]
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
