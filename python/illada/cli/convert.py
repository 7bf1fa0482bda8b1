"""`illada convert`: checkpoints between layouts, dtypes and shard sizes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from illada.checkpoints.folders import find_checkpoint
from illada.cli.signals import importing
from illada.files import folder_to_write, recover

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "convert",
        help="rewrite a checkpoint",
        description="Rewrite a checkpoint in another dtype, layout or shard size. Tokenizer files come along.\n"
        "A layout that has no words for the architecture is refused, with what it lacks.\n"
        "--hf writes a folder that transformers 5 loads without illada, by its AutoModelForMaskedLM, AutoModel,\n"
        "AutoConfig and AutoTokenizer with trust_remote_code=True: code, named special tokens and a model card.",
        epilog="example:\n"
        "  illada convert runs/demo demo-bf16 --dtype bfloat16                 # publish a training run's weights\n"
        "  illada convert Qwen2.5-7B start --mask-token-id 151666             # a start from an autoregressive model\n"
        "  illada convert start dream --model-type dream --max-shard-size 2GB # the same weights in Dream's layout\n"
        "  illada convert runs/demo demo-hf --hf                               # for transformers, without illada\n"
        "  illada convert demo-hf back --model-type illada                     # the same weights again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, or a training run (its newest checkpoint)")
    parser.add_argument("target", metavar="DST", help="folder to write; appears complete or not at all")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: the source's)")
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--model-type", help="layout: illada, llada, dream, qwen2 or illada_hf (default: the source's)")
    layout.add_argument(
        "--hf",
        action="store_const",
        const="illada_hf",
        dest="model_type",
        help="the same as --model-type illada_hf: with code, for transformers without illada",
    )
    parser.add_argument(
        "--mask-token-id", type=int, metavar="N", help="where config.json does not name the mask (Qwen2)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    shard_bytes = parse_size(options.max_shard_size)
    _check_target(Path(options.target), options.overwrite)
    source = find_checkpoint(options.source)
    with importing():
        from illada.checkpoints.formats import LAYOUTS
        from illada.checkpoints.weights import convert_checkpoint
        from illada.cli.devices import parse_dtype

    if options.model_type not in (None, *LAYOUTS):
        raise ValueError(f"--model-type must be {', '.join(LAYOUTS)}, got {options.model_type!r}")
    dtype = parse_dtype(options.dtype)
    config = convert_checkpoint(
        source,
        options.target,
        model_type=options.model_type,
        dtype=dtype,
        mask_token_id=options.mask_token_id,
        max_shard_bytes=shard_bytes,
        progress=True,
    )
    print(f"{config.num_parameters:,} parameters in the {config.model_type} layout, mask token {config.mask_token_id}")
    print(f"written to {options.target}")
    return 0


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a checkpoint.

    A training state is none, nor is a folder with anything else in it.
    """
    recover(target)
    folder_to_write(target)
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; overwrite it with --overwrite, or choose another")
    if not (target / "config.json").is_file() or (target / "trainer.json").exists():
        raise FileExistsError(f"{target} is not a plain checkpoint, so it is not overwritten; choose another")


def parse_size(text: str) -> int:
    """Return the number of bytes in a text such as "5GB", "500 MiB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]i?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"--max-shard-size looks like 5GB, 500MiB or a number of bytes, got {text!r}")
    return size
