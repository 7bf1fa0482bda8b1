"""Caches of generation against a plain-torch forward with frozen keys; graphs of the step; what agreement reports."""

import dataclasses
import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import CONFIG, WITH_TEXT

from illada.evaluation.agreement import cache_agreement
from illada.generation import GenerationConfig, generate, graphs
from illada.generation.cache import KeyValueCache
from illada.generation.request import Request
from illada.generation.step import lay_out

MASK = CONFIG.mask_token_id
PROMPTS = [*WITH_TEXT, [21, 22]]


@pytest.fixture(scope="module", params=[False, True], ids=["illada", "dream"])
def model(request):
    return oracle.make_model(logits_shift=request.param, qkv_bias=request.param)


def plain_forward(model, x, frozen, start):
    """Return hidden states of x[start:] when the keys and values of x[:start] are `frozen`; and all keys and values."""
    config, kept = model.config, []
    h = model.embed_tokens.weight[x[start:]]
    angle = torch.arange(start, len(x))[:, None] / config.rope_theta ** (
        torch.arange(0, config.head_size, 2) / config.head_size
    )
    cos, sin = angle.cos().repeat(1, 2)[:, None], angle.sin().repeat(1, 2)[:, None]

    def rope(t):
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    for i, layer in enumerate(model.layers):
        attention = layer.self_attn
        n = F.rms_norm(h, (config.hidden_size,), layer.input_layernorm.weight, config.rms_norm_eps)
        q, k, v = (
            y.unflatten(-1, (-1, config.head_size)) for y in attention.qkv_proj(n).split(config.qkv_sizes, dim=-1)
        )
        q, k = rope(q), rope(k)
        if frozen is not None:
            k, v = (torch.cat([old[:start], new]) for old, new in zip(frozen[i], (k, v), strict=True))
        kept.append((k, v))
        group = config.num_attention_heads // config.num_key_value_heads
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) / config.head_size**0.5
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v.repeat_interleave(group, 1))
        h = h + attention.o_proj(out.flatten(1))
        n = F.rms_norm(h, (config.hidden_size,), layer.post_attention_layernorm.weight, config.rms_norm_eps)
        h = h + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(n)) * layer.mlp.up_proj(n))
    return F.rms_norm(h, (config.hidden_size,), model.norm.weight, config.rms_norm_eps), kept


@torch.no_grad()
def plain_generate(model, prompt, config):
    """Generate blocks of quota steps over frozen prefixes: "prefix" freezes a block's prefix at its first step, "block"
    when the block after it begins."""
    shift, size = int(model.config.logits_shift), config.block_length
    x, kept = torch.tensor(prompt), None
    if config.mode == "fixed":
        x = torch.cat([x, torch.full((config.gen_length,), MASK)])
    for block in range(config.num_blocks):
        begin = len(prompt) + block * size
        if config.mode == "var":
            x = torch.cat([x, torch.full((size,), MASK)])
        for step in range(config.steps_per_block):
            start = begin - shift
            if step == 0:
                start = 0 if config.cache == "prefix" or block == 0 else begin - size - shift
            hidden, kept = plain_forward(model, x, kept if start > 0 else None, max(start, 0))
            start = max(start, 0)
            masks = (x[begin : begin + size] == MASK).nonzero()[:, 0] + begin
            if not len(masks):
                break
            rows = masks - shift - start
            logits = hidden[rows] @ model.head_weight.T
            confidence, token = logits.softmax(-1).max(-1)
            count = size // config.steps_per_block + (step < size % config.steps_per_block)
            chosen = confidence.argsort(descending=True, stable=True)[:count]
            x[masks[chosen]] = token[chosen]
    return x[len(prompt) :].tolist()


@pytest.mark.parametrize("mode,length,block,steps", [
    ("var", 24, 8, 4), ("var", 24, 4, 3), ("fixed", 24, 8, 12), ("fixed", 16, 16, 5),
])  # fmt: skip
@pytest.mark.parametrize("cache", ["prefix", "block"])
def test_against_frozen_keys(model, cache, mode, length, block, steps):
    config = GenerationConfig(
        mode=mode, gen_length=length, block_length=block, steps=steps, cache=cache, stop_tokens=()
    )
    got = [r.tokens for r in generate(model, WITH_TEXT, config)]
    assert got == [plain_generate(model, prompt, config) for prompt in WITH_TEXT]


def test_nothing_changes_where_nothing_is_old(model):
    """One step a block: "prefix" computes all of it each time."""
    config = GenerationConfig(gen_length=16, block_length=4, steps=1, stop_tokens=())
    exact = [r.tokens for r in generate(model, PROMPTS, config)]
    assert exact == [r.tokens for r in generate(model, PROMPTS, dataclasses.replace(config, cache="prefix"))]


@pytest.mark.parametrize("cache", ["prefix", "block"])
def test_slots_are_used_again(model, cache):
    """Waiting sequences, different lengths and guidance: as each alone."""
    configs = [
        GenerationConfig(gen_length=n, block_length=4, steps=3, cache=cache, stop_tokens=(), cfg_scale=w)
        for n, w in ((8, 0.0), (24, 1.0), (4, 0.0), (12, 0.5))
    ]
    alone = [generate(model, [p], c)[0].tokens for p, c in zip(PROMPTS, configs, strict=True)]
    for batch_size in (1, 2, 3, None):
        assert [r.tokens for r in generate(model, PROMPTS, configs, batch_size=batch_size)] == alone


def test_size_is_that_of_the_key_value_heads():
    cache = KeyValueCache(CONFIG, 3, 40, dtype=torch.bfloat16)
    assert cache.k.shape == (2, 120, CONFIG.num_key_value_heads, CONFIG.head_size)
    assert cache.num_bytes == 2 * 2 * 120 * CONFIG.num_key_value_heads * CONFIG.head_size * 2
    view = cache.view([0, 2], [5, 0], [9, 3], blanks=1)
    assert view.rows.tolist() == [5, 6, 7, 8, 80, 81, 82, 120, 121, 122, 123]
    assert view.cu_seqlens_k.tolist() == [0, 80, 120, 120] and view.seqused_k.tolist() == [9, 3, 0]


def test_forward_with_a_cache_needs_positions(model):
    cache = KeyValueCache(model.config, 1, 8)
    with pytest.raises(ValueError, match="position_ids must be given with a cache"):
        model(torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32), cache=cache.view([0], [0], [2]))


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.7, "rule": "threshold", "threshold": 0.3}, {"alg_temp": 0.5}, {"delay_tokens": (7, 8)},
    {"end_think": (50, 51), "end_think_boost": 20.0, "forbid_tokens": (9,)},
], ids=lambda o: "-".join(o) or "quota")  # fmt: skip
@pytest.mark.parametrize("cache", ["prefix", "block"])
def test_steps_of_a_graph(model, cache, options, monkeypatch):
    """The fixed shapes, blank sequences and copies of a graph, with a recorder that just calls again."""
    config = GenerationConfig(gen_length=16, block_length=8, steps=4, cache=cache, stop_tokens=(), **options)
    want = [r.tokens for r in generate(model, [*PROMPTS, [3]], config, seed=[1, 2, 3, 4, 5])]
    captured, replayed = [], []

    def capture(function):
        captured.append(function)
        out = function().clone()

        def replay():
            replayed.append(1)
            out.copy_(function())

        return replay, out

    monkeypatch.setattr(graphs, "CudaCapture", lambda: capture)
    monkeypatch.setattr(graphs, "available", lambda model, cache: cache is not None)
    with torch.inference_mode():
        got = [r.tokens for r in generate(model, [*PROMPTS, [3]], config, seed=[1, 2, 3, 4, 5])]
    assert got == want
    # five sequences are a bucket of eight; with a threshold some leave a block early and others are captured
    assert captured and len(replayed) >= 5 and (len(captured) == 1 or config.rule == "threshold")
    assert generate(model, PROMPTS, config, cuda_graphs=False) == generate(model, PROMPTS, config)


def test_which_steps_are_a_graph(model):
    assert [graphs.bucket(n) for n in (1, 2, 3, 5, 7, 8, 9, 17, 33)] == [1, 2, 4, 8, 8, 8, 16, 24, 40]
    assert not graphs.available(model, KeyValueCache(model.config, 1, 8))  # not on a CPU

    def at(step, **options):
        config = GenerationConfig(gen_length=16, steps=16, cache="prefix", **{"block_length": 8, **options})
        request = Request(0, np.array([7, 8]), config, 0, model.config)
        request.step = step
        return request

    assert graphs.suitable([at(1), at(3)])
    for other in (at(0), at(1, cfg_scale=1.0), at(1, mode="fixed"), at(1, block_length=4), at(1, rule="factor")):
        assert not graphs.suitable([at(1), other])


def test_blanks_see_nothing(model):
    config = GenerationConfig(gen_length=8, block_length=8, steps=4, cache="prefix")
    prompt = torch.tensor([7, 8, 9]).numpy()
    request = Request(0, prompt, config, 0, model.config, slots=(0,))
    request.step = 1
    cache = KeyValueCache(model.config, 1, 11, spare=9)
    layout = lay_out(model, [request], cache, whole_blocks=True, sequences=4)
    inputs, shift = layout.upload(model.device), int(model.config.logits_shift)
    assert inputs.cu_seqlens.tolist() == [i * (8 + shift) for i in range(5)]
    assert inputs.cache.seqused_k.tolist() == [11, 0, 0, 0]
    assert inputs.groups[0].limits.tolist() == [2, 0, 0, 0]
    assert MASK not in inputs.tokens[8 + shift :].tolist()


def test_arrays_share_a_buffer(model):
    config = GenerationConfig(gen_length=8, block_length=8, steps=4, cache="prefix", forbid_tokens=(3, 4, 5))
    request = Request(0, np.array([7, 8, 9]), config, 0, model.config, slots=(0,))
    layout = lay_out(model, [request], KeyValueCache(model.config, 1, 11))
    buffer = layout.pack(model.device)
    inputs, group = layout.unpack(buffer), layout.unpack(buffer).groups[0]
    tensors = [inputs.tokens, inputs.cache.rows, inputs.cache.seqused_k, group.row_ids, group.temperatures, *group.bias]
    assert {t.untyped_storage().data_ptr() for t in tensors} == {buffer.data_ptr()}
    assert all(t.data_ptr() % 16 == buffer.data_ptr() % 16 for t in tensors)
    assert inputs.tokens.tolist() == [7, 8, 9, *[MASK] * 8] and inputs.tokens.dtype == torch.int64
    assert group.bias[0].tolist() == [[3, 4, 5]] * 8 and group.bias[1].dtype == torch.float32
    assert inputs.cache.k is layout.arrays.cache.k and group.order is None
    inputs.tokens[3] = 1
    assert layout.unpack(buffer).tokens[3] == 1  # the step writes where the next one is laid out


def test_agreement_of_texts_with_masks(model):
    """They are compared like others, and have no score."""
    weight = model.embed_tokens.weight
    kept = weight[MASK].clone()
    config = GenerationConfig(gen_length=16, block_length=8, steps=4)
    with torch.no_grad():
        weight[MASK] = 30 * weight[40]
    try:
        reports = cache_agreement(model, WITH_TEXT, config, caches=["prefix"])
    finally:
        with torch.no_grad():
            weight[MASK] = kept
    assert [r.cache for r in reports] == ["none", "prefix"] and reports[0].token_match == 1.0
    assert all(math.isnan(r.score) for r in reports) and 0 <= reports[1].token_match <= 1
    with pytest.raises(ValueError, match="prompts is empty"):
        cache_agreement(model, [], config)


def test_configs_share_a_cache(model):
    with pytest.raises(ValueError, match="share one kind of cache, got none, prefix"):
        generate(model, [[1], [2]], [GenerationConfig(), GenerationConfig(cache="prefix")])
    with pytest.raises(ValueError, match="mode infill has no caches"):
        GenerationConfig(mode="infill", cache="block")
