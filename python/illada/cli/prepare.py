"""`illada prepare`: from text to token files."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "prepare",
        help="turn text into token files",
        description="Turn text into a corpus: tokens, document offsets, tokenizer, held-out split.",
        epilog="example:\n  illada prepare --source dir:~/books --out data/books --vocab-size 8192\n"
        "  illada prepare --source jsonl:chat.jsonl --out data/chat --tokenizer data/books/tokenizer.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--source", required=True, help="stdlib (Python's own source), dir:PATH or jsonl:PATH")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; appears complete or not at all")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the BPE tokenizer to train (%(default)s)")
    parser.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer.json instead of training one")
    parser.add_argument(
        "--special", metavar="NAME=ID,...", help="special ids of a given tokenizer: bos, pad, eos, mask"
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.05, help="share of the text to hold out (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
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
