"""`illada agreement`: what the caches change on given prompts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from illada.cli import sampling


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "agreement",
        help="compare the caches with none",
        description="Generate with each cache and without, and report how many tokens agree, and how the model\n"
        "without a cache scores each text (Eq. 2, nats a token; a gap below 0: it likes the cached text less).",
        epilog='example:\n  illada agreement runs/demo --prompt "import os" --prompt "class A:" --gen-length 128\n'
        "  illada agreement runs/demo --prompt-file prompts.txt --caches block --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sampling.add_model_options(parser)
    sampling.add_prompt_options(parser)
    sampling.add_sampling_options(parser, cache=False)
    parser.add_argument("--caches", default="prefix,block", metavar="NAME,...", help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="most sequences at a time (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a cache")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    model, tokenizer = sampling.load(options)
    from illada.evaluation.agreement import cache_agreement

    _, ids = sampling.read_prompts(options, model, tokenizer)
    reports = cache_agreement(
        model, ids, sampling.make_config(options, tokenizer, model.config), caches=options.caches.split(","),
        seed=options.seed, tokenizer=tokenizer, batch_size=options.batch_size, progress=True,
    )  # fmt: skip
    if options.json:
        for report in reports:
            sampling.print_json(dataclasses.asdict(report))
        return 0
    print(f"{'cache':<8}{'same tokens':>12}{'same texts':>12}{'first other':>12}{'score':>9}{'gap':>9}{'seconds':>9}")
    for r in reports:
        first = "-" if r.first_difference is None else f"{r.first_difference:.0f}"
        texts = f"{r.identical} of {r.prompts}"
        print(
            f"{r.cache:<8}{r.token_match:>12.1%}{texts:>12}{first:>12}{r.score:>9.3f}{r.score_gap:>+9.3f}{r.seconds:>9.2f}"
        )
    return 0
