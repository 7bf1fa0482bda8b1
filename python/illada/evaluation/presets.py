"""The settings with which iLLaDA's published scores were measured, by checkpoint and task.

From the authors' evaluation script. Tasks in `AUTHORS_TASKS` are not part of lm-evaluation-harness: their folders come
with the authors' repository (--include-path).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskSettings:
    """The settings with which one task is run.

    model_args: arguments of `illada.evaluation.lm_eval.IlladaLM`; num_fewshot: None leaves it to the task.
    unsafe_code: the task runs what the model writes.
    """

    model_args: dict[str, Any] = field(default_factory=dict)
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    unsafe_code: bool = False


_CONFIDENCE = {"llh": "confidence", "append_eos": True, "add_bos": True, "cfg_scale": 0.0, "check_greedy": False}
_ONE_SAMPLE = {**_CONFIDENCE, "llh": "mc", "mc_num": 1}


def _generation(gen_length: int, steps: int, block_length: int, mode: str = "var", **more: Any) -> dict[str, Any]:
    return {"mode": mode, "gen_length": gen_length, "steps": steps, "block_length": block_length, **more}


def _reasoning(gen_length: int, block_length: int, power: int) -> dict[str, Any]:
    return _generation(gen_length, block_length, block_length, end_think_boost=100.0, end_think_power=power)


_COMPLETION = _generation(1024, 32, 32)

PRESETS: dict[str, dict[str, TaskSettings]] = {
    "illada-base": {
        "arc_challenge": TaskSettings(_CONFIDENCE, num_fewshot=0),
        "hellaswag": TaskSettings(_CONFIDENCE, num_fewshot=0),
        "piqa": TaskSettings(_CONFIDENCE, num_fewshot=0),
        "mmlu": TaskSettings(_ONE_SAMPLE, num_fewshot=5),
        "cmmlu": TaskSettings(_ONE_SAMPLE, num_fewshot=5),
        "bbh": TaskSettings(_COMPLETION),
        "gsm8k_cot": TaskSettings(_COMPLETION, num_fewshot=8),
        "minerva_math": TaskSettings(_COMPLETION),
        "humaneval": TaskSettings(_generation(512, 512, 512, "fixed"), unsafe_code=True),
        "mbpp": TaskSettings(_COMPLETION, unsafe_code=True),
    },
    "illada-instruct": {
        "mmlu_generative": TaskSettings(
            _generation(3, 3, 3, "fixed"), num_fewshot=5, apply_chat_template=True, fewshot_as_multiturn=True
        ),
        "mmlu_redux_generative": TaskSettings(
            _generation(4, 4, 4, "fixed"), num_fewshot=5, apply_chat_template=True, fewshot_as_multiturn=True
        ),
        "minerva_math": TaskSettings(_reasoning(4096, 32, 3), num_fewshot=0, apply_chat_template=True),
        "mmlu_pro_reasoning": TaskSettings(_reasoning(4096, 32, 3), num_fewshot=0, apply_chat_template=True),
        "gsm8k_cot_reasoning": TaskSettings(_reasoning(2048, 32, 3), num_fewshot=0, apply_chat_template=True),
        "humaneval_reasoning": TaskSettings(
            _reasoning(2048, 32, 1), num_fewshot=0, apply_chat_template=True, unsafe_code=True
        ),
        "mbpp_reasoning": TaskSettings(
            _reasoning(2048, 16, 3), num_fewshot=0, apply_chat_template=True, unsafe_code=True
        ),
    },
}

AUTHORS_TASKS = {"mmlu_pro_reasoning", "gsm8k_cot_reasoning", "humaneval_reasoning", "mbpp_reasoning"}


def settings_of(preset: str | None, task: str) -> TaskSettings:
    """Return the settings of a task in a preset, or the defaults without one.

    ValueError, which lists what there is: there is no such preset or task.
    """
    if preset is None:
        return TaskSettings()
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    tasks = PRESETS[preset]
    if task not in tasks:
        raise ValueError(f"preset {preset} has no task {task!r}; it has {', '.join(tasks)}")
    return tasks[task]
