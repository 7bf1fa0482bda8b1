"""`illada chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from illada.cli import sampling

_COMMANDS = "/reset forgets the conversation, /undo the last turn, /exit leaves (as does Ctrl-D)"


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="A conversation in the terminal, through the checkpoint's chat template. Answers appear\n"
        f"block by block. {_COMMANDS}. Ctrl-C stops an answer.",
        epilog="example:\n  illada chat iLLaDA-8B-Instruct --gen-length 2048 --end-think-boost 100\n"
        "  illada chat runs/sft --chat-template my-template.jinja --cache prefix --rule threshold --threshold 0.9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sampling.add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--chat-template", metavar="PATH", help="Jinja file; default the checkpoint's own template")
    sampling.add_sampling_options(parser, gen_length=512)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    model, tokenizer = sampling.load(options)
    if options.chat_template:
        tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{options.checkpoint} has no chat template, so it is perhaps a base model: use `illada generate`, or give "
            "--chat-template"
        )
    if options.mode == "infill":
        raise ValueError("--mode infill fills masks in a text; a chat goes with var or fixed")
    config = sampling.make_config(options, tokenizer, model.config)
    start = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{_COMMANDS}.", file=sys.stderr)
        try:
            import readline  # noqa: F401 (line editing and history of input)
        except ImportError:
            pass
    turns = 0
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(start)
        elif text == "/undo":
            messages = messages[: max(len(start), len(messages) - 2)]
        elif text.startswith("/"):
            print(f"no command {text.split()[0]}; {_COMMANDS}", file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(
                    model, tokenizer, messages, config, seed=options.seed + turns, graphs=not options.no_cuda_graphs
                )
            except ValueError as error:  # too long, or refused by the template: the conversation goes on without it
                print(f"illada: {error}", file=sys.stderr)
                messages.pop()
                continue
            except KeyboardInterrupt:
                print("\n(stopped; the turn is forgotten)", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})
            turns += 1


def _answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], config: Any, *, seed: int, graphs: bool) -> str:
    """Generate one answer and print it as its blocks come."""
    from illada.generation import generate
    from illada.generation.loop import stop_ids

    ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
    ends, tokens, shown = stop_ids(config, model), list[int](), ""

    def show(index: int, block: list[int]) -> None:
        nonlocal shown
        if not ends.intersection(tokens):
            tokens.extend(block)
        cut = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")  # half a character waits for its other half
        for stop in config.stop_strings:
            text = text.split(stop)[0]
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    result = generate(model, [ids], config, seed=seed, tokenizer=tokenizer, cuda_graphs=graphs, on_block=show)[0]
    rest = (result.text or "")[len(shown) :]
    print(rest, flush=True)
    return result.text or ""
