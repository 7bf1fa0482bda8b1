"""A benchmark of generation from unequal prompts, with the published loops as peers.

All have the same weights and the same rule.

    illada         all prompts in one pack; only masked rows meet the head
    illada prefix  the same on a cache that is refreshed at each block; `error` is the share of tokens that differ
    illada block   the same on a cache of frozen blocks
    one by one     the authors' loop, a prompt at a time (iLLaDA's takes no more), all logits
    padded         LLaDA's loop on left-padded rows under a mask; mode fixed alone, its only one for a batch

On a GPU a model of 8B geometry in bfloat16, and `illada launched`: as `illada block`, without CUDA graphs.

Random weights, temperature 0, nothing stops early: the work is the same for all, and in float32 so must be the tokens.
In bfloat16 predictions that are nearly as sure as each other change places, and what follows from them is other text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from illada.config import PRESETS, ModelConfig
from illada.generation import GenerationConfig, generate
from illada.model import MaskedDiffusionModel

from . import ceiling, published
from .attention_providers import given
from .runner import Case, Goal, Provider, ratio
from .shapes import Shapes
from .timing import CPU
from .weights import random_model

DEVICES = ("cpu", "cuda")
OWN = ("seqlens", "vocab")
LEAST_VOCAB = 7  # special tokens take the ids up to 5

#: The sizes of each model's cases: new tokens, block, steps of a block, longest prompt.
SIZES = {"tiny": (32, 32, 32, 64), "small": (32, 32, 16, 64), "8b": (256, 32, 32, 512), "8b-batch": (64, 32, 16, 512)}

#: How many times the tokens per second of one by one. On a CPU a pack saves what nobody asks for (the head and the last
#: layer of tokens that are not masked: half of `tiny`'s operations here, a third of `small`'s) and the cost of small
#: calls, which a wide model hardly has; what a GPU saves, reading the weights once for all prompts, is not in it.
GOALS = {"tiny": 4.0, "small": 2.0}

#: Forward passes per second of one prompt: 80% of the 220 in which 3.35 TB/s, an H100's, read 15.2 GB of weights.
FORWARDS_GOAL = 176


def make_model(name: str, device: torch.device = CPU, **changes: Any) -> MaskedDiffusionModel:
    """Return a model with random weights whose predictions differ from position to position.

    Larger weights than usual make it surer of them, as trained models are.
    """
    if name in PRESETS:
        model = MaskedDiffusionModel(ModelConfig.preset(name, **{"initializer_range": 0.08, **changes}), seed=1)
    else:
        model = random_model(ModelConfig.preset("illada_8b", **changes), device)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(2)
        model.embed_tokens.weight[model.config.mask_token_id] *= 0.01  # never predicted
    return model.eval()


def make_prompts(batch: int, longest: int, vocab_size: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """Return random prompts of these lengths.

    By default lengths are from 8 on, as many short as long ones on a logarithmic scale.
    """
    random = np.random.default_rng(batch)
    if lengths is None:
        lengths = np.exp(random.uniform(np.log(8), np.log(longest), batch)).astype(int).tolist()
    return [random.integers(6, vocab_size, n).tolist() for n in lengths]


def make_case(
    name: str, batch: int, mode: str, device: torch.device = CPU, lengths: Sequence[int] | None = None, **changes: Any
) -> Case:
    """Return the case of all ways to generate, for one model and batch.

    `changes` replace settings of the model's preset.
    """
    length, block, steps, longest = SIZES[name]
    passes = steps * (1 if mode == "var" else length // block)

    def make() -> list[Provider]:
        model = make_model(name, device, **changes)
        prompts = make_prompts(batch, longest, model.config.vocab_size, lengths)
        config = GenerationConfig(mode=mode, gen_length=length, block_length=block, steps=passes, stop_tokens=())
        same: dict[str, Any] = {"gen_length": length, "block_length": block, "steps": passes, "var": mode == "var"}

        def ours(cache: str, cuda_graphs: bool = True) -> tuple[list[list[int]], int]:
            cached = dataclasses.replace(config, cache=cache)
            results = generate(model, prompts, cached, cuda_graphs=cuda_graphs)
            return [r.tokens for r in results], max(r.forwards for r in results)

        def one_by_one() -> tuple[list[list[int]], int]:
            done = [published.generate(model, [p], **same) for p in prompts]
            return [tokens for found, _ in done for tokens in found], sum(forwards for _, forwards in done)

        reference = np.array(one_by_one()[0])

        def error(result: tuple[list[list[int]], int]) -> float:
            return float((np.array(result[0]) != reference).mean())

        def counts(result: tuple[list[list[int]], int]) -> dict[str, int]:
            return {"tokens": batch * length, "forwards": result[1]}

        calls: dict[str, Any] = {"illada": partial(ours, "none")}
        calls |= {f"illada {cache}": partial(ours, cache) for cache in ("prefix", "block")}
        if device.type == "cuda":
            calls["illada launched"] = partial(ours, "block", cuda_graphs=False)
        calls["one by one"] = one_by_one
        if mode == "fixed":
            calls["padded"] = partial(published.generate, model, prompts, **same)
        return [Provider(name, call, error=error, counts=counts) for name, call in calls.items()]

    large = name not in PRESETS
    return Case(
        f"{name} {mode} {batch} prompts",
        make,
        # the weights, once for each forward pass; the embedding is the head
        bytes=2.0 * ModelConfig.preset("illada_8b").num_parameters * steps * (length // block) if large else None,
        repeats=3 if large else 5,
        slow=set() if name == "tiny" else {"one by one"},
    )


def cases(device: torch.device = CPU) -> list[Case]:
    """Return the cases of batches of 1, 8 and 32 prompts.

    The smallest model runs in both modes, larger ones in iLLaDA's.
    """
    if device.type == "cuda":
        batches = (("8b", 1), ("8b-batch", 8), ("8b-batch", 32))
        return [make_case(name, batch, "var", device) for name, batch in batches]
    runs = (("tiny", "var"), ("tiny", "fixed"), ("small", "var"))
    return [make_case(name, batch, mode) for name, mode in runs for batch in (1, 8, 32)]


def quick(device: torch.device = CPU) -> list[Case]:
    """Return one small case: a batch of 8 on the smallest model, or one prompt on a GPU."""
    return [make_case("8b", 1, "var", device) if device.type == "cuda" else make_case("tiny", 8, "var")]


def own(shapes: Shapes, device: torch.device = CPU) -> list[Case]:
    """Return the case of prompts of the given lengths."""
    lengths, more = shapes.seqlens, {"vocab_size": shapes.vocab} if shapes.vocab else {}
    if lengths and 0 in lengths:
        raise ValueError("--seqlens are prompts here, of at least one token")
    name, mode = ("8b-batch" if device.type == "cuda" else "tiny"), "var"
    case = make_case(name, len(lengths) if lengths else 8, mode, device, lengths, **more)
    prompts = given(lengths).name if lengths else "8"
    return [
        dataclasses.replace(case, name=f"{name}{f' V{shapes.vocab}' if shapes.vocab else ''} {mode} {prompts} prompts")
    ]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    ours = ["illada", "illada prefix", "illada block"]
    return [*ours, *(["illada launched"] if device.type == "cuda" else []), "one by one", "padded"]


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of 32 prompts and of the 8B geometry.

    32 prompts: the tokens of the published loop, several times as fast. 8B geometry: near what memory allows.
    """
    found = []
    for r in records:
        if r["case"] == "8b var 1 prompts" and r["provider"] == "illada block" and r["counts"]:
            forwards, share = 1e3 * r["counts"]["forwards"] / r["median_ms"], ceiling.share(records, r, "bytes")
            text = f"{r['case']}: {forwards:.0f} forwards/s (goal {FORWARDS_GOAL})"
            text += "" if share is None else f", {share:.0%} of what the copy bandwidth allows"
            found.append(Goal(text, forwards >= FORWARDS_GOAL))
    judged = [r["case"] for r in records if r["case"].endswith(" 32 prompts") and r["case"].split()[0] in GOALS]
    for case in dict.fromkeys(judged):
        faster = ratio(records, case, "one by one")
        wrong = [r["error"] for r in records if r["case"] == case and r["provider"] == "illada"]
        if faster is not None and wrong and wrong[0] is not None:
            goal = GOALS[case.split()[0]]
            text = f"{case}: {faster:.2f}x one by one (goal {goal:g}x), {wrong[0]:.2%} of the tokens differ"
            found.append(Goal(text, faster >= goal and wrong[0] == 0))
    return found
