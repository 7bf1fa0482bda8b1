"""How a checkpoint is evaluated: `EvaluationSettings`, under our names and the published ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from illada.generation import GenerationConfig

#: Monte Carlo samples where none are asked for, as published.
MC_NUM = 128

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
    """How candidates are scored and texts are generated.

    llh: "confidence" (Eq. 2: it ranks candidates and is no likelihood) or "mc" (a lower bound on the log-likelihood).
        Default "confidence"; "mc" where mc_num is given.
    mc_num, mc_stratum: Monte Carlo samples, and over how many of them the mask counts are spread evenly.
    add_bos: begin each context with bos. append_eos: let the model see eos behind each candidate.
    check_greedy: find out whether greedy un-masking gives the candidate; off it costs nothing and reports False.
    cfg_scale: of classifier-free guidance.
    mode: "var" (append blocks) or "fixed" (the whole canvas from the start).
    gen_length: most new tokens; default what the task asks for (max_gen_toks).
    steps, block_length, temperature, rule, threshold, measure, cache: see `illada.generation.GenerationConfig`.
    end_think_text, end_think_boost, end_think_power: push the end of the reasoning, more so the later it is.
    max_length: of context and continuation together; default the model's.
    mask_id: only checked, against the checkpoint's own.
    seed: of all noise and of Monte Carlo's masks. Results depend on it and the request, not on batches or order.
    batch_size: prompts in the pack at once; "auto": as many as max_tokens has room for.
    max_tokens: of a forward pass. chunk_size: requests that are computed, and put into the journal, together.
    """

    llh: str | None = None
    mc_num: int | None = None
    mc_stratum: int = 16
    add_bos: bool = False
    append_eos: bool = False
    check_greedy: bool = False
    cfg_scale: float = 0.0
    mode: str = "var"
    gen_length: int | None = None
    steps: int = 32
    block_length: int = 32
    temperature: float = 0.0
    rule: str = "quota"
    threshold: float = 0.9
    measure: str = "probability"
    cache: str = "none"
    end_think_text: str = "</think>"
    end_think_boost: float = 0.0
    end_think_power: float = 2.0
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
        for name in (
            "mc_num",
            "mc_stratum",
            "gen_length",
            "steps",
            "block_length",
            "max_length",
            "max_tokens",
            "chunk_size",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("add_bos", "append_eos", "check_greedy"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        batch_size = self.batch_size
        if batch_size != "auto" and (not str(batch_size).isdigit() or int(batch_size) < 1):
            raise ValueError(f"batch_size must be an integer of at least 1, or auto, got {batch_size!r}")
        samples = self.mc_num or MC_NUM
        if self.llh == "mc" and samples > self.mc_stratum and samples % self.mc_stratum:
            raise ValueError(
                f"mc_num must be a multiple of mc_stratum ({self.mc_stratum}) or smaller than it, got {samples}"
            )
        # The generator's own checks, before any model is loaded; mode "var" floors gen_length to whole blocks.
        length = self.gen_length if self.mode == "fixed" else None
        self.generation(length or self.block_length, end_think=(0,))

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> EvaluationSettings:
        """From names and values, published ones included. TypeError lists the names there are."""
        values: dict[str, Any] = {}
        names = [field.name for field in dataclasses.fields(cls)]
        for name, value in arguments.items():
            here = ALIASES.get(name, name)
            if here not in names:
                raise TypeError(f"unknown model argument {name!r}; there are pretrained, tokenizer, device, dtype, "
                                f"journal, {', '.join(names)}, and the published {', '.join(ALIASES)}")  # fmt: skip
            if here in values:
                raise TypeError(f"model argument {here} is given twice, once as {name}")
            if name in _PUBLISHED_VALUES:
                allowed = _PUBLISHED_VALUES[name]
                if value not in allowed:
                    raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
                value = allowed[value]
            values[here] = value
        return cls(**values)

    def generation(self, gen_length: int, *, end_think: tuple[int, ...] = (), **changes: Any) -> GenerationConfig:
        """The generator's configuration for at most `gen_length` new tokens, a multiple of the block length.

        Args:
            end_think: the ids of end_think_text.
            changes: fields in place of these settings'.
        """
        block = changes.get("block_length", self.block_length)
        steps = self.steps
        if self.mode == "fixed" and gen_length % block == 0:
            # Clipped to the model's length a canvas may have a number of blocks that does not divide the steps.
            blocks = gen_length // block
            steps = steps if steps % blocks == 0 or gen_length == self.gen_length else max(1, steps // blocks) * blocks
        boost = {"end_think": end_think, "end_think_boost": float(self.end_think_boost),
                 "end_think_power": float(self.end_think_power)} if self.end_think_boost else {}  # fmt: skip
        values = {
            "mode": self.mode,
            "gen_length": gen_length,
            "block_length": block,
            "steps": steps,
            "temperature": float(self.temperature),
            "rule": self.rule,
            "threshold": float(self.threshold),
            "measure": self.measure,
            "cfg_scale": float(self.cfg_scale),
            "cache": self.cache,
            **boost,
            **changes,
        }
        return GenerationConfig(**values)

    def scoring(self, llh: str | None = None) -> dict[str, Any]:
        """What scores depend on, for the journal."""
        llh = llh or self.llh
        monte_carlo = {"mc_num": self.mc_num, "mc_stratum": self.mc_stratum, "seed": self.seed} if llh == "mc" else {}
        return {"llh": llh, **monte_carlo, "append_eos": self.append_eos, "cfg_scale": float(self.cfg_scale)}
