"""Confidence remasking: sample every row of the logits, then commit the surest tokens of each sequence.

`published` is the rule as LLaDA and iLLaDA publish it (float64 Gumbel noise, argmax, softmax, gather, a loop of topk
over the sequences); `compile` is the same rule with its tensor part under torch.compile.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import illada
from benchmarks.runner import Case, Goal, Provider, ratio

SEQUENCES = 8  # rows are shared out evenly over so many sequences
COMMIT = 4  # tokens a sequence commits
MASK_ID = 5

SHAPES = [(256, 126464), (128, 155136), (32, 155136)]  # rows x vocabulary: LLaDA and iLLaDA blocks
TEMPERATURES = [0.0, 1.0]


def published_sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token and confidence of each row, by the published formulas."""
    if temperature == 0:
        noisy = logits
    else:
        wide = logits.to(torch.float64)
        noise = torch.rand_like(wide, dtype=torch.float64)
        noisy = wide.exp() / (-torch.log(noise)) ** temperature
    token = torch.argmax(noisy, dim=-1)
    p = torch.softmax(logits, dim=-1)
    confidence = torch.gather(p, dim=-1, index=token.unsqueeze(-1)).squeeze(-1)
    return token, confidence


def published_commit(canvas: Tensor, token: Tensor, confidence: Tensor) -> None:
    """The published transfer: per-row topk of the confidences among the masks. canvas [B, L], in place."""
    token, confidence = (x.reshape(canvas.shape) for x in (token, confidence))
    mask = canvas == MASK_ID
    token = torch.where(mask, token, canvas)
    confidence = torch.where(mask, confidence, -torch.inf)
    transfer = torch.zeros_like(canvas, dtype=torch.bool)
    for j in range(confidence.shape[0]):
        _, index = torch.topk(confidence[j], k=COMMIT)
        transfer[j, index] = True
    canvas[transfer] = token[transfer]


def make_case(rows: int, vocab: int, temperature: float, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One step on random logits of a peaked-ness as in the middle of a generation."""
    truth: dict[str, Tensor] = {}

    def make() -> list[Provider]:
        logits = (2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))).to(dtype)
        truth["logprobs"] = logits.double().log_softmax(-1)
        canvas = torch.full((SEQUENCES, rows // SEQUENCES), MASK_ID)
        positions = torch.arange(canvas.numel(), dtype=torch.int32)
        cu_rows = torch.arange(0, canvas.numel() + 1, rows // SEQUENCES, dtype=torch.int32)
        compiled = torch.compile(published_sample)

        def ours() -> tuple[Tensor, Tensor]:
            tokens = canvas.flatten().clone()
            sample = illada.sample_tokens(logits, temperature=temperature, seed=1)
            illada.remask(tokens, positions, cu_rows, sample, quota=COMMIT, mask_id=MASK_ID)
            return sample.token, sample.confidence

        def theirs(sample_function) -> tuple[Tensor, Tensor]:
            tokens = canvas.clone()
            token, confidence = sample_function(logits, temperature)
            published_commit(tokens, token, confidence)
            return token, confidence

        no_compiler = None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"
        return [
            Provider("illada", ours),
            Provider("published", lambda: theirs(published_sample)),
            Provider("compile", lambda: theirs(compiled), no_compiler),
        ]

    def error(result: tuple[Tensor, Tensor]) -> float:
        """Largest relative error of the confidences, given the tokens."""
        token, confidence = result
        want = truth["logprobs"].gather(-1, token.unsqueeze(-1)).squeeze(-1).exp()
        return float(((confidence.double() - want) / want).abs().max())

    return Case(
        name=f"{rows}x{vocab} T={temperature:g}",
        make=make,
        bytes=rows * vocab * dtype.itemsize,  # the logits, read once
        error=error,
        repeats=9,
        slow={"published"},
    )


def cases() -> list[Case]:
    """All shapes and temperatures."""
    return [make_case(rows, vocab, t) for rows, vocab in SHAPES for t in TEMPERATURES]


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """256 rows: 30x the published rule and 2x compile at temperature 1, 8x and 1.5x at temperature 0."""
    found = []
    for case, bars in (
        ("256x126464 T=1", {"published": 30.0, "compile": 2.0}),
        ("256x126464 T=0", {"published": 8.0, "compile": 1.5}),
    ):
        for provider, bar in bars.items():
            times = ratio(records, case, provider)
            if times is not None:
                found.append(Goal(f"{case}: {times:.1f}x faster than {provider} (goal {bar:g}x)", times >= bar))
    return found
