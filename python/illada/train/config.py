"""The configuration of a training run: a dataclass for each section of a TOML file, overrides, and the way back."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from illada.config import PRESETS, ModelConfig
from illada.diffusion import DiffusionConfig
from illada.text import read_text


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/stdlib"  # corpus folder, made by `illada prepare`
    window: int = 1024  # tokens of a training window, split or not


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 2e-4  # of the constant phase
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only, not on norms and biases
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: int = 100  # linear from 0
    decay: str = "cosine"  # or "linear", or "none"
    decay_start: float = 0.9  # up to 1: as a fraction of train.steps; above: as a step
    final_learning_rate: float = 5e-6  # at the last step


@dataclass(frozen=True)
class RunConfig:
    out_dir: str = "runs/train"  # config, metrics, plot and checkpoints go here
    steps: int = 1000  # optimizer steps
    windows_per_step: int = 32  # windows of a step, over all micro-batches
    windows_per_micro_batch: int = 32  # windows of one forward and backward; divides windows_per_step
    seed: int = 0  # of the initial weights, the order of the data, the splits and the masks
    device: str = "auto"  # "cpu", "cuda" (bfloat16, head dim 64 or 128), or "auto": a GPU where all that is given
    dtype: str = "float32"  # of the computation, "float32" or "bfloat16"; weights and optimizer stay float32
    compile: bool = False  # torch.compile each layer
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third slower
    log_every: int = 10  # steps between lines of the log
    save_every: int = 500  # steps between checkpoints; one is always written at the end
    keep_last: int = 2  # checkpoints to keep


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 250  # steps between validations; one is always made at the end
    windows: int = 32  # held-out windows, spread evenly over the split
    strata: int = 8  # fixed values of t, (k + 1/2) / strata


@dataclass(frozen=True)
class TrainConfig:
    """All of a run. `model` holds "preset" and any field of `illada.config.ModelConfig`; its vocabulary and special
    ids come from the corpus unless they are given."""

    model: dict[str, Any] = field(default_factory=lambda: {"preset": "tiny"})
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        positive = {
            "data.window": self.data.window,
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "train.steps": self.train.steps,
            "train.windows_per_step": self.train.windows_per_step,
            "train.windows_per_micro_batch": self.train.windows_per_micro_batch,
            "train.log_every": self.train.log_every,
            "train.save_every": self.train.save_every,
            "train.keep_last": self.train.keep_last,
            "validation.every": self.validation.every,
            "validation.windows": self.validation.windows,
            "validation.strata": self.validation.strata,
        }
        for name, number in positive.items():
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if self.train.windows_per_step % self.train.windows_per_micro_batch:
            raise ValueError(
                f"train.windows_per_step ({self.train.windows_per_step}) must be a multiple of "
                f"train.windows_per_micro_batch ({self.train.windows_per_micro_batch})"
            )
        for name, value, allowed in (
            ("train.dtype", self.train.dtype, ("float32", "bfloat16")),
            ("train.device", self.train.device, ("auto", "cpu", "cuda")),
            ("schedule.decay", self.schedule.decay, ("cosine", "linear", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {', '.join(allowed)}, got {value!r}")
        if self.schedule.warmup_steps < 0 or self.schedule.decay_start < 0:
            raise ValueError("schedule.warmup_steps and schedule.decay_start must not be negative")
        self.model_config({})  # names and values, with the preset's own vocabulary

    def model_config(self, corpus: dict[str, Any]) -> ModelConfig:
        """The architecture for a corpus header: its vocabulary and special ids, unless the config gives them."""
        options = dict(self.model)
        preset = options.pop("preset", None)
        base = {} if preset is None else dict(_preset(preset))
        ids = [f"{name}_token_id" for name in ("bos", "pad", "eos", "mask")]
        from_corpus = {key: corpus[key] for key in ("vocab_size", *ids) if key in corpus}
        if corpus:
            base.pop("eot_token_id", None)  # the preset's means another tokenizer's token
        config = ModelConfig.from_dict({**base, **from_corpus, **options})
        if corpus:
            if config.vocab_size < corpus["vocab_size"]:
                raise ValueError(f"model.vocab_size is {config.vocab_size}, the corpus needs {corpus['vocab_size']}")
            for key in ids:
                if getattr(config, key) != corpus[key]:
                    raise ValueError(f"model.{key} is {getattr(config, key)}, the corpus has {corpus[key]}")
            if config.max_position_embeddings < self.data.window:
                raise ValueError(
                    f"data.window is {self.data.window}, longer than model.max_position_embeddings "
                    f"({config.max_position_embeddings})"
                )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Section by section; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """From nested dicts; unknown sections and keys, and values of a wrong type, are errors that name them."""
        sections = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - sections):
            raise ValueError(f"unknown section {unknown[0]!r}; there are {', '.join(sorted(sections))}")
        hints = typing.get_type_hints(cls)
        built: dict[str, Any] = {}
        for name, section in values.items():
            if not isinstance(section, dict):
                raise ValueError(f"{name} must be a section with keys, got {section!r}")
            built[name] = dict(section) if name == "model" else _build_section(name, hints[name], section)
        return cls(**built)

    def to_toml(self, *, commented: bool = False) -> str:
        """The whole configuration as a TOML file, with what each key means where `commented`."""
        lines: list[str] = []
        for section, values in self.to_dict().items():
            lines.append(f"[{section}]")
            comments = _comments(type(getattr(self, section))) if commented and section != "model" else {}
            if commented and section == "model":
                lines.append(f"# preset: {', '.join(PRESETS)}; any field of ModelConfig may be set beside it")
            for key, value in values.items():
                comment = f"  # {comments[key]}" if key in comments else ""
                lines.append(f"{key} = {_toml_value(value)}{comment}")
            lines.append("")
        return "\n".join(lines)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """A TOML file (or the defaults) with overrides such as "train.steps=100" or "--train.steps=100" applied.

    Raises:
        FileNotFoundError; ValueError: not TOML, unknown names, values of a wrong type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no configuration file at {file}")
        try:
            values = tomllib.loads(read_text(file))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file} is not TOML: {error}") from None
        except RecursionError:
            raise ValueError(f"{file} is not TOML that can be read: it is nested too deeply") from None
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"an override looks like --section.key=value, got {override!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text  # a bare word is a string
        values.setdefault(section, {})[key] = value
    return TrainConfig.from_dict(values)


def _preset(name: Any) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _build_section(name: str, kind: type, values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"unknown key {name}.{unknown[0]}; there are {', '.join(f'{name}.{key}' for key in types)}")
    converted = {}
    for key, value in values.items():
        wanted = types[key]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise ValueError(f"{name}.{key} must be {wanted.__name__}, got {value!r}")
        converted[key] = value
    return kind(**converted)


def _comments(kind: type) -> dict[str, str]:
    """What each field means: the comments behind the fields in the source."""
    import inspect

    comments = {}
    for line in inspect.getsource(kind).splitlines():
        declaration, _, comment = line.partition("  # ")
        if comment and ":" in declaration:
            comments[declaration.split(":")[0].strip()] = comment
    return comments


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, float):
        return repr(value)
    return str(value)
