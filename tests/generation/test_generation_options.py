"""Infilling, drawing and taking back, batches of unequal requests, callbacks, and the traps of other samplers."""

import dataclasses
import math
from collections import Counter

import numpy as np
import oracle
import pytest
import torch
from oracle import CONFIG, WITH_TEXT

from illada.generation import GenerationConfig, generate, generate_iter
from illada.generation.request import Request
from illada.generation.rules import dream_quota, dream_transfer, end_think_bias, order_noise, taken_back
from illada.text.tokenizer import Tokenizer
from illada.text.training import train_tokenizer

MASK = CONFIG.mask_token_id
BASE = GenerationConfig(gen_length=16, block_length=8, steps=8, stop_tokens=())


@pytest.fixture(scope="module")
def model():
    return oracle.make_model()


# ------------------------------------------------------------------------------------------------------------ infilling


def test_infill_is_fixed_where_the_masks_are_at_the_end(model):
    """The canvas of mode fixed, given as a prompt."""
    fixed = dataclasses.replace(BASE, mode="fixed", steps=16)
    infill = dataclasses.replace(BASE, mode="infill", steps=8)
    canvases = [[*prompt, *[MASK] * 16] for prompt in WITH_TEXT]
    want = [prompt + r.tokens for prompt, r in zip(WITH_TEXT, generate(model, WITH_TEXT, fixed), strict=True)]
    results = generate(model, canvases, infill)
    assert [r.tokens for r in results] == want and {r.finish_reason for r in results} == {"filled"}


def test_infill_keeps_what_is_given_and_fills_the_rest(model):
    prompt = [MASK, 7, 8, MASK, MASK, 9, MASK, 30, MASK]
    config = dataclasses.replace(BASE, mode="infill", block_length=2, steps=2, cfg_scale=0.5)
    deltas = list(generate_iter(model, [prompt], config))
    blocks, result = [delta.tokens for delta in deltas], deltas[-1].result
    assert MASK not in result.tokens and len(result.tokens) == len(prompt)
    assert all(a == b for a, b in zip(prompt, result.tokens, strict=True) if a != MASK)
    holes = [t for t, p in zip(result.tokens, prompt, strict=True) if p == MASK]
    assert blocks == [holes[0:2], holes[2:4], holes[4:]] and result.forwards == 5  # the last block has one mask
    assert prompt == [MASK, 7, 8, MASK, MASK, 9, MASK, 30, MASK]


def test_infill_stops_for_nothing(model):
    """An end token inside a text to fill is just a token."""
    filled = generate(model, [[7, MASK, MASK, 9]], dataclasses.replace(BASE, mode="infill"))[0].tokens
    again = dataclasses.replace(BASE, mode="infill", stop_tokens=tuple(filled), block_length=1)
    assert generate(model, [[7, MASK, MASK, 9]], again)[0].finish_reason == "filled"


# ---------------------------------------------------------------------------------------- drawing positions, taking back


def test_order_noise_draws_without_replacement():
    """The first of the largest is drawn by softmax(x); pairs by softmax, then softmax of the rest."""
    x = np.array([1.0, 0.0, -0.5])
    p = np.exp(x) / np.exp(x).sum()
    pairs = Counter()
    for seed in range(20000):
        first, second, _ = np.argsort(-(x + order_noise(seed, np.arange(3), 4)))
        pairs[int(first), int(second)] += 1
    for (a, b), count in pairs.items():
        want = p[a] * p[b] / (1 - p[a])
        assert abs(count / 20000 - want) < 5 * math.sqrt(want / 20000), (a, b)


def test_alg_temp_between_greedy_and_random(model):
    """Near 0 it is the quota rule, at a high temperature any order comes up; a seed repeats it."""
    greedy = [r.tokens for r in generate(model, WITH_TEXT, BASE)]
    cold = dataclasses.replace(BASE, alg_temp=1e-6)
    assert [r.tokens for r in generate(model, WITH_TEXT, cold)] == greedy
    hot = dataclasses.replace(BASE, alg_temp=100.0, schedule="dream")
    runs = [[r.tokens for r in generate(model, WITH_TEXT, hot, seed=s)] for s in (1, 2, 1)]
    assert runs[0] == runs[2] != runs[1]


def test_dream_counts_in_float32():
    """As published; float64 commits another number of 2000 masks in the first of 2, 3 or 9 steps."""
    assert dream_quota(2000, 0, 2) == 998 != int(2000 * (1 - np.linspace(1, 1e-3, 3)[1]))
    for steps in (*range(1, 41), 64, 128, 512):
        times = torch.linspace(1, 1e-3, steps + 1)
        for masks in (1, 7, 32, 256, 2000):
            got = [dream_quota(masks, step, steps) for step in range(steps)]
            assert got[:-1] == [int(masks * (1 - s / t)) for t, s in zip(times[:-2], times[1:-1], strict=True)]
            assert got[-1] == masks


@pytest.mark.parametrize("alg_temp", [1.0, 0.5, 0.01, 1e-38])
@pytest.mark.parametrize("measure", ["probability", "entropy"])
def test_what_comes_last_is_committed_at_any_alg_temp(model, alg_temp, measure):
    """Delayed tokens have the lowest confidence there is, which a division must not make one that is never kept."""
    config = dataclasses.replace(BASE, alg_temp=alg_temp, measure=measure, delay_tokens=tuple(range(CONFIG.vocab_size)))
    assert all(MASK not in result.tokens for result in generate(model, WITH_TEXT, config))


def test_origin_reveals_each_mask_with_its_probability(model):
    """Over many seeds, the first step's commits are Bernoulli(1 - s/t), one by one."""
    config = GenerationConfig(mode="fixed", gen_length=32, block_length=32, steps=4, rule="origin", stop_tokens=())
    counts, seen = np.zeros(32), {}
    for seed in range(60):
        first: dict[int, int] = {}

        def commit(index, positions, tokens, first=first):
            if not first:
                first.update(zip(positions, tokens, strict=True))

        result = generate(model, [[7]], config, seed=seed, on_commit=commit)[0]
        counts[np.array(sorted(first)) - 1] += 1
        seen[tuple(sorted(first))] = 1
        assert MASK not in result.tokens and result.forwards <= 4
    p = dream_transfer(0, 4)
    assert abs(counts.sum() / (60 * 32) - p) < 4 * math.sqrt(p * (1 - p) / (60 * 32)) and len(seen) > 50
    assert [round(dream_transfer(i, 4), 3) for i in range(4)] == [0.25, 0.333, 0.499, 1.0]


def test_taken_back_is_a_coin_for_each_position():
    positions = np.arange(1000)
    taken = taken_back(7, positions, 3, 0.3)
    assert 230 < len(taken) < 370
    assert np.array_equal(taken, taken_back(7, positions, 3, 0.3))
    assert not np.array_equal(taken, taken_back(7, positions, 4, 0.3))
    assert len(taken_back(7, positions, 3, 0.0)) == 0


def test_take_back_keeps_to_the_schedule(model):
    """ReMDM: tokens come and go, but after each step as many masks are left as the quota alone would leave."""
    config = dataclasses.replace(BASE, gen_length=32, block_length=32, steps=8, take_back=0.2)
    canvas = np.full(33, MASK)
    rewritten = 0

    def commit(index, positions, tokens):
        nonlocal rewritten
        rewritten += len(set(positions) & seen)
        seen.update(positions)
        canvas[positions] = tokens

    for seed in range(4):
        seen: set[int] = set()
        result = generate(model, [[7]], config, seed=seed, on_commit=commit)[0]
        assert result.forwards == 8 and MASK not in result.tokens
        assert canvas[1:].tolist() == result.tokens  # what was told is what is there at the end
    assert rewritten > 4
    alone = generate(model, [WITH_TEXT[1]], config, seed=3)[0].tokens
    assert generate(model, WITH_TEXT, config, seed=3)[1].tokens == alone


def test_take_back_leaves_the_masks_of_the_schedule():
    """Each step leaves what the quota alone would, or what it took back where that is more."""
    config = dataclasses.replace(BASE, gen_length=32, block_length=32, steps=8, take_back=0.5)
    taken_in_all = 0
    for seed in range(20):
        request = Request(0, np.array([7]), config, seed, CONFIG)
        positions = request.blocks[0]
        for step in range(8):
            quota, masks = request.limit(), request.masked()
            taken = len(request.taken)
            tokens = request.canvas[positions].copy()
            tokens[np.isin(positions, masks[:quota])] = 9
            committed = request.advance(positions, tokens)
            assert committed.tolist() == masks[:quota].tolist()
            assert len(request.masked()) == max(32 - 4 * (step + 1), taken)
            taken_in_all += taken
        assert request.block_done and not len(request.masked())
    assert taken_in_all > 20 * 8


# -------------------------------------------------------------------------------------------------- batches and callbacks


MIXED = [
    GenerationConfig(gen_length=24, block_length=8, steps=3, stop_tokens=()),
    GenerationConfig(mode="fixed", gen_length=8, block_length=4, steps=8, temperature=0.9, stop_tokens=()),
    GenerationConfig(gen_length=4, block_length=1, steps=1, rule="threshold", cfg_scale=1.0, stop_tokens=()),
    GenerationConfig(gen_length=16, block_length=16, steps=16, rule="entropy_bound", entropy_bound=3.0, stop_tokens=()),
    GenerationConfig(gen_length=16, block_length=8, steps=5, alg_temp=0.3, measure="margin", stop_tokens=()),
    GenerationConfig(mode="infill", block_length=3, steps=2, temperature=0.2, stop_tokens=()),
    GenerationConfig(gen_length=8, block_length=8, steps=8, rule="factor", delay_tokens=(5, 9), stop_tokens=()),
    GenerationConfig(gen_length=8, block_length=8, steps=3, temperature=0.5, top_p=0.9, stop_tokens=()),
    GenerationConfig(gen_length=8, block_length=4, steps=3, top_k=3, cfg_scale=1.0, delay_tokens=(7,), stop_tokens=()),
]  # fmt: skip
MIXED_PROMPTS = [[7, 8, 9], [11], [20, 21, 22], [30] * 9, [8], [7, MASK, 9, MASK], [40, 2], [9], [6, 3]]


@pytest.mark.parametrize("few_tokens", [0, 256])
@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_unequal_requests_in_one_batch(model, batch_size, few_tokens, monkeypatch):
    """Lengths, blocks, rules, temperatures, guidance and seeds of their own: as each alone, in any order."""
    monkeypatch.setattr("illada.generation.step._FEW_TOKENS", few_tokens)
    seeds = [5, 2**62, -3, 0, 1, 7, 7, 8, 9]
    alone = [generate(model, [p], c, seed=s)[0] for p, c, s in zip(MIXED_PROMPTS, MIXED, seeds, strict=True)]
    assert generate(model, MIXED_PROMPTS, MIXED, seed=seeds, batch_size=batch_size) == alone
    back = generate(model, MIXED_PROMPTS[::-1], MIXED[::-1], seed=seeds[::-1], batch_size=batch_size)
    assert back[::-1] == alone


@pytest.mark.parametrize(
    "cache,few_tokens,want", [("none", 0, [40] + [2] * 7), ("none", 256, [40] * 8), ("prefix", 0, [40] + [16] * 7)]
)
def test_first_layer_is_kept_between_steps(model, cache, few_tokens, want, monkeypatch):
    """Two sequences of 12 and 28 tokens change by one token each in a step; with a cache there are the blocks alone."""
    monkeypatch.setattr("illada.generation.step._FEW_TOKENS", few_tokens)
    config = GenerationConfig(gen_length=8, block_length=8, steps=8, cache=cache, stop_tokens=())
    projected = []
    hook = model.layers[0].self_attn.qkv_proj.register_forward_hook(
        lambda module, inputs, out: projected.append(len(out))
    )
    generate(model, [[7, 8, 9, 10], [30] * 20], config)
    hook.remove()
    assert projected == want


def test_callbacks_tell_it_all(model):
    steps = []
    results = generate(model, WITH_TEXT, BASE, on_commit=lambda *told: steps.append(told))
    for i, (prompt, result) in enumerate(zip(WITH_TEXT, results, strict=True)):
        canvas = dict(
            pair for index, positions, tokens in steps if index == i for pair in zip(positions, tokens, strict=True)
        )
        assert [canvas[len(prompt) + n] for n in range(16)] == result.tokens
        assert [len(positions) for index, positions, _ in steps if index == i] == [1] * 16


def test_progress_only_on_a_terminal(model, capsys, monkeypatch):
    generate(model, WITH_TEXT, BASE, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    generate(model, WITH_TEXT, BASE, progress=True)
    assert "48/48" in (shown := capsys.readouterr().err) and "tokens/forward" in shown
    # Tokens that an early end spares, or that were taken back, are not counted as generated.
    stop = generate(model, WITH_TEXT[:1], BASE)[0].tokens[2]
    generate(model, WITH_TEXT[:1], dataclasses.replace(BASE, stop_tokens=(stop,)), progress=True)
    assert "8/8" in (shown := capsys.readouterr().err) and "1.0 tokens/forward" in shown and "16/16" not in shown
    config = dataclasses.replace(BASE, block_length=16, take_back=0.5)
    assert generate(model, WITH_TEXT[:1], config, progress=True)[0].forwards == 8
    assert "16/16" in (shown := capsys.readouterr().err) and "2.0 tokens/forward" in shown


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(["some text to learn from, and more text"] * 3, 300))


def test_texts_as_prompts(model, tokenizer):
    ids = tokenizer.encode("some text")
    assert generate(model, ["some text", ids], BASE, tokenizer=tokenizer)[0].text == tokenizer.decode(
        generate(model, [ids], BASE)[0].tokens
    )
    assert (
        generate(model, ["some text"], BASE, tokenizer=tokenizer.backend)[0].tokens
        == generate(model, [ids], BASE)[0].tokens
    )
    with pytest.raises(ValueError, match=r"prompts\[0\] is a text, which needs a tokenizer"):
        generate(model, ["some text"], BASE)


def test_stop_string_that_spells_a_special_token(model, tokenizer):
    tokens = generate(model, WITH_TEXT[:1], BASE)[0].tokens
    special = tokenizer.decode([3], skip_special_tokens=False)
    assert special and tokenizer.decode([3]) == ""

    class Renamed(Tokenizer):  # the sixth new token is spelt as that special token
        def decode(self, ids, *, skip_special_tokens=True):
            return super().decode([3 if i == tokens[5] else i for i in ids], skip_special_tokens=skip_special_tokens)

    config = dataclasses.replace(BASE, stop_strings=(special,))
    result = generate(model, WITH_TEXT[:1], config, tokenizer=Renamed(tokenizer.backend))[0]
    first = tokens.index(tokens[5])
    assert result.finish_reason == "stop_string" and result.text == tokenizer.decode(tokens[:first])


# -------------------------------------------------------------------------------------------------------------- traps


def test_special_ids_are_the_checkpoint_s(model):
    """LLaDA's constants mean nothing to another model; its own eos ends a sequence."""
    plain = generate(model, WITH_TEXT[:1], BASE)[0].tokens
    eos = dataclasses.replace(model.config, eos_token_id=plain[3])
    before, model.config = model.config, eos
    try:
        result = generate(model, WITH_TEXT[:1], dataclasses.replace(BASE, stop_tokens=None))[0]
    finally:
        model.config = before
    assert result.finish_reason == "stop_token" and result.tokens == plain[: plain.index(plain[3])]
    with pytest.raises(ValueError, match=r"forbid_tokens holds token id 126081, outside of \[0, 300\)"):
        generate(model, [[1]], dataclasses.replace(BASE, forbid_tokens=(126081,)))


@pytest.mark.parametrize("mode", ["var", "fixed"])
def test_nothing_is_committed_from_nan(model, mode):
    """Logits without a value leave masks, and the loop ends."""
    weight = model.embed_tokens.weight
    kept = weight[8].clone()
    with torch.no_grad():
        weight[8] = math.nan
    try:
        config = dataclasses.replace(BASE, mode=mode, steps=8 if mode == "var" else 16)
        sick = generate(model, [[7, 8]], config)[0]
    finally:
        with torch.no_grad():
            weight[8] = kept
    assert sick.tokens == [MASK] * 16 and sick.finish_reason == "length" and sick.forwards == 16


@pytest.mark.parametrize("mode", ["var", "fixed"])
def test_mask_in_a_prompt_is_context(model, mode):
    """It is neither filled nor counted: the block gets its whole quota (the authors' first script spent it there)."""
    config = dataclasses.replace(BASE, mode=mode, steps=8 if mode == "var" else 16)
    for prompt in ([7, MASK, 9], [MASK, 11], [MASK, MASK, 7]):  # never masks alone: all rows would tie
        result = generate(model, [prompt], config)[0]
        assert MASK not in result.tokens and result.forwards == 16
        assert result.tokens == oracle.generate(model, prompt, config)[0]


def test_a_predicted_mask_stays_a_mask_unless_forbidden(model):
    weight = model.embed_tokens.weight
    kept = weight[MASK].clone()
    with torch.no_grad():
        weight[MASK] = 30 * weight[40]
    try:
        free = generate(model, WITH_TEXT, BASE)
        assert [r.tokens for r in free] == [oracle.generate(model, p, BASE)[0] for p in WITH_TEXT]
        assert any(MASK in r.tokens for r in free)
        forbidden = generate(model, WITH_TEXT, dataclasses.replace(BASE, forbid_tokens=(MASK,)))
        assert all(MASK not in r.tokens for r in forbidden)
    finally:
        with torch.no_grad():
            weight[MASK] = kept


def test_end_think_bias():
    M = MASK
    assert end_think_bias([M, M, M, M], 0, 8, (50, 51), 16.0, 2.0) == (50, 16.0 * (1 / 8) ** 2)
    assert end_think_bias([9, 50, M, M], 2, 4, (50, 51), 16.0, 1.0) == (51, 12.0)
    assert end_think_bias([9, 50, 51, M], 3, 4, (50, 51), 16.0, 1.0) is None
    assert end_think_bias([50, 50, M], 2, 2, (50, 50, 51), 1.0, 1.0) == (51, 1.0)
    assert end_think_bias([M], 0, 4, (50,), 8.0, 1.0) == (50, 2.0)


def test_errors(model):
    for options, match in (
        ({"schedule": "x"}, "schedule must be one of even, dream"),
        ({"cache": "dual"}, "cache must be one of none, prefix, block, got 'dual'"),
        ({"gen_length": 12, "block_length": 5}, "block_length may be 1, 2, 3, 4, 6, 12"),
        ({"mode": "fixed", "steps": 9}, "a multiple of the 4 blocks .*, such as 8"),
        ({"mode": "fixed", "steps": 2}, "such as 4"),
        ({"cfg_scale": -1.0}, "cfg_scale must be finite and >= 0"),
        ({"factor": math.inf}, "factor must be finite"),
        ({"take_back": 1.5}, "take_back must be a probability"),
        (
            {"rule": "factor", "take_back": 0.5},
            r"take_back \(0.5\) is not used: it belongs to rule quota .* got rule 'factor'",
        ),
        (
            {"schedule": "dream", "take_back": 0.5},
            "take_back .* belongs to rule quota with schedule even, got .* 'dream'",
        ),
        ({"rule": "origin", "schedule": "dream"}, "schedule .* belongs to rule quota"),
        ({"rule": "threshold", "alg_temp": 0.5}, "alg_temp .* belongs to rule quota"),
        (
            {"rule": "origin", "measure": "entropy"},
            "measure .* belongs to rules quota, threshold and factor, got rule 'origin'",
        ),
        ({"rule": "entropy_bound", "measure": "margin"}, "measure .* belongs to rules quota"),
        ({"threshold": 0.5}, "threshold .* belongs to rule threshold, got rule 'quota'"),
        ({"rule": "threshold", "factor": 2.0}, "factor .* belongs to rule factor"),
        ({"entropy_bound": 2.0}, "entropy_bound .* belongs to rule entropy_bound"),
        ({"eps": 0.1}, "eps .* belongs to schedule dream and rule origin"),
        ({"rule": "origin", "eps": 1.0}, r"eps must be in \[0, 1\)"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": math.nan}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_k": 10**20}, f"top_k must be below 2.63, got {10**20}"),
        (
            {"end_think_power": 3.0},
            "end_think_power .3.0. is not used: it belongs to end_think_boost .* got .*boost 0.0",
        ),
        ({"end_think_boost": 1.0}, "needs the ids of end_think"),
        ({"end_think_boost": math.nan, "end_think": (5,)}, "must be finite and >= 0"),
        (
            {"threshold": math.nan, "measure": "entropy"},
            r"threshold must be in \[0, 1\] \(finite, with measure entropy",
        ),
        ({"stop_strings": ("x", "")}, "stop_strings holds an empty text"),
        ({"mode": "infill", "end_think": (5,), "end_think_boost": 1.0}, "goes with modes var and fixed"),
    ):
        with pytest.raises(ValueError, match=match):
            GenerationConfig(**options)
    assert GenerationConfig(mode="infill", gen_length=10, block_length=4).steps_per_block == 32
    for prompts, config, keywords, match in (
        ([[1]], dataclasses.replace(BASE, mode="infill"), {}, r"prompts\[0\] holds no mask \(id 5\)"),
        ([[1]], [BASE, BASE], {}, "one for each of the 1 prompts, got 2"),
        ([[1]], BASE, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ([[1]], BASE, {"seed": 2**63}, "seed must fit 64 bits"),
        ([[1] * 70], dataclasses.replace(BASE, mode="infill"), {}, "holds no mask|6 over"),
        ([[MASK] * 70], dataclasses.replace(BASE, mode="infill"), {}, "with 0 more it is 6 over"),
        ([[1]], dataclasses.replace(BASE, end_think=(400,)), {}, "end_think holds token id 400"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, prompts, config, **keywords)


def test_wrong_types(model, tokenizer):
    """Named where they are given. A text is a sequence of texts too: as prompts or stop strings it is a mistake."""
    for options, match in (
        ({"stop_strings": "end"}, "stop_strings must be a tuple of texts, got 'end'"),
        ({"stop_tokens": 7}, "stop_tokens must be a tuple of token ids, got 7"),
        ({"forbid_tokens": ("a",)}, "forbid_tokens must be a tuple of token ids"),
        ({"gen_length": 16.0}, "gen_length must be an integer, got 16.0"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"top_k": 2.0}, "top_k must be an integer, got 2.0"),
        ({"confidence_at_temperature": 1}, "confidence_at_temperature must be True or False, got 1"),
    ):
        with pytest.raises(TypeError, match=match):
            GenerationConfig(**options)
    for prompts, keywords, match in (
        ("some text", {}, "prompts must be a list, got one text, 'some text'"),
        ([7, 8], {}, r"prompts\[0\] must be a text or a list of token ids, got 7"),
        ([[7], [8.5]], {}, r"prompts\[1\] must be a text or a list of token ids, got \[8.5\]"),
        ([[7]], {"config": {"steps": 4}}, "config must be a GenerationConfig"),
        ([[7]], {"config": [None]}, "config must be a GenerationConfig"),
        ([[7]], {"seed": [1.5]}, "seed must be an integer, or one for each prompt, got 1.5"),
    ):
        with pytest.raises(TypeError, match=match):
            generate(model, prompts, tokenizer=tokenizer, **keywords)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 1.5"):
        generate(model, [[7]], BASE, batch_size=1.5)
    want = generate(model, [[7, 8]], dataclasses.replace(BASE, temperature=1.0), seed=3)
    numbers = dataclasses.replace(BASE, steps=np.int64(8), temperature=np.float32(1.0))
    assert generate(model, torch.tensor([[7, 8]]), numbers, seed=np.int64(3)) == want
