"""Eq. 2 of multiple-choice questions, packed, against the published loop: one candidate at a time, all logits.

Both score the same candidates with the same weights and must agree on every score and every answer:

    illada        all candidates of all questions in packs; only masked rows pass the last layer's MLP and the head
    one by one    the published evaluation restated: for each candidate a forward for each of its tokens, logits of all
                  positions, cross-entropy at the masks, the smallest revealed, one number fetched from the device

A question is a passage of the Python standard library's own documentation strings, on every machine: what comes next,
the true words or one of three other passages' of 2 to 12 tokens. The error is the largest difference of a score from
the one-by-one's, in nats, and infinite if the two choose a different answer somewhere.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import published
from benchmarks.runner import Case, Goal, Provider, ratio
from benchmarks.timing import CPU
from illada.config import ModelConfig
from illada.data import read_source, train_tokenizer
from illada.model import MaskedDiffusionModel
from illada.score import confidence_score

DEVICES = ("cpu",)

CANDIDATES = 4
CONTEXT_TOKENS, CONTINUATION_TOKENS = (24, 96), (2, 12)
#: How many times as fast as one by one. `small` is bound by arithmetic on a CPU: what packing saves there is the last
#: layer and the head of tokens that nobody asks for, a factor of nearly 2 in operations; the rest is overhead.
GOALS = {"tiny": 5.0, "small": 2.0}


@dataclass(frozen=True)
class Questions:
    """Pairs to score: those of question q are CANDIDATES * q and the ones that follow, the true one first."""

    contexts: list[list[int]]
    continuations: list[list[int]]


@cache
def passages(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of the standard library's docstrings of some length, by a BPE tokenizer trained on them."""
    texts = []
    for source in read_source("stdlib"):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
        texts += [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    tokenizer = train_tokenizer(texts, vocab_size)
    needed = CONTEXT_TOKENS[1] + CONTINUATION_TOKENS[1]
    return tuple(
        tuple(ids) for text in texts if len(text) > needed and len(ids := tokenizer.encode(text).ids) >= needed
    )


def questions(count: int, vocab_size: int) -> Questions:
    """`count` questions, the same in every run on one version of Python."""
    texts, draw = passages(vocab_size), random.Random(0)
    contexts: list[list[int]] = []
    continuations: list[list[int]] = []
    for _ in range(count):
        chosen = draw.sample(range(len(texts)), CANDIDATES)
        start = draw.randint(*CONTEXT_TOKENS)
        for text in chosen:
            contexts.append(list(texts[chosen[0]][:start]))
            continuations.append(list(texts[text][start : start + draw.randint(*CONTINUATION_TOKENS)]))
    return Questions(contexts, continuations)


def packed(model: MaskedDiffusionModel, asked: Questions) -> list[float]:
    """illada's scores."""
    return [r.score for r in confidence_score(model, asked.contexts, asked.continuations)]


@torch.inference_mode()
def one_by_one(model: MaskedDiffusionModel, asked: Questions) -> list[float]:
    """The published loop."""
    mask_id = model.config.mask_token_id
    scores = []
    for context, continuation in zip(asked.contexts, asked.continuations, strict=True):
        clean = torch.tensor(context + continuation)
        noisy = torch.tensor(context + [mask_id] * len(continuation))
        total = 0.0
        for _ in continuation:
            masked = noisy == mask_id
            logits = published.forward(model, noisy[None])[0]
            loss = F.cross_entropy(logits[masked], clean[masked], reduction="none")
            least, at = loss.min(dim=-1)
            total += least.item()
            at = masked.nonzero()[at]
            noisy[at] = clean[at]
        scores.append(-total)
    return scores


def answers(scores: Sequence[float]) -> list[int]:
    """The candidate chosen in each question."""
    return torch.tensor(scores, dtype=torch.float64).view(-1, CANDIDATES).argmax(1).tolist()


def difference(got: Sequence[float], want: Sequence[float]) -> float:
    """Largest difference of a score, infinite where an answer differs."""
    if answers(got) != answers(want):
        return float("inf")
    return max(abs(a - b) for a, b in zip(got, want, strict=True))


def make_case(preset: str, count: int, **overrides: int) -> Case:
    """`count` questions to a model of a preset with random weights."""
    config = ModelConfig.preset(preset, **overrides)

    def make() -> list[Provider]:
        model, asked = MaskedDiffusionModel(config), questions(count, config.vocab_size)
        reference = one_by_one(model, asked)
        error = partial(difference, want=reference)
        return [
            Provider("illada", partial(packed, model, asked), error=error),
            Provider("one by one", partial(one_by_one, model, asked), error=error),
        ]

    return Case(f"{preset} {count} questions", make, repeats=3, slow={"one by one"})


def cases(device: torch.device = CPU) -> list[Case]:
    """The preset `tiny` is bound by overheads, `small` by arithmetic; on a CPU until the loss has CUDA kernels."""
    return [make_case("tiny", 200), make_case("small", 20)]


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """So many times as fast, the same answers."""
    found = []
    for case in dict.fromkeys(r["case"] for r in records):
        faster = ratio(records, case, "one by one")
        error = next((r["error"] for r in records if r["case"] == case and r["provider"] == "illada"), None)
        if faster is not None and error is not None:
            same, wanted = error < 1e-3, GOALS[case.split()[0]]
            found.append(Goal(f"{case}: {faster:.1f}x faster than one by one (goal {wanted:g}x)", faster >= wanted))
            found.append(Goal(f"{case}: {'same' if same else 'DIFFERENT'} answers, scores within {error:.1e}", same))
    return found
