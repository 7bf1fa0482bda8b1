"""The configuration of a training run: a dataclass for each section of a TOML file, overrides, and the way back."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from illada.config import PRESETS, DiffusionConfig, ModelConfig
from illada.schema import Count, NonNegativeFloat, Positive, PositiveFloat, check_fields, names_of
from illada.text import read_text

Seed = Annotated[int, Ge(0), Lt(2**64)]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/stdlib"  # corpus folder, made by `illada prepare`
    window: Positive = 1024  # tokens of a training window, split or not

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: PositiveFloat = 2e-4  # of the constant phase
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9  # of AdamW: decay of the mean of gradients
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95  # decay of the mean of their squares
    eps: PositiveFloat = 1e-8  # added to the root of that mean
    weight_decay: NonNegativeFloat = 0.1  # on matrices only, not on norms and biases
    clip_norm: NonNegativeFloat = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


@dataclass(frozen=True)
class ScheduleConfig:
    warmup_steps: Count = 100  # linear from 0
    decay: Literal["cosine", "linear", "none"] = "cosine"  # or "linear", or "none"
    decay_start: NonNegativeFloat = 0.9  # up to 1: as a fraction of train.steps; above: as a step
    final_learning_rate: NonNegativeFloat = 5e-6  # at the last step

    def __post_init__(self) -> None:
        check_fields(self, "schedule")


@dataclass(frozen=True)
class RunConfig:
    out_dir: str = "runs/train"  # config, metrics, plot and checkpoints go here
    steps: Positive = 1000  # optimizer steps
    windows_per_step: Positive = 32  # windows of a step, over all micro-batches
    windows_per_micro_batch: Positive = 32  # windows of one forward and backward; divides windows_per_step
    seed: Seed = 0  # of the initial weights, the order of the data, the splits and the masks
    device: Device = "auto"  # "cpu", "cuda" (bfloat16, head dim 64 or 128), or "auto": a GPU where all that is given
    dtype: DType = "float32"  # of the computation, "float32" or "bfloat16"; weights and optimizer stay float32
    compile: bool = False  # torch.compile each layer
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third slower
    log_every: Positive = 10  # steps between lines of the log
    save_every: Positive = 500  # steps between checkpoints; one is always written at the end
    keep_last: Positive = 2  # checkpoints to keep

    def __post_init__(self) -> None:
        check_fields(self, "train")


@dataclass(frozen=True)
class ValidationConfig:
    every: Positive = 250  # steps between validations; one is always made at the end
    windows: Positive = 32  # held-out windows, spread evenly over the split
    strata: Positive = 8  # fixed values of t, (k + 1/2) / strata

    def __post_init__(self) -> None:
        check_fields(self, "validation")


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
        if self.train.windows_per_step % self.train.windows_per_micro_batch:
            raise ValueError(
                f"train.windows_per_step ({self.train.windows_per_step}) must be a multiple of "
                f"train.windows_per_micro_batch ({self.train.windows_per_micro_batch})"
            )
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
            raise ValueError(f"unknown section {unknown[0]!r:.80}; there are {', '.join(sorted(sections))}")
        kinds = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        built: dict[str, Any] = {}
        for name, section in values.items():
            if not isinstance(section, dict):
                raise ValueError(f"{name} must be a section with keys, got {section!r:.80}")
            built[name] = dict(section) if name == "model" else _build_section(name, kinds[name], section)
        return cls(**built)

    def to_toml(self, *, commented: bool = False) -> str:
        """The whole configuration as a TOML file, with what each key means where `commented`."""
        import tomli_w

        lines: list[str] = []
        for section, values in self.to_dict().items():
            lines.append(f"[{section}]")
            comments = _comments(type(getattr(self, section))) if commented and section != "model" else {}
            if commented and section == "model":
                lines.append(f"# preset: {', '.join(PRESETS)}; any field of ModelConfig may be set beside it")
            for key, value in values.items():
                comment = f"  # {comments[key]}" if key in comments else ""
                if value is not None:  # TOML has no null: what is left out has its default
                    lines.append(tomli_w.dumps({key: value}).rstrip("\n") + comment)
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
        text = read_text(file)
        try:
            values = tomllib.loads(text)
        except ValueError as error:  # an int of over 4,300 digits is one, and not TOMLDecodeError
            raise ValueError(f"{file} is not TOML: {error!s:.200}") from None
        except RecursionError:
            raise ValueError(f"{file} is not TOML that can be read: it is nested too deeply") from None
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise ValueError(f"an override looks like --section.key=value, got {override!r:.80}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text  # a bare word is a string
        if isinstance(values.setdefault(section, {}), dict):  # from_dict refuses a section that is none
            values[section][key] = value
    return TrainConfig.from_dict(values)


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r:.80}")
    return PRESETS[name]


def _build_section(name: str, kind: Any, values: dict[str, Any]) -> Any:
    keys = names_of(kind)
    if unknown := sorted(set(values) - set(keys)):
        raise ValueError(f"unknown key {name}.{unknown[0]:.80}; there are {', '.join(f'{name}.{key}' for key in keys)}")
    return kind(**values)


def _comments(kind: type) -> dict[str, str]:
    """What each field means: the comments behind the fields in the source."""
    import inspect

    comments = {}
    for line in inspect.getsource(kind).splitlines():
        declaration, _, comment = line.partition("  # ")
        if comment and ":" in declaration:
            comments[declaration.split(":")[0].strip()] = comment
    return comments
