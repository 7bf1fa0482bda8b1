"""The published decoding rules in plain torch, one sequence at a time with all its logits: what generation must equal.

Written from the papers and the authors' scripts (sources in docs/generation.md), not from illada.generation. Only
masks of the block are candidates. Noise is the library's, of seed 0.
"""

import dataclasses

import numpy as np
import torch

from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel
from illada.ops.reference import uniform64

CONFIG = ModelConfig.preset(
    "tiny", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
    max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
# Without a prompt all hidden states are equal: which mask goes first is a tie that the published rules leave open.
WITH_TEXT = [[7, 8, 9], list(range(20, 40)), [11]]


def make_model(**changes):
    """Return a model with random weights, with an embedding spread enough for clear preferences."""
    model = MaskedDiffusionModel(dataclasses.replace(CONFIG, **changes), seed=5)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(2.5)  # no confidence rounds to 1: the published rule leaves ties undefined
        # Neither is ever predicted.
        model.embed_tokens.weight[[model.config.eos_token_id, model.config.mask_token_id]] *= 0.01
    return model


def logits_of(model, x):
    """Return the logits [L, V] in float32 of one sequence [L]."""
    with torch.no_grad():
        return (model(x, torch.tensor([0, len(x)], dtype=torch.int32)) @ model.head_weight.T).float()


def llada_quota(masks, steps):
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


def measured(logits, x0, measure):
    p = logits.softmax(-1)
    if measure == "margin":
        top = p.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    if measure == "entropy":
        return (p * p.clamp_min(1e-30).log()).sum(-1)
    return p.gather(-1, x0[:, None])[:, 0]


def gumbel(positions, step, vocab_size):
    """Return Gumbel noise, float64 [n, V], of seed 0."""
    uniforms = np.stack([uniform64(0, position, step, vocab_size) for position in positions.tolist()])
    return torch.from_numpy(-np.log(-np.log1p(-uniforms)))


def dream_distribution(logits, temperature, top_p, top_k):
    """Return what Dream samples from and takes the confidence of. Temperature, then top-k, then top-p, as in
    transformers; Dream takes top-p first, which makes a difference only where both are given."""
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_k > 0:
        last = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < last, lowest)
    for row in logits if top_p < 1 else []:
        order = row.argsort(descending=True, stable=True)
        sums = row[order].softmax(0).cumsum(0)
        row[order[1 + int((sums[:-1] <= top_p).sum()) :]] = lowest
    return logits


def choose(rule, confidence, entropy, quota, value):
    """Choose which of the candidates [n] to commit, by a rule of the literature."""
    order = confidence.argsort(descending=True, stable=True)
    if rule == "quota":
        return order[:quota]
    if rule == "threshold":  # Fast-dLLM: all that reach it, at least the surest
        count = max(1, int((confidence >= value).sum()))
        return order[:count]
    if rule == "factor":  # Fast-dLLM: the largest n with (n + 1)(1 - c_n) < f, for the n surest
        count = 0
        for n, c in enumerate(confidence[order].tolist(), 1):
            if (n + 1) * (1 - c) >= value:
                break
            count = n
        return order[: max(1, count)]
    assert rule == "entropy_bound", rule
    order = entropy.argsort(stable=True)  # EB-Sampler: sum of the entropies without the largest
    sorted_entropy = entropy[order]
    joint = sorted_entropy.cumsum(0) - sorted_entropy.cummax(0).values
    return order[: max(1, int((joint <= value).long().cumprod(0).sum()))]


def boosted(logits, x, begin, prompt_length, total, mask_id, ids, boost, power):
    """Return logits with iLLaDA's end-of-thinking boost, on all logits of the sequence."""
    generated = x[prompt_length:].tolist()
    text, needle = ",".join(map(str, ["", *generated, ""])), ",".join(map(str, ["", *ids, ""]))
    if needle in text:
        return logits
    masks = (x == mask_id).nonzero()[:, 0]
    position = int(masks[masks >= begin][0])
    best = 0
    for n in range(1, len(ids)):
        if n <= position - prompt_length and x[position - n : position].tolist() == list(ids[:n]):
            best = n
    logits = logits.clone()
    logits[position, ids[best]] += boost * min(max((position - prompt_length + 1) / total, 0.0), 1.0) ** power
    return logits


def fill(model, x, given, begin, end, steps, total, prompt_length, config, forwards):
    """Fill one block x[begin:end] in place, after `forwards` forward passes; return how many it took."""
    mask_id = model.config.mask_token_id
    quotas = llada_quota(int((x[begin:end] == mask_id).sum()), steps)
    for step in range(steps):
        candidates = (x[begin:end] == mask_id).nonzero()[:, 0] + begin
        if not len(candidates):
            return step
        logits = logits_of(model, x)
        if config.cfg_scale > 0:
            blind = x.clone()
            blind[given] = mask_id
            un = logits_of(model, blind)
            logits = un + (config.cfg_scale + 1) * (logits - un)
        if config.end_think_boost > 0:
            logits = boosted(
                logits, x, begin, prompt_length, total, mask_id, config.end_think, config.end_think_boost,
                config.end_think_power,
            )  # fmt: skip
        logits = logits[candidates]
        logits[:, list(config.forbid_tokens)] = -torch.inf
        noise = gumbel(candidates, forwards + step, logits.shape[1]) if config.temperature > 0 else 0.0
        if config.confidence_at_temperature or config.top_p < 1 or config.top_k > 0:  # Dream's
            logits = dream_distribution(logits, config.temperature, config.top_p, config.top_k)
            x0 = (logits + noise).argmax(-1)
        else:  # LLaDA's: confidence knows no temperature
            x0 = (logits + config.temperature * noise).argmax(-1)
        if config.delay_tokens:
            logits[:, list(config.delay_tokens)] = -torch.inf
        confidence = measured(logits, x0, config.measure)
        last = step == steps - 1
        if config.schedule == "dream":
            times = torch.linspace(1, config.eps, steps + 1)
            quota = len(candidates) if last else int(len(candidates) * (1 - times[step + 1] / times[step]))
            chosen = choose("quota", confidence, None, quota, None)
        elif config.rule == "quota":
            chosen = choose("quota", confidence, None, quotas[step], None)
        elif last:
            chosen = torch.arange(len(candidates))
        else:
            chosen = choose(
                config.rule, confidence, -measured(logits, x0, "entropy"), None, getattr(config, config.rule)
            )
        x[candidates[chosen]] = x0[chosen]
    return steps


def generate(model, prompt, config):
    """Return (new tokens, forward passes) of LLaDA's or Dream's `generate` (mode fixed) or iLLaDA's `var_generate`."""
    mask_id, size = model.config.mask_token_id, config.block_length
    x = torch.tensor(prompt, dtype=torch.int64)
    blocks = config.gen_length // size
    forwards = 0
    if config.mode == "fixed":
        x = torch.cat([x, torch.full((config.gen_length,), mask_id)])
        given = x != mask_id  # the prompt, for all blocks
    for block in range(blocks):
        begin = len(prompt) + block * size
        if config.mode == "var":
            given = torch.cat([torch.ones(begin, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)])
            x = torch.cat([x, torch.full((size,), mask_id)])
        steps = config.steps if config.mode == "var" else config.steps // blocks
        forwards += fill(model, x, given, begin, begin + size, steps, config.gen_length, len(prompt), config, forwards)
    return x[len(prompt) :].tolist(), forwards
