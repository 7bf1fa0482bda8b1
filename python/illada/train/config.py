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
from illada.text.files import read_text

Seed = Annotated[int, Ge(0), Lt(2**64)]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """The section [data]: the corpus, the length of windows, and weights of sources.

    weights: how much more often than by its tokens a source is drawn; 1 for sources without a weight, 0: never.

    ValueError: a wrong type or value.
    """

    path: str = "data/stdlib"  # corpus folder, made by `illada prepare`
    window: Positive = 1024  # tokens of a training window, split or not
    weights: dict[str, NonNegativeFloat] = field(default_factory=dict)  # {name = 2.0}: a source twice as often

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True)
class OptimizerConfig:
    """The section [optimizer]: AdamW and gradient clipping.

    ValueError: a wrong type or value.
    """

    learning_rate: PositiveFloat = 2e-4  # learning rate of the constant phase
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9  # AdamW's decay of the mean of gradients
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95  # AdamW's decay of the mean of squared gradients
    eps: PositiveFloat = 1e-8  # AdamW's term added to the root of the mean of squared gradients
    weight_decay: NonNegativeFloat = 0.1  # decay of matrices only, not of norms and biases
    clip_norm: NonNegativeFloat = 1.0  # largest global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")


@dataclass(frozen=True)
class ScheduleConfig:
    """The section [schedule]: warm-up and decay of the learning rate.

    ValueError: a wrong type or value.
    """

    warmup_steps: Count = 100  # steps of the linear rise from 0
    decay: Literal["cosine", "linear", "none"] = "cosine"  # shape of the decay: "cosine", "linear" or "none"
    decay_trigger: Literal["step", "plateau", "command"] = "step"  # "command": `illada train --decay-now`
    decay_start: NonNegativeFloat = 0.9  # first step of the decay; up to 1: a fraction of train.steps; above: a step
    decay_steps: Count = 0  # steps of the decay, which then end the run; 0: until train.steps
    final_learning_rate: NonNegativeFloat = 5e-6  # learning rate at the last step
    plateau_validations: Positive = 5  # validations without progress that begin the decay, for the trigger "plateau"
    plateau_improvement: Annotated[float, Ge(0), Lt(1)] = 0.002  # relative fall of the bound that counts as progress

    def __post_init__(self) -> None:
        check_fields(self, "schedule")


@dataclass(frozen=True)
class RunConfig:
    """The section [train]: output folder, batch sizes, device and checkpoints.

    ValueError: a wrong type or value.
    """

    out_dir: str = "runs/train"  # folder for config, metrics, plot and checkpoints
    steps: Positive = 1000  # optimizer steps
    windows_per_step: Positive = 32  # windows of a step, over all micro-batches
    windows_per_micro_batch: Positive = 32  # windows of one forward and backward; divides windows_per_step
    seed: Seed = 0  # seed of the initial weights, the order of the data, the splits and the masks
    device: Device = "auto"  # "cpu", "cuda" (bfloat16; head dim 64, 96, 128, 256), or "auto": a GPU where these hold
    dtype: DType = "float32"  # dtype of the computation, "float32" or "bfloat16"; weights and optimizer stay float32
    compile: bool = False  # torch.compile each layer
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, a third slower
    log_every: Positive = 10  # steps between lines of the log
    save_every: Positive = 500  # steps between checkpoints; the end of a run always writes one
    keep_last: Positive = 2  # checkpoints to keep

    def __post_init__(self) -> None:
        check_fields(self, "train")


@dataclass(frozen=True)
class ValidationConfig:
    """The section [validation]: how often and on how much held-out text.

    ValueError: a wrong type or value.
    """

    every: Positive = 250  # steps between validations; the last step always has one
    windows: Positive = 32  # held-out windows, spread evenly over the split
    strata: Positive = 8  # fixed values of t, (k + 1/2) / strata

    def __post_init__(self) -> None:
        check_fields(self, "validation")


@dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a training run, section by section.

    Attributes:
        model: "preset" and any field of `illada.config.ModelConfig`. Its vocabulary and special ids come from the
            corpus unless they are given.
        data: The corpus, the length of windows, and weights of sources.
        diffusion: Options of the forward process.
        optimizer: AdamW and gradient clipping.
        schedule: Warm-up and decay of the learning rate.
        train: Output folder, batch sizes, device and checkpoints.
        validation: How often and on how much held-out text.

    Raises:
        ValueError: A value has a wrong type or is out of range, or an unknown preset or model field. Also where
            train.windows_per_step is not a multiple of train.windows_per_micro_batch.
    """

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
        self.model_config({})  # checks names and values with the preset's own vocabulary

    def model_config(self, corpus: dict[str, Any]) -> ModelConfig:
        """Return the architecture for a corpus.

        Args:
            corpus: The header of the corpus, corpus.json; empty: use only this configuration.

        Returns:
            ModelConfig with the corpus's vocabulary and special ids, unless this configuration gives them.

        Raises:
            ValueError: An unknown preset or field, or a value that does not fit the corpus.
        """
        options = dict(self.model)
        preset = options.pop("preset", None)
        base = {} if preset is None else dict(_preset(preset))
        ids = [f"{name}_token_id" for name in ("bos", "pad", "eos", "mask")]
        from_corpus = {key: corpus[key] for key in ("vocab_size", *ids) if key in corpus}
        if corpus:
            base.pop("eot_token_id", None)  # the preset's id belongs to another tokenizer
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
        """Return nested dicts, section by section; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build the configuration from nested dicts, section by section.

        Raises:
            ValueError: An unknown section or key, or a value of a wrong type or out of range; the message names it.
        """
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
        """Return the whole configuration as TOML text; with `commented`, each key has a comment on its meaning."""
        import tomli_w

        lines: list[str] = []
        for section, values in self.to_dict().items():
            lines.append(f"[{section}]")
            comments = _comments(type(getattr(self, section))) if commented and section != "model" else {}
            if commented and section == "model":
                lines.append(f"# preset: {', '.join(PRESETS)}; any field of ModelConfig may be set beside it")
            for key, value in values.items():
                comment = f"  # {comments[key]}" if key in comments else ""
                if isinstance(value, dict):  # in one line, not as a section of its own
                    inline = ", ".join(tomli_w.dumps(value).splitlines())
                    lines.append(f"{key} = {{ {inline} }}{comment}" if value else f"{key} = {{}}{comment}")
                elif value is not None:  # TOML has no null: a missing key has its default
                    lines.append(tomli_w.dumps({key: value}).rstrip("\n") + comment)
            lines.append("")
        return "\n".join(lines)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training configuration from a TOML file and apply overrides.

    Args:
        path: The TOML file; None: start from the defaults.
        overrides: Texts such as "train.steps=100" or "--train.steps=100". A value that is not TOML is a string.

    Returns:
        The checked configuration.

    Raises:
        FileNotFoundError: There is no file at `path`.
        ValueError: The file is not TOML, a name is unknown, or a value has a wrong type or is out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no configuration file at {file}")
        text = read_text(file)
        try:
            values = tomllib.loads(text)
        except ValueError as error:  # an int of over 4,300 digits raises ValueError, not TOMLDecodeError
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
        if isinstance(values.setdefault(section, {}), dict):  # from_dict refuses a section that is not a dict
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
    """Return the meaning of each field, from the comment behind the field in the source."""
    import inspect

    comments = {}
    for line in inspect.getsource(kind).splitlines():
        declaration, _, comment = line.partition("  # ")
        if comment and ":" in declaration:
            comments[declaration.split(":")[0].strip()] = comment
    return comments
