"""`illada chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from illada.cli import sampling
from illada.text.files import check_text

_COMMANDS = "/reset forgets the conversation, /undo the last turn, /exit leaves (as does Ctrl-D); // sends a slash"


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
    if sys.stdin is None:
        raise ValueError("standard input is closed; a chat reads its messages there")
    model, tokenizer = sampling.load(options)
    if options.chat_template:
        from illada.text.tokenizer import read_template

        tokenizer.chat_template = read_template(options.chat_template)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{options.checkpoint} has no chat template, so it is perhaps a base model: use `illada generate`, or give "
            "--chat-template"
        )
    if options.mode == "infill":
        raise ValueError("--mode infill fills masks in a text; a chat goes with var or fixed")
    config, prefix = sampling.make_config(options, tokenizer, model.config), sampling.prefix(options, model)
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
            text = _read_line(interactive).strip()
        except EOFError:
            return 0
        except ValueError as error:
            print(f"illada: {error}; it is not sent", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(start)
        elif text == "/undo":
            messages = messages[: max(len(start), len(messages) - 2)]
        elif text.startswith("/") and not text.startswith("//"):
            print(f"no command {text.split()[0]}; {_COMMANDS}", file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text[1:] if text.startswith("//") else text})
            try:
                ids = tokenizer.encode_prompt(tokenizer.apply_chat_template(messages), prefix=prefix)
                answer = _answer(
                    model, tokenizer, ids, config, seed=options.seed + turns, graphs=not options.no_cuda_graphs
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


def _read_line(interactive: bool) -> str:
    """Return the next line.

    EOFError: there is none. ValueError: the line is not UTF-8; the lines after it are not lost.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        if interactive or buffer is None:
            return check_text(input("> " if interactive else ""), "the line")
        if line := buffer.readline():
            return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 text: byte 0x{error.object[error.start]:02x}") from None
    raise EOFError


def _answer(model: Any, tokenizer: Any, ids: list[int], config: Any, *, seed: int, graphs: bool) -> str:
    """Generate one answer and print it as its blocks come."""
    from illada.generation import generate_iter

    answer = ""
    for delta in generate_iter(model, [ids], config, seed=seed, tokenizer=tokenizer, cuda_graphs=graphs):
        print(delta.text, end="", flush=True)
        if delta.result is not None:
            answer = delta.result.text or ""
    print(flush=True)
    return answer
