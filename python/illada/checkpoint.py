"""Weights in and out: folders with config.json and safetensors, in iLLaDA's Hugging Face layout.

Every key is accounted for: a missing, unexpected or misshapen tensor, and a config option that is not understood, are
errors that name it, never a silent re-initialisation. A tied head is stored once, as the embedding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from illada.config import ModelConfig
from illada.files import staged_directory
from illada.model import MaskedDiffusionModel

_INDEX = "model.safetensors.index.json"

#: Config keys with a meaning here, by their name in the file.
_HONOURED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps",
    "tie_word_embeddings", "initializer_range",
    "mask_token_id", "bos_token_id", "pad_token_id", "eos_token_id",
}  # fmt: skip

#: Config keys that must have one of these values, because nothing else is implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("illada",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
    "layer_norm_eps": (None,),
    "attention_dropout": (0, 0.0, 0.1),  # training only, and not applied here: bidirectional diffusion needs none
    "resid_pdrop": (0, 0.0, 0.1),
}

#: Config keys that say nothing about the computation.
_IGNORED = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
    "tokenizer_sha256", "return_dict", "output_hidden_states", "output_attentions",
}  # fmt: skip

#: Special ids of every iLLaDA checkpoint; its config.json does not name the mask.
_ILLADA_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 5}


# --------------------------------------------------------------------------------------------------------------- save


def save_pretrained(
    model: MaskedDiffusionModel,
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write the model as a folder in iLLaDA's Hugging Face layout, beside and renamed.

    Args:
        model: its config must be expressible in that layout (no biases, no shift, embedding as large as the head).
        tokenizer: a tokenizer.json to put beside the weights; its hash goes into config.json.
        max_shard_bytes: larger models are split into several safetensors files with an index.

    Raises:
        NotImplementedError: another architecture. OSError: nothing was written.
    """
    with staged_directory(path) as folder:
        write_pretrained(model, folder, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def write_pretrained(
    model: MaskedDiffusionModel, folder: Path, *, tokenizer: str | Path | None = None, max_shard_bytes: int = 5 << 30
) -> None:
    """The files of `save_pretrained`, into a folder that is there."""
    config = config_to_file(model.config)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        config["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    config["torch_dtype"] = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][file_name(name)] = tensor.contiguous()
        size += num_bytes
        total += num_bytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def file_name(parameter: str) -> str:
    """The name of a parameter in a Hugging Face file."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def config_to_file(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model, in iLLaDA's keys."""
    beyond = {
        "model_type": config.model_type != "illada",
        "qkv_bias": config.qkv_bias,
        "rope_in_fp32": config.rope_in_fp32,
        "logits_shift": config.logits_shift,
        "embedding_size": config.embedding_size != config.vocab_size,
    }
    if any(beyond.values()):
        named = ", ".join(f"{name}={getattr(config, name)!r}" for name, is_beyond in beyond.items() if is_beyond)
        raise NotImplementedError(f"iLLaDA's checkpoint layout cannot express {named}; supported: model_type 'illada'")
    values = config.to_dict()
    return {
        "architectures": ["ILLaDAForCausalLM"],
        "model_type": "illada",
        **{key: values[key] for key in values if key in _HONOURED},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "layer_norm_eps": None,
        "rope_scaling": None,
    }


# --------------------------------------------------------------------------------------------------------------- load


def load_pretrained(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> MaskedDiffusionModel:
    """The model of a checkpoint folder.

    Weights are memory-mapped: on a CPU, in the file's own dtype, no second copy is made.

    Args:
        path: the folder. device: where to put the weights. dtype: default that of the file.

    Raises:
        FileNotFoundError: no checkpoint there. ValueError: damaged or foreign files; keys that are missing,
            unexpected or have another shape; config options that are not supported.
    """
    path = Path(path)
    config = load_config(path)
    model = MaskedDiffusionModel(config, device="meta")
    load_weights(model, path, device=device, dtype=dtype)
    return model


def load_weights(
    model: MaskedDiffusionModel, path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Replace the parameters of `model` by those of a checkpoint folder; its keys must fit exactly."""
    expected = {file_name(name): (name, p) for name, p in model.named_parameters()}
    state: dict[str, Tensor] = {}
    unexpected: list[str] = []
    wrong: list[str] = []
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for key in tensors.keys():
                    if key in expected:
                        name, parameter = expected[key]
                        tensor = tensors.get_tensor(key)
                        if tensor.shape != parameter.shape:
                            wrong.append(f"{key} is {list(tensor.shape)}, expected {list(parameter.shape)}")
                        state[name] = tensor.to(dtype or tensor.dtype)
                    elif key == "lm_head.weight" and model.config.tie_word_embeddings:
                        _check_tie(tensors.get_tensor(key), path)
                    else:
                        unexpected.append(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
    missing = [key for key, (name, _) in expected.items() if name not in state]
    problems = [
        f"{kind}: {', '.join(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("other shape", wrong))
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {path} do not fit its config.json; " + "; ".join(problems))
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(True)


def _check_tie(head: Tensor, path: Path) -> None:
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            if "model.embed_tokens.weight" in tensors.keys():
                if not torch.equal(tensors.get_tensor("model.embed_tokens.weight"), head.cpu()):
                    raise ValueError(f"{path}: config.json ties the head to the embedding, but lm_head.weight differs")
                return


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError):
            raise ValueError(f"{path / _INDEX} is damaged") from None
        if absent := [name for name in names if not (path / name).is_file()]:
            raise ValueError(f"{path} lacks the shards {', '.join(absent)} that its index names")
        return [path / name for name in names]
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} has no model.safetensors")
    return [path / "model.safetensors"]


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, as it stands there."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint (no config.json)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return values


def load_config(path: str | Path) -> ModelConfig:
    """The `ModelConfig` of a checkpoint folder; options without support are errors that name them."""
    values = read_config(path)
    refused = [
        f"{key}={values[key]!r} (supported: {', '.join(repr(a) for a in allowed)})"
        for key, allowed in _FIXED.items()
        if key in values and values[key] not in allowed
    ]
    known = _HONOURED | set(_FIXED) | _IGNORED
    refused += [f"{key}={values[key]!r} (unknown)" for key in values if key not in known]
    if refused:
        raise ValueError(f"{Path(path) / 'config.json'}: unsupported options: {'; '.join(refused)}")
    needed = _HONOURED - set(_ILLADA_IDS) - {"head_dim", "initializer_range"}
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{Path(path) / 'config.json'} lacks {', '.join(missing)}, which cannot be guessed")
    given = {key: values[key] for key in _HONOURED if values.get(key) is not None}
    return ModelConfig.from_dict({**_ILLADA_IDS, **given})
