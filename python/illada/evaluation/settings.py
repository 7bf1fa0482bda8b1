"""The settings of an evaluation, `EvaluationSettings`, under our names and the published ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from illada.generation import GenerationConfig

#: Monte Carlo samples where none are asked for, as published.
MC_NUM = 128

#: The options of the generator that are settings here; the others are made from the task and `end_think_text`.
GENERATION = tuple(
    field.name
    for field in dataclasses.fields(GenerationConfig)
    if field.name not in ("end_think", "stop_tokens", "stop_strings")
)

#: Published names of settings, and how they are called here.
ALIASES = {
    "padd_eos": "append_eos",
    "add_bos_token": "add_bos",
    "is_check_greedy": "check_greedy",
    "cfg": "cfg_scale",
    "end_think_logit_boost": "end_think_boost",
    "end_think_boost_power": "end_think_power",
    "var": "mode",
    "remasking": "measure",
}
_PUBLISHED_VALUES: dict[str, dict[Any, str]] = {
    "var": {True: "var", False: "fixed"},
    "remasking": {"low_confidence": "probability", "random": "random"},
}

#: What the authors' evaluation does where it is not told otherwise.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "llh": "mc", "check_greedy": True, "mode": "fixed", "gen_length": 1024, "steps": 1024, "block_length": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings for scoring candidates and generating texts; `from_arguments` makes them of names and values.

    llh: "confidence" (Eq. 2: it ranks candidates and is no likelihood) or "mc" (a lower bound on the log-likelihood).
        Default "confidence"; "mc" where mc_num is given.
    mc_num, mc_stratum: Monte Carlo samples, and over how many of them the mask counts are spread evenly.
    add_bos: whether each prompt begins with bos; default where the tokenizer's post-processor adds it.
    append_eos: let the model see eos behind each candidate.
    check_greedy: find out whether greedy un-masking gives the candidate; off it costs nothing and reports False.
    gen_length: most new tokens; default what the task asks for (max_gen_toks).
    generation: all other options of the generator, each of which is an argument; cfg_scale is that of scores, too.
        `for_length` fills in what depends on the prompt and the task.
    end_think_text: what ends the reasoning, of which end_think_boost and end_think_power make the model think.
    max_length: of context and continuation together; default the model's.
    mask_id: only checked, against the checkpoint's own.
    seed: of all noise and of Monte Carlo's masks. Results depend on it and the request, not on batches or order.
    batch_size: prompts in the pack at once; "auto": as many as max_tokens has room for.
    max_tokens: of a forward pass. chunk_size: requests that are computed, and put into the journal, together.
    """

    llh: str | None = None
    mc_num: int | None = None
    mc_stratum: int = 16
    add_bos: bool | None = None
    append_eos: bool = False
    check_greedy: bool = False
    gen_length: int | None = None
    generation: GenerationConfig = GenerationConfig()
    end_think_text: str = "</think>"
    max_length: int | None = None
    mask_id: int | None = None
    seed: int = 0
    batch_size: int | str = "auto"
    max_tokens: int = 4096
    chunk_size: int = 128

    def __post_init__(self) -> None:
        if self.llh is None:
            object.__setattr__(self, "llh", "confidence" if self.mc_num is None else "mc")
        if self.llh not in ("confidence", "mc"):
            raise ValueError(f"llh must be confidence or mc, got {self.llh!r}")
        for name in ("mc_num", "mc_stratum", "gen_length", "max_length", "max_tokens", "chunk_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("add_bos", "append_eos", "check_greedy"):
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("add_bos", None):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        batch_size = self.batch_size
        if batch_size != "auto" and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise ValueError(f"batch_size must be an integer of at least 1, or auto, got {batch_size!r}")
        samples = self.mc_num or MC_NUM
        if self.llh == "mc" and samples > self.mc_stratum and samples % self.mc_stratum:
            raise ValueError(
                f"mc_num must be a multiple of mc_stratum ({self.mc_stratum}) or smaller than it, got {samples}"
            )
        if self.generation.mode == "infill":
            raise ValueError("mode must be var or fixed, got 'infill': a task's prompt has no masks to fill")

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> EvaluationSettings:
        """Make settings of names and values, also published names and the generator's.

        TypeError, which lists the names: a name is unknown.
        """
        values: dict[str, Any] = {}
        names = [field.name for field in dataclasses.fields(cls) if field.name != "generation"]
        names += [name for name in GENERATION if name not in names]
        for name, value in arguments.items():
            here = ALIASES.get(name, name)
            if here not in names:
                raise TypeError(f"unknown model argument {name!r}; there are pretrained, tokenizer, device, dtype, "
                                f"journal, trust_remote_code, {', '.join(names)}, and the published "
                                f"{', '.join(ALIASES)}")  # fmt: skip
            if here in values:
                raise TypeError(f"model argument {here} is given twice, once as {name}")
            if name in _PUBLISHED_VALUES:
                allowed = _PUBLISHED_VALUES[name]
                if value not in allowed:
                    raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
                value = allowed[value]
            values[here] = value
        options = {
            name: _option(name, values.pop(name)) for name in GENERATION if name in values and name != "gen_length"
        }
        # The generator's own checks, before any model is loaded. In mode "var" any gen_length will do.
        block, asked = options.get("block_length", GenerationConfig.block_length), values.get("gen_length")
        if isinstance(asked, int) and isinstance(block, int) and 0 < asked < block:
            block = options["block_length"] = asked
        length = asked if asked and options.get("mode") == "fixed" else block
        if not isinstance(block, int):  # so that the error names block_length
            length = GenerationConfig.gen_length
        reasoning = (0,) if options.get("end_think_boost") else ()
        return cls(**values, generation=GenerationConfig(gen_length=length, end_think=reasoning, **options))

    def for_length(self, gen_length: int, *, end_think: tuple[int, ...] = (), **changes: Any) -> GenerationConfig:
        """Return the generator's configuration for at most `gen_length` new tokens, a multiple of the block length.

        Args:
            gen_length: Number of new tokens, a multiple of the block length.
            end_think: the ids of end_think_text.
            changes: fields in place of these settings'.
        """
        block = changes.get("block_length", self.generation.block_length)
        steps = self.generation.steps
        if self.generation.mode == "fixed" and gen_length % block == 0:
            # Clipped to the model's length a canvas may have a number of blocks that does not divide the steps.
            blocks = gen_length // block
            steps = steps if steps % blocks == 0 or gen_length == self.gen_length else max(1, steps // blocks) * blocks
        changes |= {"steps": steps, "end_think": end_think if self.generation.end_think_boost else ()}
        return dataclasses.replace(self.generation, gen_length=gen_length, **changes)

    def scoring(self, llh: str | None = None) -> dict[str, Any]:
        """Return the settings that scores depend on, for the journal."""
        llh = llh or self.llh
        monte_carlo = {"mc_num": self.mc_num, "mc_stratum": self.mc_stratum, "seed": self.seed} if llh == "mc" else {}
        return {"llh": llh, **monte_carlo, "append_eos": self.append_eos, "cfg_scale": self.generation.cfg_scale}


def _option(name: str, value: Any) -> Any:
    """Return the value of a generator's option from what was typed.

    1 may stand for 1.0; ids are one number, or several joined by colons.
    """
    default = getattr(GenerationConfig, name)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, int | str):
        ids = str(value).split(":")
        if not all(part.isdecimal() for part in ids):
            raise ValueError(f"{name} must be token ids joined by colons, as in 5:7, got {value!r}")
        return tuple(map(int, ids))
    return value
