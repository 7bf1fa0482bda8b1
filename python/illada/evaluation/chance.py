"""The accuracy of guessing on a multiple-choice task, and whether another accuracy differs from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task


def chance_of(task: Task, accuracy: float | None, samples: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return the rate of guessing on these samples, and how far from it the accuracy `acc` is.

    None where `acc` is not the harness's own: another kind of task, results or an average that the task computes
    itself, or no `acc` at all.
    """
    samples = [sample for sample in samples if sample["filter"] == "none"]
    if accuracy is None or not samples or not _has_own_accuracy(task):
        return None
    rates = [_rate(task, sample["doc"]) for sample in samples]
    chance = sum(rates) / len(rates)
    # The standard error that guessing has, not the one around the accuracy: it is guessing that is to be ruled out.
    error = math.sqrt(sum(p * (1 - p) for p in rates)) / len(rates)
    return {
        "accuracy": accuracy,
        "chance": chance,
        "chance_stderr": error,
        "sigmas": (accuracy - chance) / error if error else 0.0,
        "questions": len(rates),
    }


def _has_own_accuracy(task: Task) -> bool:
    return (
        isinstance(task, ConfigurableTask)
        and type(task).process_results is ConfigurableTask.process_results
        and task.config.output_type == "multiple_choice"
        and not callable(task.config.process_results)
        and task.aggregation().get("acc") is mean
    )


def _rate(task: ConfigurableTask, doc: dict[str, Any]) -> float:
    """Return the share of right answers among the choices, as `ConfigurableTask.process_results` counts them."""
    choices = task.doc_to_choice(doc)
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(right, str):
        right = choices.index(right) if right in choices else -1
    allowed = right if isinstance(right, list) else [right]
    return sum(i in allowed for i in range(len(choices))) / len(choices)


def describe_chance(name: str, chance: dict[str, float]) -> str:
    """Return in words whether the accuracy is above chance, at chance or below it."""
    sigmas = chance["sigmas"]
    verdict = "at chance" if abs(sigmas) < 2 else f"{'above' if sigmas > 0 else 'below'} chance"
    return (
        f"{name}: {verdict}: {chance['accuracy']:.4f}, guessing gives {chance['chance']:.4f} +- "
        f"{chance['chance_stderr']:.4f} on {chance['questions']:,} questions ({sigmas:+.1f} sigma)"
    )
