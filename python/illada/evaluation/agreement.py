"""Comparison of generation with and without a key-value cache on the same prompts.

Caches are never exact here: attention is bidirectional, so each new token changes all keys and values before it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from illada.generation.config import CACHES, GenerationConfig
from illada.generation.loop import generate
from illada.model import MaskedDiffusionModel
from illada.score import confidence_score


@dataclass
class CacheAgreement:
    """Result of one cache on the given prompts.

    cache: "none", "prefix" or "block".
    token_match: share of positions with the same token as without a cache; positions past the end of one text count as
        mismatches.
    identical: number of prompts with exactly the same tokens.
    prompts: number of prompts.
    first_difference: mean position of the first different token, over prompts that have one; None if none has.
    score: Eq. 2 of the generated texts, by the model without a cache, in nats per token (see
        `illada.confidence_score`). NaN where masks are left in a text (the model predicted them, or NaN), because they
        have no score.
    score_gap: score minus that of "none"; below 0 the model gives the cached text a lower score.
    forwards: largest number of forward passes of one prompt.
    seconds: duration of the generation.
    """

    cache: str
    token_match: float
    identical: int
    prompts: int
    first_difference: float | None
    score: float
    score_gap: float
    forwards: int
    seconds: float


def cache_agreement(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    caches: Sequence[str] = ("prefix", "block"),
    seed: int | Sequence[int] = 0,
    tokenizer: Any = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> list[CacheAgreement]:
    """Generate with each cache and without one, and compare the results.

    Args:
        model: As in `illada.generate`.
        prompts: As in `illada.generate`.
        seed: As in `illada.generate`.
        tokenizer: As in `illada.generate`.
        batch_size: As in `illada.generate`.
        progress: As in `illada.generate`.
        config: As in `illada.generate`; `config.cache` is ignored.
        caches: The caches to compare: "prefix", "block", or "none", which is always included.

    Returns:
        One CacheAgreement per cache: first "none", then the order of `caches`.

    Raises:
        ValueError: An unknown cache, or no prompts. Others as `illada.generate`.
    """
    if unknown := [cache for cache in caches if cache not in CACHES]:
        raise ValueError(f"caches must be among {', '.join(CACHES)}, got {unknown[0]!r}")
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    reports: list[CacheAgreement] = []
    exact: list[list[int]] = []
    for cache in ("none", *(c for c in caches if c != "none")):
        began = time.monotonic()
        results = generate(
            model, prompts, dataclasses.replace(config, cache=cache), seed=seed, tokenizer=tokenizer,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        seconds = time.monotonic() - began
        texts = [r.tokens for r in results]
        exact = exact or texts
        score = math.nan
        if not any(model.config.mask_token_id in text for text in texts):
            scores = confidence_score(model, prompts, texts, progress=progress)
            score = sum(s.score for s in scores) / max(1, sum(map(len, texts)))
        firsts = [first for a, b in zip(exact, texts, strict=True) if (first := _first_difference(a, b)) is not None]
        longest = sum(max(len(a), len(b)) for a, b in zip(exact, texts, strict=True))
        same = sum(x == y for a, b in zip(exact, texts, strict=True) for x, y in zip(a, b, strict=False))
        reports.append(
            CacheAgreement(
                cache=cache,
                token_match=same / longest if longest else 1.0,
                identical=len(texts) - len(firsts),
                prompts=len(texts),
                first_difference=sum(firsts) / len(firsts) if firsts else None,
                score=score,
                score_gap=score - reports[0].score if reports else 0.0,
                forwards=max(r.forwards for r in results),
                seconds=seconds,
            )
        )
    return reports


def _first_difference(a: list[int], b: list[int]) -> int | None:
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
