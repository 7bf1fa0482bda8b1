"""Training state on disk: a model checkpoint that anyone can load, with optimizer and position beside it.

    checkpoints/step-000500/
        config.json model.safetensors tokenizer.json      what illada.load_pretrained reads
        optimizer.safetensors                             AdamW's moments, float32, by parameter name
        trainer.json                                      step, tokens, unlogged losses, decay, config, versions

A folder is written hidden, synced and renamed, so each one that is there is complete; old ones are removed only after.
The order of the data, the splits and the masks need no state: they follow from (seed, step).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from illada._native import package_version
from illada.checkpoints.folders import all_checkpoints, load, newest, state_file
from illada.checkpoints.weights import read_weights, write_pretrained
from illada.files import remove_directory, staged_directory
from illada.model import MaskedDiffusionModel
from illada.schema import Count, Finite, check_object, some_of
from illada.text.files import read_json
from illada.train.config import TrainConfig

_STATE = {
    "step": Count,
    "tokens_seen": Count,
    "unlogged_losses": list[Finite],
    "tokenizer_sha256": str,
    "config": dict[str, dict[str, Any]],
    "versions": dict[str, str],
}
#: What checkpoints have that are newer than the schedule's decisions.
_OPTIONAL = {"decay_step": Count, "validation_bounds": list[Annotated[list[Finite], Len(2, 2)]], "corpus": str}

#: What may not change between a run and its resumption: it would make another run of it.
_FIXED_KEYS = {
    "model": None,
    "diffusion": None,
    "data": ("window", "weights"),
    "train": ("seed", "windows_per_step", "dtype"),
}


def save(
    folder: Path,
    model: MaskedDiffusionModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    step: int,
    tokens_seen: int,
    unlogged_losses: list[float],
    decay_step: int | None,
    validation_bounds: list[tuple[int, float]],
    corpus: str,
    tokenizer: Path,
) -> Path:
    """Write checkpoints/step-NNNNNN and remove the oldest beyond train.keep_last.

    `decay_step` and `validation_bounds` are of `illada.train.schedule.Schedule`, `corpus` is the fingerprint of the
    training split.

    OSError: nothing has changed.
    """
    target = folder / f"step-{step:06}"
    try:
        with staged_directory(target) as staging:
            write_pretrained(model, staging, tokenizer=tokenizer)
            save_file(_optimizer_tensors(model, optimizer), staging / "optimizer.safetensors")
            state = {
                "step": step,
                "tokens_seen": tokens_seen,
                "unlogged_losses": unlogged_losses,
                "decay_step": decay_step,
                "validation_bounds": validation_bounds,
                "corpus": corpus,
                "tokenizer_sha256": read_json(staging / "config.json")["tokenizer_sha256"],
                "config": config.to_dict(),
                "versions": {"illada": package_version(), "torch": torch.__version__},
            }
            (staging / "trainer.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        kept = newest(folder)
        raise OSError(
            f"could not save {target}: {error}; "
            + (f"the last complete checkpoint is {kept}" if kept else "there is no earlier checkpoint")
        ) from error
    for old in all_checkpoints(folder)[: -config.train.keep_last]:
        remove_directory(old)
    return target


def read_state(path: Path) -> dict[str, Any]:
    """Return the contents of trainer.json.

    FileNotFoundError, ValueError: not a training checkpoint.
    """
    file = state_file(path)
    try:
        return check_object(read_json(file), _STATE, file.name, _OPTIONAL)
    except ValueError as error:
        raise ValueError(f"{file} is damaged or from something else: {error}") from None


def check_same_run(path: Path, state: dict[str, Any], config: TrainConfig, tokenizer_sha256: str) -> None:
    """Raise ValueError unless `config` continues the run of this checkpoint on the same tokens."""
    if state["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"the corpus {config.data.path} was made with another tokenizer than the checkpoint {path} "
            f"({tokenizer_sha256[:12]} and {state['tokenizer_sha256'][:12]})"
        )
    now, defaults = config.to_dict(), TrainConfig().to_dict() | {"model": {}}
    changed = []
    for section, keys in _FIXED_KEYS.items():
        # An option that is newer than the checkpoint: its default is what was done before there was a choice.
        before, after = defaults[section] | state["config"].get(section, {}), now[section]
        for key in keys if keys is not None else sorted(set(before) | set(after)):
            if before.get(key) != after.get(key):
                changed.append(f"{section}.{key} was {before.get(key)!r:.60}, is {after.get(key)!r:.60}")
    if changed:
        raise ValueError(f"{path} belongs to another run: {some_of(changed, '; ')}; choose another train.out_dir")


def restore(path: Path, model: MaskedDiffusionModel, optimizer: torch.optim.Optimizer) -> None:
    """Copy weights and moments of a checkpoint into a model and its fresh optimizer.

    ValueError, which names file and tensor: one is missing, unexpected, or is none that AdamW can have left.
    """
    weights = read_weights(path, model.config)
    moments = _read_moments(path, model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(weights[name])
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments[name].items()}


def verify(path: Path, model: MaskedDiffusionModel) -> None:
    """Load a checkpoint as a command does, tokenizer and all, and compare it with the model that was saved.

    Weights and moments stay mapped to their files, so memory grows by the copies of the q, k and v weights alone.

    Raises:
        RuntimeError: it cannot be loaded, or holds something else.
    """
    trained = dict(model.named_parameters())
    try:
        loaded, _ = load(path)
        for name, parameter in loaded.named_parameters():
            # As bytes, since a NaN equals nothing.
            if not torch.equal(parameter.view(torch.uint8), trained[name].detach().cpu().view(torch.uint8)):
                raise ValueError(f"{name} is not what was trained")
        _read_moments(path, model)
    except Exception as error:
        raise RuntimeError(f"{path} was saved, but cannot be loaded: {error}") from error


def _read_moments(path: Path, model: MaskedDiffusionModel) -> dict[str, dict[str, torch.Tensor]]:
    """Return AdamW's state by parameter name, mapped; errors as of `restore`."""
    file = path / "optimizer.safetensors"
    try:
        moments = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or missing: {error!s:.200}") from None
    found = {}
    for name, parameter in model.named_parameters():
        state = {key: moments.pop(f"{name}/{key}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in state.values()):
            raise ValueError(f"{file} lacks the state of {name}")
        for key, value in state.items():
            assert value is not None
            _check_moment(value, [] if key == "step" else list(parameter.shape), key, f"{file}: {name}/{key}")
        found[name] = {key: value for key, value in state.items() if value is not None}
    if moments:
        raise ValueError(f"{file} holds unexpected state: {some_of(sorted(moments))}")
    return found


def _check_moment(value: torch.Tensor, shape: list[int], key: str, where: str) -> None:
    """Raise ValueError unless `value` is finite float32 of that shape, and no step or second moment is negative."""
    if list(value.shape) != shape or value.dtype != torch.float32:
        raise ValueError(f"{where} is {value.dtype} {list(value.shape)}, expected torch.float32 {shape}")
    if not bool(value.isfinite().all()) or (key != "exp_avg" and bool((value < 0).any())):
        allowed = "finite" if key == "exp_avg" else "finite and not negative"
        raise ValueError(f"{where} must be {allowed}, got {value.min():g} to {value.max():g}")


def _optimizer_tensors(model: MaskedDiffusionModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}/{key}"] = optimizer.state[parameter][key].contiguous()
    return tensors
