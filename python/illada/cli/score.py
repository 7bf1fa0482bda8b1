"""`illada score`: rank continuations of a context."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from illada.cli import sampling
from illada.text.files import parse_json, read_lines


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "score",
        help="score candidates after a context",
        description="Score candidate continuations of contexts, all in packs, and say which is the best.",
        epilog='example:\n  illada score runs/demo --context "import os" --candidate ".path" --candidate " as np"\n'
        "  illada score runs/demo --file questions.jsonl --method monte-carlo --json\n"
        'questions.jsonl holds one {"context": "...", "candidates": ["...", "..."]} a line.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sampling.add_model_options(parser)
    parser.add_argument("--context", metavar="TEXT", default="", help="what the candidates follow (default: nothing)")
    parser.add_argument("--candidate", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--file", metavar="PATH", help="JSON lines with context and candidates")
    parser.add_argument(
        "--method",
        choices=["confidence", "monte-carlo"],
        default="confidence",
        help="Eq. 2 of the paper, or a bound on the log-likelihood (%(default)s)",
    )
    parser.add_argument("--num-samples", type=int, default=128, help="of monte-carlo (%(default)s)")
    parser.add_argument(
        "--stratum", type=int, default=16, help="of monte-carlo: samples of spread counts (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of monte-carlo's masks")
    parser.add_argument("--append-eos", action="store_true", help="the model sees an eos after each candidate")
    parser.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance, 0 is none")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a pack (%(default)s)")
    parser.add_argument("--truncate-left", action="store_true", help="cut the start of contexts that are too long")
    parser.add_argument("--json", action="store_true", help="one JSON object a question")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    import time

    sampling.check_paths(options)
    questions = _questions(options)
    model, tokenizer = sampling.load(options)
    from illada.score import confidence_score, encode_pair, monte_carlo_likelihood, truncate_context

    begin = sampling.prefix(options, model)
    kept = len(tokenizer.begin_prompt([], begin))
    contexts: list[list[int]] = []
    continuations: list[list[int]] = []
    for where, context, candidates in questions:
        for candidate in candidates:
            ids, more = encode_pair(tokenizer, context, candidate, prefix=begin)
            if not more:
                raise ValueError(
                    f"{where}: candidate {candidate!r} has no score after {context!r}: the tokenizer drops its text"
                )
            if options.truncate_left:
                ids = truncate_context(model.config, ids, more, append_eos=options.append_eos, keep=kept)
            contexts.append(ids)
            continuations.append(more)
    shared: dict[str, Any] = {
        "append_eos": options.append_eos,
        "cfg_scale": options.cfg_scale,
        "max_tokens": options.max_tokens,
        "progress": True,
    }
    began = time.monotonic()
    if options.method == "confidence":
        scores = [result.score for result in confidence_score(model, contexts, continuations, **shared)]
    else:
        draws = {"num_samples": options.num_samples, "stratum": options.stratum, "seed": options.seed}
        scores = monte_carlo_likelihood(model, contexts, continuations, **draws, **shared)
    seconds = time.monotonic() - began
    start = 0
    for _, context, candidates in questions:
        mine = scores[start : start + len(candidates)]
        start += len(candidates)
        best = max(range(len(mine)), key=mine.__getitem__)
        if options.json:
            record = {"context": context, "candidates": candidates, "scores": mine, "best": best}
            sampling.print_json(record)
            continue
        for i, (candidate, score) in enumerate(zip(candidates, mine, strict=True)):
            print(f"{'*' if i == best else ' '} {score:12.4f}  {candidate!r}")
    print(f"{len(scores)} candidates of {len(questions)} questions in {seconds:.1f} s", file=sys.stderr)
    return 0


def _questions(options: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """Return (where, context, candidates) of each question, from the options and from the file."""
    found: list[tuple[str, str, list[str]]] = []
    if options.candidate:
        if "" in options.candidate:
            raise ValueError("--candidate is empty; an empty text has no score")
        found.append(("--candidate", options.context, options.candidate))
    elif options.context or not options.file:
        raise ValueError("score needs a --candidate after the --context, or a --file of questions")
    if options.file:
        found += [(where, *_question(line, where)) for where, line in read_lines(options.file) if line.strip()]
    return found


def _question(line: str, where: str) -> tuple[str, list[str]]:
    try:
        record = parse_json(line, where)
        context, candidates = record["context"], record["candidates"]
    except (KeyError, TypeError):
        context, candidates = None, None
    if not (
        isinstance(context, str)
        and isinstance(candidates, list)
        and candidates
        and all(isinstance(candidate, str) and candidate for candidate in candidates)
    ):
        raise ValueError(f'{where}: expected {{"context": "...", "candidates": ["...", "..."]}}, no candidate empty')
    return context, candidates
