"""A benchmark of Eq. 2 on multiple-choice questions, packed or by the published loop.

That loop takes one candidate at a time, with all logits.

Both score the same candidates with the same weights and must agree on every score and every answer:

    illada        all candidates of all questions in packs; only masked rows pass the last layer's MLP and the head
    one by one    the published evaluation restated: for each candidate a forward for each of its tokens, logits of all
                  positions, cross-entropy at the masks, the smallest revealed, one number fetched from the device

A question is a passage of the Python standard library's own documentation strings, on every machine: what comes next,
the true words or one of three other passages' of 2 to 12 tokens. The error is the largest difference of a score from
the one-by-one's, in nats, and infinite if the two choose a different answer somewhere, unless the one-by-one's scores
of these are within TOLERANCE of each other.

On a GPU in bfloat16: `small`, and `4 layers` of the 8B geometry, whose weights alone take a millisecond to read for
each of the one-by-one's forwards. Its cross-entropies are in float32: in bfloat16 those of random weights would be
multiples of 1/16, and most tokens equally probable.
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

from illada.config import ModelConfig
from illada.data.sources import read_source
from illada.model import MaskedDiffusionModel
from illada.score import confidence_score
from illada.text.training import train_tokenizer

from . import published
from .runner import Case, Goal, Provider, on_gpu, ratio
from .timing import CPU
from .weights import random_model

DEVICES = ("cpu", "cuda")

CANDIDATES = 4
CONTEXT_TOKENS, CONTINUATION_TOKENS = (24, 96), (2, 12)
VOCAB = 32768  # of the questions at most: the larger the vocabulary, the longer its tokenizer trains

#: How many times as fast as one by one, by the kind of timing, which tells the device. `small` is bound by arithmetic
#: on a CPU: what packing saves there is the last layer and the head of tokens that nobody asks for, a factor of nearly
#: 2 in operations; the rest is overhead. On a GPU single sequences are bound by launches and by reading the weights.
GOALS = {"clock": {"tiny": 5.0, "small": 2.0}, "events": {"small": 10.0, "4 layers": 4.0}}

#: Nats by which a score may differ. In bfloat16 hidden states and logits are rounded to 8 bits, and where two tokens
#: are about as probable the other one may be revealed first.
TOLERANCE = {"clock": 1e-3, "events": 0.1}


@dataclass(frozen=True)
class Questions:
    """Pairs of context and continuation to score, CANDIDATES for each question.

    Those of question q begin at CANDIDATES * q, the true one first.
    """

    contexts: list[list[int]]
    continuations: list[list[int]]


@cache
def passages(vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of those docstrings of the standard library that are long enough.

    The tokenizer is a BPE tokenizer trained on the docstrings.
    """
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
    """Return `count` questions, the same in every run on one version of Python."""
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
    """Return illada's scores of the questions."""
    return [r.score for r in confidence_score(model, asked.contexts, asked.continuations)]


@torch.inference_mode()
def one_by_one(model: MaskedDiffusionModel, asked: Questions) -> list[float]:
    """Return the scores of the published loop."""
    mask_id, device = model.config.mask_token_id, model.head_weight.device
    scores = []
    for context, continuation in zip(asked.contexts, asked.continuations, strict=True):
        clean = torch.tensor(context + continuation, device=device)
        noisy = torch.tensor(context + [mask_id] * len(continuation), device=device)
        total = 0.0
        for _ in continuation:
            masked = noisy == mask_id
            logits = published.forward(model, noisy[None])[0]
            loss = F.cross_entropy(logits[masked].float(), clean[masked], reduction="none")
            least, at = loss.min(dim=-1)
            total += least.item()
            at = masked.nonzero()[at]
            noisy[at] = clean[at]
        scores.append(-total)
    return scores


def answers(scores: Sequence[float]) -> list[int]:
    """Return the candidate chosen in each question."""
    return torch.tensor(scores, dtype=torch.float64).view(-1, CANDIDATES).argmax(1).tolist()


def difference(got: Sequence[float], want: Sequence[float], tolerance: float) -> float:
    """Return the largest difference of a score.

    It is infinite where `want` has an answer that is better than ours by more than the tolerance.
    """
    worst = float((torch.tensor(got, dtype=torch.float64) - torch.tensor(want, dtype=torch.float64)).abs().max())
    for q, (ours, theirs) in enumerate(zip(answers(got), answers(want), strict=True)):
        if want[CANDIDATES * q + theirs] - want[CANDIDATES * q + ours] > tolerance:
            return float("inf")
    return worst if worst == worst else float("inf")


def make_case(name: str, config: ModelConfig, count: int, device: torch.device = CPU) -> Case:
    """Return the case of `count` questions to a model with random weights.

    The weights are float32 on a CPU, bfloat16 on a GPU.
    """
    timing = "events" if device.type == "cuda" else "clock"

    def make() -> list[Provider]:
        model = random_model(config, device) if device.type == "cuda" else MaskedDiffusionModel(config)
        asked = questions(count, min(config.vocab_size, VOCAB))
        error = partial(difference, want=one_by_one(model, asked), tolerance=TOLERANCE[timing])
        return [
            Provider("illada", partial(packed, model, asked), error=error),
            Provider("one by one", partial(one_by_one, model, asked), error=error),
        ]

    return Case(f"{name} {count} questions", make, repeats=3, slow={"one by one"})


def cases(device: torch.device = CPU) -> list[Case]:
    """Return the cases of the device.

    On a CPU `tiny` is bound by overheads, `small` by arithmetic. On a GPU the head dim must be one of the kernels'.
    """
    small = ModelConfig.preset("small")
    if device.type == "cuda":
        few_layers = ModelConfig.preset("illada_8b", num_hidden_layers=4)
        return [make_case("small", small, 20, device), make_case("4 layers", few_layers, 20, device)]
    return [make_case("tiny", ModelConfig.preset("tiny"), 200), make_case("small", small, 20)]


def quick(device: torch.device = CPU) -> list[Case]:
    """Return a few questions; on a CPU in a vocabulary whose tokenizer is soon trained."""
    if device.type == "cuda":
        return cases(device)[:1]
    return [make_case("tiny V2048", ModelConfig.preset("tiny", vocab_size=2048), 10)]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    return ["illada", "one by one"]


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals: the same answers, so many times as fast as one by one."""
    found = []
    for case in dict.fromkeys(r["case"] for r in records):
        faster = ratio(records, case, "one by one")
        ours = next((r for r in records if r["case"] == case and r["provider"] == "illada"), None)
        if faster is not None and ours is not None:
            timing, error = "events" if on_gpu(ours) else "clock", ours["error"]
            wanted = GOALS[timing].get(case.rsplit(" ", 2)[0])
            if wanted is not None:
                found.append(Goal(f"{case}: {faster:.1f}x faster than one by one (goal {wanted:g}x)", faster >= wanted))
            if error is not None:
                same = error < TOLERANCE[timing]
                text = f"{case}: {'same' if same else 'DIFFERENT'} answers, scores within {error:.1e}"
                found.append(Goal(text, same))
    return found
