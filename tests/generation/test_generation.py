"""Generation against the published loops restated in plain torch, batch invariance, stopping, errors."""

import dataclasses

import oracle
import pytest
import torch
from oracle import CONFIG, WITH_TEXT

from illada.config import ModelConfig
from illada.generation import GenerationConfig, generate, quota_schedule
from illada.model import MaskedDiffusionModel
from illada.text.training import train_tokenizer

MASK = CONFIG.mask_token_id
PROMPTS = [*WITH_TEXT[:1], [], *WITH_TEXT[1:]]


@pytest.fixture(scope="module")
def model():
    return oracle.make_model()


@pytest.fixture(autouse=True)
def kept_first_layer(monkeypatch):
    """Let short packs keep the first layer's part from step to step, as long ones do."""
    monkeypatch.setattr("illada.generation.step._FEW_TOKENS", 0)


def equals_the_oracle(model, config, prompts=WITH_TEXT):
    config = dataclasses.replace(config, stop_tokens=())
    for prompt, result in zip(prompts, generate(model, prompts, config), strict=True):
        tokens, forwards = oracle.generate(model, prompt, config)
        assert result.tokens == tokens
        assert result.finish_reason == "length" and result.forwards == forwards


@pytest.mark.parametrize("mode,length,block,steps", [
    ("var", 16, 8, 8), ("var", 16, 8, 3), ("var", 12, 4, 7), ("var", 8, 8, 1), ("var", 16, 1, 1), ("var", 24, 8, 5),
    ("fixed", 16, 8, 16), ("fixed", 16, 4, 8), ("fixed", 16, 16, 5), ("fixed", 16, 1, 16), ("fixed", 24, 8, 9),
])  # fmt: skip
@pytest.mark.parametrize("rule", [
    {}, {"measure": "margin"}, {"measure": "entropy"}, {"rule": "threshold", "threshold": 0.3},
    {"rule": "threshold", "threshold": 0.4, "measure": "margin"}, {"rule": "factor", "factor": 1.4},
    {"rule": "entropy_bound", "entropy_bound": 2.0},
], ids=lambda rule: "-".join(map(str, rule.values())) or "published")  # fmt: skip
def test_published_loops(model, mode, length, block, steps, rule):
    equals_the_oracle(model, GenerationConfig(mode=mode, gen_length=length, block_length=block, steps=steps, **rule))


@pytest.mark.parametrize("mode,length,block,steps", [("var", 16, 8, 8), ("fixed", 16, 8, 16), ("fixed", 16, 16, 5)])
@pytest.mark.parametrize("options", [
    {"cfg_scale": 1.5}, {"forbid_tokens": (7, 9, 263)}, {"delay_tokens": tuple(range(100, 200))},
    {"end_think": (50, 51, 52), "end_think_boost": 30.0, "end_think_power": 1.0},
    {"end_think": (50,), "end_think_boost": 100.0, "end_think_power": 3.0, "cfg_scale": 0.5, "forbid_tokens": (8,)},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_published_options(model, mode, length, block, steps, options):
    config = GenerationConfig(mode=mode, gen_length=length, block_length=block, steps=steps, **options)
    equals_the_oracle(model, config)
    plain = dataclasses.replace(
        config, cfg_scale=0.0, forbid_tokens=(), delay_tokens=(), end_think_boost=0.0,
        end_think_power=GenerationConfig.end_think_power,
    )  # fmt: skip
    changed = [
        a.tokens != b.tokens
        for a, b in zip(generate(model, WITH_TEXT, config), generate(model, WITH_TEXT, plain), strict=True)
    ]
    assert any(changed)  # the option does something here


@pytest.mark.parametrize("mode", ["var", "fixed"])
def test_short_packs(model, mode, monkeypatch):
    """They project all tokens in each step."""
    monkeypatch.setattr("illada.generation.step._FEW_TOKENS", 256)
    equals_the_oracle(model, GenerationConfig(mode=mode, gen_length=16, block_length=8, steps=8))


@pytest.fixture(scope="module")
def dream():
    """Return a model with biases, logits of the next token, and seven query heads per key-value head."""
    config = ModelConfig.preset(
        "tiny", hidden_size=28, intermediate_size=48, num_attention_heads=7, num_key_value_heads=1, vocab_size=300,
        max_position_embeddings=64, initializer_range=0.3, qkv_bias=True, logits_shift=True, model_type="dream",
        tie_word_embeddings=False,
    )  # fmt: skip
    model = MaskedDiffusionModel(config, seed=3)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.qkv_proj.bias[:28].uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return model


DREAM = GenerationConfig(mode="fixed", gen_length=16, block_length=16, steps=16, schedule="dream")


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("steps", [4, 16, 20])
def test_dream(dream, steps, measure):
    equals_the_oracle(dream, dataclasses.replace(DREAM, steps=steps, measure=measure))


@pytest.mark.parametrize("options", [
    {"temperature": 0.1, "top_p": 0.9, "measure": "entropy"}, {"temperature": 0.2, "top_p": 0.95},  # as evaluated
    {"top_p": 0.5}, {"top_k": 2, "measure": "margin"}, {"temperature": 0.7, "top_k": 400, "measure": "margin"},
    {"temperature": 1.5, "confidence_at_temperature": True}, {"temperature": 1.5, "top_k": 5, "eps": 0.25},
    {"temperature": 0.9, "top_p": 0.7, "top_k": 4, "measure": "entropy", "forbid_tokens": (7, 9), "cfg_scale": 0.5},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_dream_samples_what_temperature_and_filters_leave(dream, options):
    equals_the_oracle(dream, dataclasses.replace(DREAM, **options))


@pytest.mark.parametrize("option", [{"top_p": 0.5}, {"top_k": 2}, {"confidence_at_temperature": True}, {"eps": 0.5}])
def test_options_of_dream_do_something(dream, option):
    config = dataclasses.replace(DREAM, steps=6, temperature=3.0, measure="entropy")
    assert generate(dream, WITH_TEXT, dataclasses.replace(config, **option)) != generate(dream, WITH_TEXT, config)


@pytest.mark.parametrize("rule", [{}, {"rule": "threshold", "threshold": 0.3}, {"rule": "entropy_bound"}])
def test_filters_with_the_other_rules(model, rule):
    config = GenerationConfig(gen_length=16, block_length=8, steps=6, temperature=0.5, top_p=0.9, **rule)
    equals_the_oracle(model, config)
    equals_the_oracle(model, dataclasses.replace(config, top_p=1.0))  # at a temperature, as LLaDA does


def test_filters_of_one_token_are_greedy(model):
    for rule in ("quota", "origin"):
        config = GenerationConfig(gen_length=16, block_length=8, steps=4, rule=rule, temperature=0.0)
        hot = dataclasses.replace(config, temperature=1e-40), dataclasses.replace(config, temperature=9.0, top_k=1)
        want = generate(model, WITH_TEXT, config)
        if rule == "quota":
            equals_the_oracle(model, hot[1])  # all are sure: in order of position, so later tokens may be others
        else:
            assert generate(model, WITH_TEXT, hot[1]) == want
        assert generate(model, WITH_TEXT, dataclasses.replace(hot[0], top_p=0.9))[0].tokens.count(MASK) == 0


@pytest.mark.parametrize("mode", ["var", "fixed"])
@pytest.mark.parametrize("rule", ["quota", "threshold", "factor", "entropy_bound", "origin"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_alone_or_packed_in_any_order(model, mode, rule, temperature):
    config = GenerationConfig(
        mode=mode, rule=rule, temperature=temperature, gen_length=16, block_length=8, steps=8,
        threshold=0.3 if rule == "threshold" else 0.9,
    )  # fmt: skip
    seeds = [3, 2**40, 3, 1]
    together = [r.tokens for r in generate(model, PROMPTS, config, seed=seeds)]
    alone = [generate(model, [p], config, seed=s)[0].tokens for p, s in zip(PROMPTS, seeds, strict=True)]
    backwards = [r.tokens for r in generate(model, PROMPTS[::-1], config, seed=seeds[::-1])][::-1]
    assert together == alone == backwards
    if temperature:
        assert together != [r.tokens for r in generate(model, PROMPTS, config, seed=9)]
    assert all(MASK not in tokens for tokens in together)


def test_threshold_commits_faster(model):
    slow = GenerationConfig(gen_length=16, block_length=16, steps=16, rule="threshold", threshold=1.0)
    fast = dataclasses.replace(slow, threshold=0.0)
    assert generate(model, PROMPTS[:1], fast)[0].forwards == 1
    assert generate(model, PROMPTS[:1], slow)[0].forwards > 4
    few = dataclasses.replace(slow, steps=3)  # an upper bound: the last step commits what is left
    result = generate(model, PROMPTS[:1], few)[0]
    assert result.forwards == 3 and len(result.tokens) == 16 and MASK not in result.tokens


def test_stop_tokens_end_a_sequence_early(model):
    config = GenerationConfig(gen_length=32, block_length=8, steps=8, stop_tokens=())
    tokens = generate(model, PROMPTS[:1], config)[0].tokens
    stop = tokens[10]
    first = tokens.index(stop)
    results = generate(model, [PROMPTS[0], PROMPTS[3]], dataclasses.replace(config, stop_tokens=(stop,)))
    assert results[0].tokens == tokens[:first] and results[0].finish_reason == "stop_token"
    assert results[0].forwards == 8 * (first // 8 + 1)


def test_stop_strings_and_text(model):
    tokenizer = train_tokenizer(["some text to learn from, and more text"] * 3, 300)
    config = GenerationConfig(gen_length=24, block_length=8, steps=4, stop_tokens=())
    whole = generate(model, PROMPTS[:1], config, tokenizer=tokenizer)[0]
    assert whole.text == tokenizer.decode(whole.tokens)
    stop = whole.text[1:4]
    cut = generate(model, PROMPTS[:1], dataclasses.replace(config, stop_strings=(stop,)), tokenizer=tokenizer)[0]
    assert cut.finish_reason == "stop_string" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.forwards <= whole.forwards
    last = next(n for n in range(1, 25) if stop in tokenizer.decode(whole.tokens[:n]))
    after = set(whole.tokens[last : -(-last // 8) * 8]) - set(whole.tokens[:last])  # in the same block
    assert after
    for ends, reason in ((after, "stop_string"), (whole.tokens[:1], "stop_token")):  # whichever comes first
        both = dataclasses.replace(config, stop_strings=(stop,), stop_tokens=tuple(ends))
        assert generate(model, PROMPTS[:1], both, tokenizer=tokenizer)[0].finish_reason == reason


def test_length_is_clipped_to_the_context(model):
    config = GenerationConfig(gen_length=64, block_length=16, steps=4, stop_tokens=())
    result = generate(model, [list(range(20, 40))], config)[0]
    assert len(result.tokens) == 32 and result.finish_reason == "length"  # 20 + 2 * 16 <= 64 < 20 + 3 * 16


def test_masks_in_a_prompt_stay(model):
    prompt = [7, MASK, 9]
    config = GenerationConfig(gen_length=8, block_length=8, steps=8, stop_tokens=())
    assert len(generate(model, [prompt], config)[0].tokens) == 8 and prompt == [7, MASK, 9]


def test_no_prompts_and_no_global_randomness(model):
    state = torch.random.get_rng_state()
    assert generate(model, []) == []
    generate(model, [[1]], GenerationConfig(gen_length=4, block_length=4, steps=1, temperature=1.0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_quota_schedule():
    assert quota_schedule(8, 3) == [3, 3, 2]
    assert quota_schedule(2, 4) == [1, 1, 0, 0]


def test_errors(model):
    for options, match in (
        ({"mode": "ar"}, "mode must be one of var, fixed, infill, got 'ar'"),
        ({"rule": "best"}, "rule must be one of quota, threshold"),
        ({"measure": "p"}, "measure must be one of probability"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"gen_length": 100}, r"gen_length \(100\) must be a multiple of block_length \(32\)"),
        ({"mode": "fixed", "steps": 6}, r"steps \(6\) must be a multiple of the 4 blocks"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\]"),
        ({"gen_length": 2**20 + 1}, "gen_length must be at most 1048576, got 1048577"),
        (
            {"gen_length": 10**12},
            "gen_length must be at most 1048576, got 1000000000000",
        ),  # and no divisor is looked for
        ({"block_length": 2**20 + 1}, "block_length must be at most 1048576"),
        ({"steps": 5 * 10**7}, "steps must be at most 1048576, got 50000000"),
    ):
        with pytest.raises(ValueError, match=match):
            GenerationConfig(**options)
    assert GenerationConfig(gen_length=2**20, block_length=2**20, steps=2**20).num_blocks == 1
    config = GenerationConfig(gen_length=32, block_length=16)
    fixed = dataclasses.replace(config, mode="fixed")
    for prompts, keywords, match in (
        ([[1], [300]], {}, r"prompts\[1\] holds token id 300, outside of \[0, 300\)"),
        ([[1] * 60], {"config": config}, r"60 tokens; with 16 more it is 12 over the model's .* of 64"),
        ([[1] * 40], {"config": fixed}, "with 32 more it is 8 over"),
        ([[1]], {"seed": [1, 2]}, "one for each of the 1 prompts, got 2"),
        ([[1]], {"config": dataclasses.replace(config, stop_strings=("x",))}, "stop_strings need a tokenizer"),
        ([[1]], {"config": dataclasses.replace(config, stop_tokens=(999,))}, "stop_tokens holds token id 999, outside"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(model, prompts, **keywords)
