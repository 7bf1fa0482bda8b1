"""The demo on a CPU: prepare the standard library's functions, train the tiny model, generate text.

    python examples/demo.py --out runs/demo

The same as `illada prepare --source jsonl:...`, `illada train configs/demo.toml` and `illada generate`, through the
Python API. Leaves the text, the corpus, the checkpoint, loss.png and summary.json in the output folder; run again, it
trains anew.
"""

import argparse
import ast
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

from illada import load_pretrained
from illada.data.corpus import prepare
from illada.data.sources import read_source
from illada.generation import GenerationConfig, generate
from illada.model import MaskedDiffusionModel
from illada.text.tokenizer_files import load_tokenizer
from illada.train import load_config, train

PROMPTS = ["def __init__(self, ", "def get_", "def __repr__(self):\n    return "]
VOCAB_SIZE = 1024  # small, so that a few minutes are enough to learn what follows what
LONGEST = 1000  # characters of a function: a training window holds about 330


def functions() -> Iterator[str]:
    """Yield the standard library's functions and methods, each once, as `ast.unparse` writes them without docstrings.

    Without comments and in one style, the text is regular enough for a model of a million parameters.
    """
    seen = set()
    for text in read_source("stdlib"):
        with warnings.catch_warnings(action="ignore"):  # of old escape sequences
            try:
                module = ast.parse(text)
            except SyntaxError:  # lib2to3 has grammars of other versions
                continue
        for node in outermost(module):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            function = ast.unparse(node) + "\n"
            if len(function) <= LONGEST and function not in seen:
                seen.add(function)
                yield function


def outermost(node: ast.AST) -> Iterator[ast.FunctionDef]:
    """Yield functions that are in no other one, because the text of an inner one could be held out and trained on."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from outermost(child)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (%(default)s)")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "demo.toml")
    parser.add_argument("--began", type=float, default=time.time(), help="when it all began, in seconds (time.time())")
    options, overrides = parser.parse_known_args()
    out = options.out
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    (out / "summary.json").unlink(missing_ok=True)

    print(f"[1/3] preparing {out / 'corpus'} from the functions of Python's standard library", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = out / "functions.jsonl"
    text.write_text("".join(json.dumps({"text": function}) + "\n" for function in functions()), encoding="utf-8")
    header = prepare(f"jsonl:{text}", out / "corpus", vocab_size=VOCAB_SIZE, overwrite=True)
    print(f"      {header['splits']['train']['tokens']:,} tokens to train on", flush=True)

    print("[2/3] training", flush=True)
    paths = [f"--data.path={json.dumps(str(out / 'corpus'))}", f"--train.out_dir={json.dumps(str(out))}"]
    tokenizer = load_tokenizer(out / "corpus")
    # A model this small is sure of commas and `self` alone: by confidence they fill a line, at random they do not.
    config = GenerationConfig(gen_length=64, block_length=8, steps=64, temperature=0.5, measure="random")
    prompts = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]

    def show(step: int, model: MaskedDiffusionModel) -> None:
        (sample,) = generate(model, prompts[:1], config, seed=1, tokenizer=tokenizer)
        print(indent(PROMPTS[0] + (sample.text or ""), "      | "), flush=True)

    result = train(load_config(options.config, [*paths, *overrides]), on_validation=show)
    assert result.validation_bound is not None

    print("[3/3] generating", flush=True)
    model = load_pretrained(result.checkpoint)
    results = generate(model, prompts, config, seed=1, tokenizer=tokenizer, progress=True)
    samples = [prompt + (r.text or "") for prompt, r in zip(PROMPTS, results, strict=True)]
    for sample in samples:
        print("-" * 60 + "\n" + sample)

    summary = {
        "validation_bound": result.validation_bound,
        "unigram_entropy": result.unigram_entropy,
        "train_seconds": round(result.seconds, 1),
        "total_seconds": round(time.time() - options.began, 1),
        "tokens_seen": result.tokens_seen,
        "samples": samples,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    gain = 100 * (1 - result.validation_bound / result.unigram_entropy)
    print("-" * 60)
    print(f"validation bound {result.validation_bound:.4f} nats per token, {gain:.1f}% below the unigram entropy "
          f"{result.unigram_entropy:.4f}")  # fmt: skip
    print(f"checkpoint {result.checkpoint}\nplot       {result.plot}\nsummary    {out / 'summary.json'}")


if __name__ == "__main__":
    main()
