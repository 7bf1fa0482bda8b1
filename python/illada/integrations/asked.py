"""What a task of lm-evaluation-harness asks of a generation, its generation_kwargs."""

from __future__ import annotations

from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from illada.generation import GenerationConfig
from illada.integrations.settings import EvaluationSettings

#: Of a task's generation_kwargs: what says which tokens are drawn from, and values that change nothing.
_FILTERS = ("top_p", "top_k")
_NEUTRAL: dict[str, Any] = {"top_p": 1, "top_k": 0, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}


def asked_of(options: dict[str, Any], settings: EvaluationSettings) -> tuple[int, dict[str, float]]:
    """(most new tokens, how to sample) of a task's generation_kwargs, by lm_eval's own rules; the model's settings
    count before them."""
    try:
        asked: dict[str, Any] = dict(normalize_gen_kwargs(options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the task's generation_kwargs, {options}: {error}") from None
    asked.pop("until")
    asked_length, temperature = asked.pop("max_gen_toks"), float(asked.pop("temperature", 0.0))
    length = settings.gen_length or asked_length
    if length < 1:
        raise ValueError(f"the task's max_gen_toks must be at least 1, got {length}; generation_kwargs: {options}")
    if not asked.pop("do_sample"):
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
    return length, {n: value for n, value in sampling.items() if getattr(own, n) == getattr(GenerationConfig, n)}
