"""Reading and writing of weights: folders with config.json and safetensors.

The formats are those of `illada.checkpoints.formats`.

Every key is accounted for: a missing, unexpected or misshapen tensor, and a config option that is not understood, are
errors that name it, never a silent re-initialisation. A tied head is stored once, as the embedding.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from illada import hf_export
from illada.checkpoints.folders import config_file
from illada.checkpoints.formats import LAYOUTS, Layout, layout_of_file
from illada.config import ModelConfig
from illada.devices import find_device
from illada.files import check_inside, staged_directory
from illada.model import MaskedDiffusionModel
from illada.schema import TokenId, check_object, checked, some_of
from illada.terminal import shows
from illada.text.files import looks_like, read_json, read_json_object

_INDEX = "model.safetensors.index.json"
#: The dtypes of weights, by their names in safetensors.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: What belongs to a checkpoint beside its weights and its config.json: glob patterns.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenization_*.py", "generation_config.json",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- save


def save_pretrained(
    model: MaskedDiffusionModel,
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    progress: bool = False,
) -> None:
    """Write the model as a folder in the Hugging Face layout of its `config.model_type`, beside and renamed.

    Args:
        model: The model; its config must be expressible in that layout.
        path: Folder to write; an existing one is replaced.
        tokenizer: a tokenizer.json to put beside the weights, or a folder whose tokenizer files (TOKENIZER_FILES) to
            carry along; the hash of tokenizer.json goes into config.json.
        dtype: of the weights in the file; default their own.
        max_shard_bytes: larger models are split into several safetensors files with an index.
        progress: show a bar, on a terminal.

    Raises:
        ValueError: a weight that is finite, but not in `dtype`; parameters that the layout has no name for (adapters).
        NotImplementedError: an architecture that the layout has no words for. FileNotFoundError: no tokenizer there.
        OSError: nothing was written.
    """
    with staged_directory(path) as folder:
        write_pretrained(
            model, folder, tokenizer=tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes, progress=progress
        )


def write_pretrained(
    model: MaskedDiffusionModel,
    folder: Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    progress: bool = False,
) -> None:
    """Write the files of `save_pretrained` into an existing folder."""
    layout = LAYOUTS[model.config.model_type]
    config = layout.config_to_file(model.config)
    _check_names(model)
    # Before anything is written: reading the tokenizer may fail.
    beside = hf_export.files(model.config, None if tokenizer is None else Path(tokenizer)) if layout.auto_map else {}
    if tokenizer is not None:
        _copy_tokenizer(Path(tokenizer), folder)
        if (folder / "tokenizer.json").is_file():
            config["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if model.stop_token_ids and not (folder / "generation_config.json").is_file():
        ends = json.dumps({"eos_token_id": list(model.stop_token_ids)})
        (folder / "generation_config.json").write_text(ends + "\n", encoding="utf-8")
    config["torch_dtype"] = str(dtype or model.embed_tokens.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    hf_export.write(folder, beside)

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    tensors_of_file = (
        (key, parameter[rows])
        for name, parameter in model.state_dict().items()
        for key, rows in layout.file_parts(name, model.config).items()
    )
    for key, tensor in tensors_of_file:
        num_bytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += num_bytes
        total += num_bytes
    weight_map = {}
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=not shows(progress)) as bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            # One shard at a time, so that a conversion of dtype needs no copy of the whole model.
            tensors = {key: _cast(key, tensor, dtype or tensor.dtype).contiguous() for key, tensor in shard.items()}
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk is an OSError
                raise OSError(f"could not write {file}: {error}") from None
            weight_map.update(dict.fromkeys(shard, file))
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_names(model: MaskedDiffusionModel) -> None:
    """Raise ValueError unless the model has the parameters of its class and no others, such as an adapter's."""
    state, shapes = model.state_dict(), MaskedDiffusionModel.parameter_shapes(model.config)
    if beyond := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"the layout has no name for {some_of(beyond)}; merge adapters first (peft: merge_and_unload)")
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            got = list(state[name].shape) if name in state else "none"
            raise ValueError(f"{name} must be {list(shape)} by the config, got {got}")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another dtype.

    ValueError, which names the tensor: a finite value would become infinite.
    """
    cast, limit = tensor.to(dtype), torch.finfo(dtype).max
    if limit < torch.finfo(tensor.dtype).max and bool((lost := cast.isinf() & tensor.isfinite()).any()):
        text, wider = str(dtype).removeprefix("torch."), "bfloat16 can" if dtype == torch.float16 else "float32 can"
        largest = tensor[lost].abs().max().item()
        raise ValueError(f"{name} holds {largest:g}, which {text} cannot: it ends at {limit:g}; {wider}")
    return cast


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if not source.is_dir():
        shutil.copyfile(source, folder / "tokenizer.json")
        return
    files = tokenizer_files(source)
    if not files:
        raise FileNotFoundError(f"{source} has no tokenizer files ({', '.join(TOKENIZER_FILES[:3])}, ...)")
    for file in files:
        check_inside(file, source)
    for file in files:
        (folder / file.relative_to(source)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.relative_to(source))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that its tokenizer consists of."""
    return sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file())


# --------------------------------------------------------------------------------------------------------------- load


def load_pretrained(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mask_token_id: int | None = None,
) -> MaskedDiffusionModel:
    """Load the model of a checkpoint folder in any checkpoint format of `illada.checkpoints.formats`.

    Weights are memory-mapped: on a CPU, in the file's dtype, memory holds them once. The projections of q, k and v are
    copied into the model's one projection, and their part of the file does not stay mapped.

    Args:
        path: The checkpoint folder.
        device: Device of the weights.
        dtype: Dtype of all weights; default that of the file, or that of config.json where the file has several.
        mask_token_id: Id of the mask token, for a checkpoint whose config.json does not name it (Qwen2).

    Returns:
        The model, with gradients on for all parameters. Its `stop_token_ids` are those of generation_config.json.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The files are damaged or not a checkpoint; keys are missing, unexpected or have another shape;
            config options are not supported; there is no mask id, or two; the file has several dtypes and config.json
            names none; a finite weight is not finite in `dtype`.
    """
    path = Path(path)
    config = load_config(path, mask_token_id=mask_token_id)
    weights = read_weights(path, config, device=device, dtype=dtype)
    model = MaskedDiffusionModel(config, device="meta")
    model.load_state_dict(weights, strict=True, assign=True)
    model.requires_grad_(True)
    model.stop_token_ids = read_stop_tokens(path)
    return model


class _Part(NamedTuple):
    """A tensor that a file must have: some or all rows of a parameter.

    rows: all of them, or those of one projection.
    """

    parameter: str
    rows: slice
    shape: list[int]


def _parts(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> dict[str, _Part]:
    """Return the tensors of a checkpoint's files by their keys, from the shapes of the model's parameters."""
    layout = LAYOUTS[config.model_type]
    return {
        key: _Part(name, rows, [len(range(*rows.indices(shape[0]))), *shape[1:]])
        for name, shape in shapes.items()
        for key, rows in layout.file_parts(name, config).items()
    }


def stored_dtype(path: Path, config: ModelConfig) -> torch.dtype | None:
    """Return the dtype that `read_weights` chooses for a checkpoint folder, from the headers of its files.

    None: no file holds a tensor of the model.
    """
    found = _dtypes(_weight_files(path), _parts(config, MaskedDiffusionModel.parameter_shapes(config)))
    return _dtype_of_mixed(path, found) or next(iter(found), None)


def read_weights(
    path: Path, config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a model's parameters by name from a checkpoint folder.

    ValueError: the folder's tensors are not exactly these.
    """
    device = find_device(device)
    layout = LAYOUTS[config.model_type]
    shapes = MaskedDiffusionModel.parameter_shapes(config)
    expected = _parts(config, shapes)
    tied_head = layout.file_name("lm_head.weight") if config.tie_word_embeddings else None
    files = _weight_files(path)
    _check_tensors(path, files, expected, tied_head)
    dtype = dtype or _dtype_of_mixed(path, _dtypes(files, expected))
    state: dict[str, Tensor] = {}
    for file in files:
        # What is copied is read through a mapping of its own, which is given up: no page stays beside its copy.
        with _opened(file, device) as tensors, _opened(file, device) as copied:
            for key in tensors.keys():
                if key == tied_head:
                    _check_tie(tensors.get_tensor(key).cpu(), path, files, layout)
                    continue
                name, rows, _ = expected[key]
                tensor = (tensors if rows == slice(None) else copied).get_tensor(key)
                if rows == slice(None):
                    state[name] = _cast(key, tensor, dtype or tensor.dtype)
                    continue
                if name not in state:
                    state[name] = torch.empty(shapes[name], dtype=dtype or tensor.dtype, device=device)
                state[name][rows] = _cast(key, tensor, state[name].dtype)
    return state


def _check_tensors(path: Path, files: Sequence[Path], expected: Mapping[str, _Part], tied_head: str | None) -> None:
    """Raise ValueError unless the files have exactly these tensors.

    Only names, shapes and dtypes are looked at.
    """
    found: set[str] = set()
    unexpected: list[str] = []
    wrong: list[str] = []
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():
                stored = tensors.get_slice(key)
                if key not in expected and key != tied_head:
                    unexpected.append(key)
                elif stored.get_dtype() not in _DTYPES:
                    wrong.append(f"{key} is {stored.get_dtype()}, expected {', '.join(_DTYPES)}")
                elif key in expected and stored.get_shape() != expected[key].shape:
                    wrong.append(f"{key} is {stored.get_shape()}, expected {expected[key].shape}")
                elif key in found:
                    wrong.append(f"{key} is in two files")
                found.add(key)
    missing = [key for key in expected if key not in found]
    problems = [
        f"{kind}: {some_of(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
        if keys
    ]
    if problems:
        raise ValueError(f"the weights in {path} do not fit its config.json; " + "; ".join(problems))


@contextlib.contextmanager
def _opened(file: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        said = looks_like(file) or f"is damaged or not a safetensors file: {error!s:.200}"
        raise ValueError(f"{file} {said}") from None


def _dtypes(files: Sequence[Path], keys: Container[str] | None = None) -> dict[torch.dtype, str]:
    """Return the dtypes of the tensors `keys` (default all), each with the first tensor that has it."""
    found: dict[torch.dtype, str] = {}
    for file in files:
        with _opened(file) as tensors:
            for key in tensors.keys():
                if (keys is None or key in keys) and (kind := tensors.get_slice(key).get_dtype()) in _DTYPES:
                    found.setdefault(_DTYPES[kind], key)
    return found


def _dtype_of_mixed(path: Path, found: Mapping[torch.dtype, str]) -> torch.dtype | None:
    """Return the dtype in which weights of several dtypes are loaded, as in transformers: that of config.json.

    None: they have one dtype.
    """
    if len(found) < 2:
        return None
    config = read_config(path)
    named = config.get("dtype") or config.get("torch_dtype")
    for dtype in _DTYPES.values():
        if named == str(dtype).removeprefix("torch."):
            return dtype
    listed = ", ".join(f"{str(dtype).removeprefix('torch.')} ({key})" for dtype, key in found.items())
    raise ValueError(
        f"the weights in {path} have several dtypes, {listed}, and config.json's torch_dtype is {named!r}; "
        "give dtype (--dtype), to which all are converted"
    )


def _check_tie(head: Tensor, path: Path, files: Sequence[Path], layout: Layout) -> None:
    """Check that a head stored beside a tied embedding equals that embedding, up to rounding."""
    name, key = layout.file_name("lm_head.weight"), layout.file_name("embed_tokens.weight")
    for file in files:
        with _opened(file) as tensors:
            if key in tensors.keys() and tensors.get_slice(key).get_dtype() in _DTYPES:
                embedding = tensors.get_tensor(key)
                narrow = min(head.dtype, embedding.dtype, key=lambda dtype: dtype.itemsize)
                same = head.shape == embedding.shape and torch.allclose(
                    head.to(narrow), embedding.to(narrow), rtol=0, atol=0, equal_nan=True
                )
                if not same:
                    raise ValueError(f"{path}: config.json ties the head to the embedding, but {name} differs")
                return


def _weight_files(path: Path) -> list[Path]:
    if (path / _INDEX).is_file():
        file = path / _INDEX
        weight_map = check_object(read_json(file), {"weight_map": dict[str, str]}, str(file))["weight_map"]
        for key, name in weight_map.items():
            if Path(name).name != name:
                raise ValueError(f"{file}: weight_map.{key:.80} must be a file in its folder, got {name!r:.80}")
        names = sorted(set(weight_map.values()))
        if absent := [name for name in names if not os.path.isfile(path / name)]:
            raise ValueError(f"{path} lacks the shards {some_of(absent)} that its index names")
        return [path / name for name in names]
    if not (path / "model.safetensors").is_file():
        pickled, shards = (sorted(p.name for p in path.glob(pattern)) for pattern in ("*.bin", "*.safetensors"))
        hint = f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors" if pickled else ""
        if shards:
            raise FileNotFoundError(f"{path} has {shards[0]}, but not their index, {_INDEX}: download it, too")
        raise FileNotFoundError(f"{path} has no model.safetensors{hint}")
    return [path / "model.safetensors"]


def read_stop_tokens(path: str | Path) -> tuple[int, ...]:
    """Return the ids that end a sequence, by a checkpoint folder's generation_config.json.

    The tuple is empty where it names none.
    """
    file = Path(path) / "generation_config.json"
    ids = read_json_object(file).get("eos_token_id") if file.is_file() else None
    if not isinstance(ids, list):
        ids = [] if ids is None else [checked(TokenId, ids, f"{file}: eos_token_id")]
    return tuple(checked(list[TokenId], ids, f"{file}: eos_token_id"))


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the config.json of a checkpoint folder as it stands there."""
    return read_json_object(config_file(Path(path)))


def load_config(path: str | Path, *, mask_token_id: int | None = None) -> ModelConfig:
    """Return the `ModelConfig` of a checkpoint folder; options without support are errors that name them."""
    values, source = read_config(path), str(Path(path) / "config.json")
    return layout_of_file(values, source).config_from_file(values, source=source, mask_token_id=mask_token_id)


# ------------------------------------------------------------------------------------------------------------ convert


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    mask_token_id: int | None = None,
    max_shard_bytes: int = 5 << 30,
    progress: bool = False,
) -> ModelConfig:
    """Rewrite a checkpoint in another dtype, checkpoint format or shard size, and copy its tokenizer files.

    Args:
        source: The checkpoint folder to read.
        target: The folder to write. It is written under another name beside it and then renamed; an existing target is
            replaced.
        model_type: Checkpoint format of the target: illada, llada, dream, qwen2 or illada_hf; default that of the
            source. transformers loads illada_hf without illada.
        dtype: Dtype of the weights in the target; default that of the source.
        mask_token_id: As in `load_pretrained`.
        max_shard_bytes: As in `save_pretrained`.
        progress: As in `save_pretrained`.

    Returns:
        The ModelConfig of the target.

    Raises:
        ValueError, FileNotFoundError: As `load_pretrained` and `save_pretrained`.
        NotImplementedError: The target's checkpoint format cannot express the architecture; the message names the
            fields.
        OSError: Writing failed; nothing was written to the target.
    """
    source = Path(source)
    load_config(source, mask_token_id=mask_token_id)  # raise its errors first
    # Weights of one dtype stay mapped, and are converted a shard at a time; of several, each goes to `dtype` at once.
    mixed = dtype is not None and len(_dtypes(_weight_files(source))) > 1
    model = load_pretrained(source, dtype=dtype if mixed else None, mask_token_id=mask_token_id)
    if model_type is not None:
        model.config = ModelConfig.from_dict({**model.config.to_dict(), "model_type": model_type})
    save_pretrained(
        model,
        target,
        tokenizer=source if tokenizer_files(source) else None,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    return model.config
