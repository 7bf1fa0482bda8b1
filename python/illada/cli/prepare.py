"""`illada prepare`: from text to token files, and to evaluation tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from illada.cli.signals import importing


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "prepare",
        help="turn text into token files and evaluation tasks",
        description="Turn text into a corpus: tokens, document offsets, tokenizer, held-out split. With --tasks also\n"
        "into tasks for `illada eval`, made from the held-out split; without --source, of a corpus that is there.",
        epilog="example:\n  illada prepare --source dir:~/books --out data/books --vocab-size 8192\n"
        "  illada prepare --source jsonl:chat.jsonl --out data/chat --tokenizer data/books/tokenizer.json\n"
        "  illada prepare --source ~/books --source csv:reviews.csv.gz --text-column body --out data/both\n"
        "  illada prepare --source stdlib --out data/stdlib --tasks all\n"
        "  illada prepare --out data/stdlib --tasks definitions --dictionary wordnet:/usr/share/wordnet --overwrite",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--source",
        action="append",
        help="stdlib (Python's own source); a folder or file; or one of dir:PATH, file:PATH, jsonl:PATH, csv:PATH, "
        "parquet:PATH (also .gz, .zst), hf:PATH (a dataset of save_to_disk; its split after a #); may be repeated",
    )
    parser.add_argument(
        "--text-column", metavar="NAME", help="of jsonl, csv, parquet and hf: the field or column of the text (text)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; appears complete or not at all")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the BPE tokenizer to train (%(default)s)")
    parser.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer.json instead of training one")
    parser.add_argument(
        "--special", metavar="NAME=ID,...", help="special ids of a given tokenizer: bos, pad, eos, mask"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, help="share of the text to hold out (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus, or its tasks")
    tasks = parser.add_argument_group("tasks, written to DIR/tasks")
    tasks.add_argument(
        "--tasks", metavar="NAME,...", help="definitions, cloze, cloze_word; all: what there is text for"
    )
    tasks.add_argument(
        "--dictionary", default="docstrings", help="of definitions: docstrings or wordnet:PATH (%(default)s)"
    )
    tasks.add_argument("--questions", type=int, default=400, help="most questions of a task (%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.source is None and options.tasks is None:
        raise ValueError("prepare needs --source, the text to prepare (or --tasks, of a corpus that is at --out)")
    if options.source is not None:
        _prepare_corpus(options)
    if options.tasks is not None:
        with importing():
            from illada.evaluation.tasks import TASKS, prepare_tasks

        names = None if options.tasks == "all" else [name.strip() for name in options.tasks.split(",") if name.strip()]
        counts = prepare_tasks(
            options.out, names, dictionary=options.dictionary, questions=options.questions, overwrite=options.overwrite
        )
        for name, count in counts.items():
            print(f"{name:<12} {count:>6,} questions")
        for name in TASKS if names is None else ():
            if name not in counts:
                print(f"{name:<12} left out: too few questions in the held-out text (--validation-fraction)")
        print(f"written to {Path(options.out) / 'tasks'}")
    return 0


def _prepare_corpus(options: argparse.Namespace) -> None:
    with importing():
        from illada.data.corpus import prepare
        from illada.text.training import parse_special

    header = prepare(
        options.source,
        options.out,
        vocab_size=options.vocab_size,
        tokenizer=options.tokenizer,
        special=parse_special(options.special) if options.special else None,
        validation_fraction=options.validation_fraction,
        text_column=options.text_column,
        overwrite=options.overwrite,
    )
    if len(header["sources"]) > 1:
        for source in header["sources"]:
            print(f"{source['documents']:>19,} documents of {source['name']}")
    for split, size in header["splits"].items():
        print(f"{split:<10} {size['documents']:>8,} documents {size['tokens']:>13,} tokens {size['bytes']:>14,} bytes")
    if ends := [source["name"] for source in header["sources"] if source["held_out"] == "ends"]:
        of = f" of {', '.join(ends)}" if len(header["sources"]) > 1 else ""
        print(f"held out the end of each document{of}: they are too few or too unequal to hold whole ones out")
    print(f"vocabulary {header['vocab_size']:,}, {header['dtype']}; unigram entropy of the held-out tokens "
          f"{header['validation_unigram_entropy']:.4f} nats")  # fmt: skip
    print(f"written to {options.out}")
