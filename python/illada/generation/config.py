"""The settings and the results of a generation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from numbers import Integral, Real

from illada.ops.op_types import MEASURES
from illada.ops.op_types import RULES as REMASK_RULES

MODES = ("var", "fixed", "infill")
RULES = (*REMASK_RULES, "origin")  # those of `illada.remask`, and Dream's, which commits random positions
SCHEDULES = ("even", "dream")
CACHES = ("none", "prefix", "block")

#: The bound of gen_length, block_length and steps: above any model's context, and small enough to plan for.
MOST_TOKENS = 1 << 20
_COUNTS = ("gen_length", "block_length", "steps", "top_k")
_NUMBERS = (
    "temperature", "top_p", "threshold", "factor", "entropy_bound", "eps", "alg_temp", "take_back", "cfg_scale",
    "end_think_boost", "end_think_power",
)  # fmt: skip

#: Options that only some others make any use of, and which do.
_BELONGS: tuple[tuple[str, str, Callable[[GenerationConfig], bool]], ...] = (
    ("schedule", "rule quota", lambda c: c.rule == "quota"),
    ("alg_temp", "rule quota", lambda c: c.rule == "quota"),
    ("take_back", "rule quota with schedule even", lambda c: c.rule == "quota" and c.schedule == "even"),
    ("threshold", "rule threshold", lambda c: c.rule == "threshold"),
    ("factor", "rule factor", lambda c: c.rule == "factor"),
    ("entropy_bound", "rule entropy_bound", lambda c: c.rule == "entropy_bound"),
    ("measure", "rules quota, threshold and factor", lambda c: c.rule in ("quota", "threshold", "factor")),
    ("eps", "schedule dream and rule origin", lambda c: c.schedule == "dream" or c.rule == "origin"),
    ("end_think_power", "end_think_boost above 0", lambda c: c.end_think_boost > 0),
)


@dataclass(frozen=True)
class GenerationConfig:
    """The settings of the generation of one sequence.

    The sequences of a batch may differ in all of them but the cache.

    Where the masks are (sources in docs/generation.md):
        mode: "var": append `block_length` masks at a time, nothing is known of later blocks (iLLaDA); "fixed": all
            `gen_length` masks are there from the start, filled block by block (LLaDA; with one block, Dream); "infill":
            the masks of the prompt are filled, `block_length` of them at a time from the left, nothing is appended.
        gen_length: most tokens to generate; a multiple of block_length. In mode "var" less where the context ends.
        block_length: tokens that are filled together before the next ones.
        steps: forward passes; of each block in modes "var" and "infill", of all blocks together in mode "fixed" (as
            published). All rules but "quota" and "origin" may need fewer; the last step commits whatever is left.

    Which token, and which positions keep it:
        temperature: of the Gumbel noise, 0 is greedy.
        top_k, top_p: sample among the most likely tokens alone: the k first, of these until their sum reaches top_p;
            0 and 1 keep all. Confidence is then of what is left, at the temperature, as in Dream.
        confidence_at_temperature: Dream's confidence without these filters, too; otherwise it is of the model's own
            distribution (LLaDA).
        measure: of confidence: "probability", "margin", "entropy" (negative) or "random"; see `illada.sample_tokens`.
            Rules "entropy_bound" and "origin" do not look at it.
        rule: "quota": a fixed number of the most confident a step, by `schedule`; "threshold": all with confidence >=
            `threshold`; "factor": the most confident n with c_(r) > 1 - `factor` / (r + 1) for r <= n;
            "entropy_bound": the n of least entropy with sum H - max H <= `entropy_bound`. "threshold", "factor" and
            "entropy_bound" commit at least one a step. "origin": each mask with probability 1 - s/t (Dream), whatever
            its confidence.
        schedule: of "quota": "even": masks / steps, the first steps one more (LLaDA); "dream": floor(masks (1 - s/t))
            with t from 1 to `eps`, the last step the rest.
        eps: the last t of schedule "dream" and of rule "origin".
        alg_temp: > 0 draws the quota's positions without replacement by softmax(confidence / alg_temp) (Dream).
        take_back: ReMDM's cap on the probability with which a committed token of the block becomes a mask again in a
            step, min(take_back, (1 - a_s) / a_t) with a the share committed; the quota grows by as many. 0: never.
        cfg_scale: w of classifier-free guidance, logits = un + (w + 1) (logits - un); `un` sees masks for the prompt.
        forbid_tokens: ids that are never sampled, their logits are -inf (official name: logits_eos_inf, for the eos).
        delay_tokens: ids that are committed after all others; their confidence is the lowest, and the others' is taken
            without them (official name: confidence_eos_eot_inf, for eos and end-of-turn).
        end_think: ids of the text that ends reasoning, such as "</think>". As long as the generated text lacks it, its
            next id gains end_think_boost * progress^end_think_power on the first mask of the block, progress the share
            of gen_length up to there (iLLaDA).

    When it stops, looked at after each block:
        stop_tokens: ids that end a sequence; default the model's eos and, if it has one, end of turn, and those of its
            generation_config.json.
        stop_strings: texts that end a sequence; they need the tokenizer. With `end_think` they count behind it alone:
            they may well stand in the reasoning.

    Speed:
        cache: of keys and values: "none" (exact); "prefix": everything before the block is computed at its first step
            and kept for the others; "block": a finished block is computed once more, in the first step of the next one,
            and kept for good. The last two change the result a little: `illada agreement` says by how much.
    """

    mode: str = "var"
    gen_length: int = 128
    block_length: int = 32
    steps: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    confidence_at_temperature: bool = False
    measure: str = "probability"
    rule: str = "quota"
    schedule: str = "even"
    eps: float = 1e-3
    threshold: float = 0.9
    factor: float = 1.0
    entropy_bound: float = 0.1
    alg_temp: float = 0.0
    take_back: float = 0.0
    cfg_scale: float = 0.0
    forbid_tokens: tuple[int, ...] = ()
    delay_tokens: tuple[int, ...] = ()
    end_think: tuple[int, ...] = ()
    end_think_boost: float = 0.0
    end_think_power: float = 2.0
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    cache: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("rule", RULES),
            ("measure", MEASURES),
            ("schedule", SCHEDULES),
            ("cache", CACHES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_types()
        for name in _COUNTS:
            if getattr(self, name) < (name != "top_k"):
                raise ValueError(f"{name} must be at least {int(name != 'top_k')}, got {getattr(self, name)}")
            if name != "top_k" and getattr(self, name) > MOST_TOKENS:
                raise ValueError(f"{name} must be at most {MOST_TOKENS}, got {getattr(self, name)}")
        if self.mode != "infill" and self.gen_length % self.block_length:
            divisors = [n for n in range(1, self.gen_length + 1) if self.gen_length % n == 0]
            raise ValueError(
                f"gen_length ({self.gen_length}) must be a multiple of block_length ({self.block_length}); "
                f"block_length may be {', '.join(map(str, divisors))}"
            )
        if self.mode == "fixed" and self.steps % self.num_blocks:
            raise ValueError(
                f"in mode fixed steps ({self.steps}) must be a multiple of the {self.num_blocks} blocks "
                f"(gen_length / block_length), such as {self.num_blocks * max(1, self.steps // self.num_blocks)}"
            )
        for name in ("temperature", "factor", "entropy_bound", "alg_temp", "cfg_scale", "end_think_power"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if not (0 <= self.threshold <= 1 or (self.measure == "entropy" and math.isfinite(self.threshold))):
            raise ValueError(f"threshold must be in [0, 1] (finite, with measure entropy), got {self.threshold}")
        if not 0 <= self.take_back <= 1:
            raise ValueError(f"take_back must be a probability, in [0, 1], got {self.take_back}")
        if self.top_k >= 1 << 63:
            raise ValueError(f"top_k must be below 2^63, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, owners, used in _BELONGS:
            if (value := getattr(self, name)) != defaults[name] and not used(self):
                others = ("end_think_boost",) if name == "end_think_power" else ("rule", "schedule")
                got = ", ".join(f"{other} {getattr(self, other)!r}" for other in others)
                raise ValueError(f"{name} ({value!r}) is not used: it belongs to {owners}, got {got}")
        if self.mode == "infill" and self.cache != "none":
            raise ValueError(f"mode infill has no caches: its masks are anywhere; got cache {self.cache!r}")
        if not 0 <= self.end_think_boost < math.inf or (self.end_think_boost > 0 and not self.end_think):
            raise ValueError(
                f"end_think_boost ({self.end_think_boost}) must be finite and >= 0, and needs the ids of end_think"
            )
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds an empty text, which would end every sequence at once")
        if self.end_think_boost and self.mode == "infill":
            raise ValueError("end_think_boost goes with modes var and fixed, where text follows the prompt; got infill")

    def _check_types(self) -> None:
        """Raise TypeError for values that would fail far from here, or mean something else.

        For example, a text is also a list of texts.
        """
        for names, kind, wanted in ((_COUNTS, Integral, "an integer"), (_NUMBERS, Real, "a number")):
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise TypeError(f"{name} must be {wanted}, got {value!r}")
        if not isinstance(self.confidence_at_temperature, bool):
            raise TypeError(f"confidence_at_temperature must be True or False, got {self.confidence_at_temperature!r}")
        for name in ("forbid_tokens", "delay_tokens", "end_think", "stop_tokens", "stop_strings"):
            values = getattr(self, name)
            if values is None and name == "stop_tokens":
                continue
            wanted = "texts" if name == "stop_strings" else "token ids"
            listed = isinstance(values, Collection) and not isinstance(values, str)
            if not listed or not all(isinstance(value, str if wanted == "texts" else Integral) for value in values):
                raise TypeError(f"{name} must be a tuple of {wanted}, got {values!r}")

    @property
    def filtered(self) -> bool:
        """Whether confidence is of the distribution that is sampled, not of the model's own."""
        return self.top_p < 1 or self.top_k > 0 or self.confidence_at_temperature

    @property
    def num_blocks(self) -> int:
        """The number of blocks of a full-length generation, in modes "var" and "fixed"."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """The largest number of forward passes of one block."""
        return self.steps // self.num_blocks if self.mode == "fixed" else self.steps


@dataclass
class GenerationResult:
    """The result of the generation of one sequence.

    tokens: the new ids, without the prompt, up to and without the first stop token; in mode "infill" the whole
        sequence. Masks are left in it where the model gave NaN, or a mask, to the end.
    finish_reason: "stop_token", "stop_string", "length", or "filled" (mode "infill").
    forwards: forward passes this sequence took part in.
    text: of the tokens, cut before the first stop string, where a tokenizer was given.
    """

    tokens: list[int]
    finish_reason: str
    forwards: int
    text: str | None = None


@dataclass(frozen=True)
class GenerationDelta:
    """The part of one prompt's result that one block adds; the deltas of a prompt, joined, are that result.

    Their text is, unless the tokenizer's decoder makes other text of earlier tokens when more follow.

    index: of the prompt. tokens: new ids, without the first stop token and what follows it; in mode "infill" those
        of the block's masks.
    text: that is new, None without a tokenizer. What may be the beginning of a stop string, or a part of a character,
        waits for the next block; in mode "infill" text goes up to the next mask.
    result: with the last delta of a prompt, else None.
    """

    index: int
    tokens: list[int]
    text: str | None = None
    result: GenerationResult | None = None
