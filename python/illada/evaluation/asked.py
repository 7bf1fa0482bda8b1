"""The generation that a task of lm-evaluation-harness asks for, by its generation_kwargs."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from illada.evaluation.settings import EvaluationSettings
from illada.generation import GenerationConfig

#: Names in generation_kwargs: those that say which tokens are drawn from, and those with values that change nothing.
_FILTERS = ("top_p", "top_k")
_NEUTRAL: dict[str, Any] = {
    "top_p": 1, "top_k": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1,
    "early_stopping": False,
}  # fmt: skip


def asked_of(options: dict[str, Any], settings: EvaluationSettings) -> tuple[int, dict[str, float]]:
    """Return (most new tokens, how to sample) of a task's generation_kwargs, by lm_eval's own rules.

    The model's settings count before them.

    Raises:
        ValueError: what is not supported, and values that the generator or `stop_strings_of` would refuse later.
    """
    stop_strings_of(options)
    try:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the task's generation_kwargs, {options}: {error}") from None
    asked.pop("until")
    asked_length, temperature = asked.pop("max_gen_toks"), float(asked.pop("temperature", 0.0))
    length = settings.gen_length or asked_length
    if length < 1:
        raise ValueError(f"the task's max_gen_toks must be at least 1, got {length}; generation_kwargs: {options}")
    do_sample = asked.pop("do_sample")
    if not isinstance(do_sample, bool):
        raise ValueError(f"the task's do_sample must be True or False, got {do_sample!r}")
    if not do_sample:
        temperature = 0.0
    drawn = settings.generation.temperature or temperature  # without it what would be filtered does not matter
    given = {name: value for name, value in asked.items() if value is not None and value != _NEUTRAL.get(name)}
    filters = {name: given.pop(name) for name in _FILTERS if name in given}
    if given:
        known = ", ".join(["until", "max_gen_toks", "do_sample", "temperature", *_FILTERS])
        raise ValueError(
            f"the task's generation_kwargs ask for {', '.join(f'{k}={v}' for k, v in given.items())}, which is "
            f"not supported; there are {known}"
        )
    sampling = {"temperature": temperature, **filters} if drawn else {}
    own = settings.generation
    sampling = {n: value for n, value in sampling.items() if getattr(own, n) == getattr(GenerationConfig, n)}
    try:
        dataclasses.replace(GenerationConfig(), **sampling)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the task's generation_kwargs, {options}: {error}") from None
    return length, sampling


def stop_strings_of(options: dict[str, Any]) -> list[str]:
    """Return the stop strings of a task's generation_kwargs, its `until`.

    ValueError: it holds something else.
    """
    until = options.get("until")
    stops = [stop for stop in (until if isinstance(until, list | tuple) else [until]) if stop not in (None, "")]
    if wrong := [stop for stop in stops if not isinstance(stop, str)]:
        raise ValueError(f"the task's until must hold texts, got {wrong[0]!r}")
    return stops
