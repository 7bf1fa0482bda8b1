"""The options of the commands that generate, and the `GenerationConfig` they make."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from illada.checkpoints import folders as checkpoint_folders
from illada.cli.signals import importing
from illada.text.files import decode_text, read_lines

if TYPE_CHECKING:
    from illada.config import ModelConfig
    from illada.generation import GenerationConfig
    from illada.model import MaskedDiffusionModel
    from illada.text.tokenizer import Tokenizer


_END_THINK = "</think>"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model."""
    parser.add_argument("checkpoint", help="checkpoint folder, or a training run (its newest checkpoint)")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    parser.add_argument(
        "--add-bos",
        action=argparse.BooleanOptionalAction,
        help="begin each prompt with bos (default: where the tokenizer's post-processor adds it)",
    )
    parser.add_argument("--device", help="cpu (default), or cuda for a 16-bit model")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: the checkpoint's)")
    parser.add_argument("--mask-token-id", type=int, metavar="N", help="where config.json does not name the mask")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the tokenizer's own Python code, where it comes as that"
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name prompts."""
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times; default stdin")
    parser.add_argument("--prompt-file", metavar="PATH", help="one prompt a line")
    parser.add_argument(
        "--special-tokens-in-prompt", action="store_true", help="<[MASK]> in a prompt is the token, not text"
    )
    parser.add_argument("--apply-chat-template", action="store_true", help="each prompt is a user's message")


def add_sampling_options(parser: argparse.ArgumentParser, *, gen_length: int = 64, cache: bool = True) -> None:
    """Add the options of the generation.

    Without `cache`, the command decides which cache is used.
    """
    where = parser.add_argument_group("where the masks are")
    where.add_argument(
        "--mode",
        default="var",
        help="var: append a block at a time; fixed: all masks from the start; infill: the prompt's masks (%(default)s)",
    )
    where.add_argument("--gen-length", type=int, default=gen_length, help="most tokens to generate (%(default)s)")
    where.add_argument("--block-length", type=int, default=32, help="tokens filled together (%(default)s, or all)")
    where.add_argument(
        "--steps", type=int, default=32, help="forwards: of a block (var, infill), of all (fixed) (%(default)s)"
    )
    which = parser.add_argument_group("which tokens are committed")
    which.add_argument("--temperature", type=float, default=0.0, help="of the Gumbel noise; 0 is greedy")
    which.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest of sum P alone"
    )
    which.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest alone")
    which.add_argument(
        "--confidence-at-temperature", action="store_true", help="Dream's confidence; also with --top-p and --top-k"
    )
    which.add_argument("--measure", default="probability", help="of confidence: probability, margin, entropy, random")
    which.add_argument("--rule", default="quota", help="quota, threshold, factor, entropy_bound, origin (%(default)s)")
    which.add_argument("--schedule", default="even", help="of the quota: even (LLaDA) or dream (%(default)s)")
    which.add_argument("--eps", type=float, default=1e-3, help="last t of schedule dream and rule origin (%(default)s)")
    which.add_argument("--threshold", type=float, default=0.9, help="confidence to commit at (%(default)s)")
    which.add_argument("--factor", type=float, default=1.0, help="of rule factor (%(default)s)")
    which.add_argument("--entropy-bound", type=float, default=0.1, help="in nats (%(default)s)")
    which.add_argument("--alg-temp", type=float, default=0.0, help="draw the quota's positions at this temperature")
    which.add_argument("--take-back", type=float, default=0.0, metavar="P", help="ReMDM: re-mask with up to P a step")
    which.add_argument("--cfg-scale", type=float, default=0.0, help="classifier-free guidance; doubles the work")
    which.add_argument("--forbid-tokens", metavar="ID,...", help="never sampled: ids, or eos, eot, bos, pad, mask")
    which.add_argument("--delay-tokens", metavar="ID,...", help="committed last: LLaDA-Instruct's is eos,eot")
    which.add_argument("--end-think", default=_END_THINK, metavar="TEXT", help="what ends reasoning (%(default)s)")
    which.add_argument("--end-think-boost", type=float, default=0.0, help="encourage it: 100 as published, 0 never")
    which.add_argument("--end-think-power", type=float, default=2.0, help="how late the boost comes (%(default)s)")
    which.add_argument("--seed", type=int, default=0)
    other = parser.add_argument_group("stopping and speed")
    other.add_argument("--stop", action="append", metavar="TEXT", help="stop string; may be given several times")
    if cache:
        other.add_argument("--cache", default="none", help="none (exact), prefix or block: see `illada agreement`")
        other.add_argument("--no-cuda-graphs", action="store_true", help="launch each kernel of a step by itself")


def check_paths(options: argparse.Namespace) -> None:
    """Raise FileNotFoundError for an option's path that does not exist, before torch takes seconds to load."""
    checkpoint_folders.find_checkpoint(options.checkpoint)
    for name in ("tokenizer", "prompt_file", "chat_template", "file"):
        path = getattr(options, name, None)
        if path is not None and not os.path.exists(path):
            raise FileNotFoundError(f"--{name.replace('_', '-')}: there is no {path}")


def load(options: argparse.Namespace) -> tuple[Any, Tokenizer]:
    """Return (model, tokenizer) of `add_model_options`."""
    check_paths(options)
    with importing():
        from illada.checkpoints.weights import load_config, stored_dtype  # with the native modules that loading needs
        from illada.cli.devices import parse_device, parse_dtype
        from illada.ops import why_not

    device, dtype = parse_device(options.device), parse_dtype(options.dtype)
    if device.type != "cpu":  # whose kernels serve every checkpoint
        folder = checkpoint_folders.find_checkpoint(options.checkpoint)
        config = load_config(folder, mask_token_id=options.mask_token_id)
        reason = why_not(
            "varlen_attention", device, dtype or stored_dtype(folder, config), head_dim=config.head_size,
            num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads,
        )  # fmt: skip
        if reason is not None:
            raise ValueError(f"--device {device}: {reason}")
    return checkpoint_folders.load(
        options.checkpoint, options.tokenizer, device=device, dtype=dtype, mask_token_id=options.mask_token_id,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def prefix(options: argparse.Namespace, model: MaskedDiffusionModel) -> list[int] | None:
    """Return the ids that prompts begin with by --add-bos, or None for what the tokenizer adds."""
    from illada.text.tokenizer import bos_prefix

    return bos_prefix(options.add_bos, model.config.bos_token_id, "--add-bos")


def read_prompts(
    options: argparse.Namespace, model: MaskedDiffusionModel, tokenizer: Tokenizer
) -> tuple[list[str], list[list[int]]]:
    """Return (texts, token ids) of `add_prompt_options`.

    Without any of these options, standard input is the prompt.
    """
    prompts, begin = list(options.prompt or []), prefix(options, model)
    if options.prompt_file:
        lines = [line for _, line in read_lines(options.prompt_file)]
        if not lines:
            raise ValueError(f"--prompt-file: {options.prompt_file} holds no prompt")
        prompts += lines
    if not prompts:
        prompts = [_read_stdin()]
    if options.apply_chat_template:
        rendered = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) for prompt in prompts]
        return prompts, [tokenizer.encode_prompt(text, prefix=begin) for text in rendered]
    parse = options.special_tokens_in_prompt
    return prompts, [tokenizer.encode_prompt(text, prefix=begin, parse_special_tokens=parse) for text in prompts]


def _read_stdin() -> str:
    """Return all of standard input, or nothing where it is a terminal."""
    if sys.stdin is None:
        raise ValueError("standard input is closed, so there is no prompt; give --prompt or --prompt-file")
    if sys.stdin.isatty():
        return ""
    buffer = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if buffer is None else decode_text(buffer.read(), "standard input")


def check_output(file: str | None) -> None:
    """Raise ValueError if --output is a folder."""
    if file is not None and os.path.isdir(file):
        raise ValueError(f"--output must be a file, {file} is a folder")


def print_json(record: dict[str, Any], file: TextIO | None = None) -> None:
    """Print one line of JSON.

    Where the output's encoding is not Unicode, characters outside of ASCII are escaped.
    """
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    print(json.dumps(record, ensure_ascii=not encoding.lower().startswith("utf")), file=file)


def make_config(options: argparse.Namespace, tokenizer: Tokenizer, model: ModelConfig) -> GenerationConfig:
    """Return the `GenerationConfig` of `add_sampling_options`."""
    from illada.generation import GenerationConfig

    special = ("forbid_tokens", "delay_tokens")
    fields = {f.name for f in dataclasses.fields(GenerationConfig)} - {"end_think", *special}
    given = {name: value for name, value in vars(options).items() if name in fields}
    if options.mode != "infill":
        given["block_length"] = min(options.block_length, options.gen_length)
    given |= {name: parse_token_ids(getattr(options, name), model, name) for name in special}
    if options.end_think != _END_THINK and not options.end_think_boost:
        raise ValueError(f"--end-think ({options.end_think!r}) is not used: it belongs to an --end-think-boost above 0")
    if options.confidence_at_temperature and not options.temperature:
        raise ValueError("--confidence-at-temperature is not used: it belongs to a --temperature above 0")
    end_think = tuple(tokenizer.encode(options.end_think)) if options.end_think_boost else ()
    return GenerationConfig(**given, end_think=end_think, stop_strings=tuple(options.stop or ()))


def parse_token_ids(text: str | None, model: ModelConfig, name: str) -> tuple[int, ...]:
    """Return the ids in a text such as "2,eot": numbers, and names of the model's special ids.

    ValueError, which names the option: something else stands there.
    """
    special = {kind: getattr(model, f"{kind}_token_id") for kind in ("eos", "eot", "bos", "pad", "mask")}
    ids = []
    for word in text.split(",") if text else ():
        found = int(word) if word.strip().isdecimal() else special.get(word.strip())
        if found is None:
            there = ", ".join(f"{kind} ({token})" for kind, token in special.items() if token is not None)
            raise ValueError(f"--{name.replace('_', '-')} takes ids and, of this model, {there}; got {word!r}")
        ids.append(found)
    return tuple(ids)
