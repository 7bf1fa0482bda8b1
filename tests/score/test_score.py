"""Scoring against the published rules restated in plain torch, one pair at a time; packing, edges, errors."""

import functools
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F

import illada
from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel
from illada.reuse import FirstProjection
from illada.score import (
    confidence_score,
    encode_pair,
    is_greedy,
    monte_carlo_likelihood,
    monte_carlo_masks,
    truncate_context,
)
from illada.score.items import make_items
from illada.score.monte_carlo import _estimate
from illada.text.tokenizer import Tokenizer
from illada.text.training import train_tokenizer

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "gqa": ModelConfig.preset("tiny", **SIZES),
    "dream": ModelConfig.preset(
        "tiny", **SIZES, qkv_bias=True, logits_shift=True, tie_word_embeddings=False, model_type="dream"
    ),
    "llada": ModelConfig.preset("tiny", **SIZES, num_key_value_heads=4, embedding_size=310, tie_word_embeddings=False),
}
MASK = CONFIGS["gqa"].mask_token_id
EOS = CONFIGS["gqa"].eos_token_id

QUESTION = list(range(20, 31))
PAIRS = [  # (context, continuation): what it is for
    (QUESTION, [40, 41, 42]),  # candidates of one length share their first forward
    (QUESTION, [50, 51, 52]),
    (QUESTION, [60]),  # leaves at once
    (QUESTION, [61]),
    (QUESTION, [70, 71, 72, 73, 74, 75, 76]),
    ([], [80, 81, 82, 83]),
    ([7, MASK, 9, MASK], [90, 91]),  # masks that belong to the context
    ([7, 8, 9, 10], [90, 91]),
    ([33] * 40, [44, 44, 44]),  # equal targets
    ([11], []),
    ([11], [12, 13, 14, 15, 16]),
]
CONTEXTS, CONTINUATIONS = ([pair[i] for pair in PAIRS] for i in range(2))
OPTIONS = [{}, {"append_eos": True}, {"cfg_scale": 0.7}, {"append_eos": True, "cfg_scale": 1.5}]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    model = MaskedDiffusionModel(CONFIGS[request.param], seed=5)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(2.5)
        for layer in model.layers:  # biases that are not zero
            if CONFIGS[request.param].qkv_bias:
                layer.self_attn.qkv_proj.bias[:32].copy_(torch.linspace(-1, 1, 32))
    return model


@pytest.fixture(scope="module")
def gqa():
    return MaskedDiffusionModel(CONFIGS["gqa"], seed=5)


# --------------------------------------------------------------------------------------------------------- the oracle


def logits_of(model, batch, prompt_length, append_eos=False, cfg_scale=0.0):
    """All logits of a batch [B, L] of equal lengths, as published."""
    if cfg_scale > 0:
        blind = batch.clone()
        blind[:, :prompt_length] = MASK
        batch = torch.cat([batch, blind])
    seen = torch.cat([batch, torch.full((len(batch), 1), EOS)], 1) if append_eos else batch
    rows = [model(row, torch.tensor([0, len(row)], dtype=torch.int32)) @ model.head_weight.T for row in seen]
    logits = torch.stack(rows)[:, : batch.shape[1]]
    if cfg_scale > 0:
        logits, blind_logits = logits.chunk(2)
        logits = blind_logits + (cfg_scale + 1) * (logits - blind_logits)
    return logits


@torch.no_grad()
def oracle_confidence(model, context, continuation, **options):
    start, truth = len(context), torch.tensor(continuation)
    x = torch.tensor(context + [MASK] * len(continuation))
    hidden = list(range(len(continuation)))  # positions still masked; the context is never among them
    total, order = 0.0, []
    for _ in continuation:
        logits = logits_of(model, x[None], start, **options)[0, start:]
        loss = F.cross_entropy(logits[hidden], truth[hidden], reduction="none")
        least, at = loss.min(0)
        total += least.item()
        order.append(hidden.pop(int(at)))
        x[start + order[-1]] = truth[order[-1]]
    return -total


@torch.no_grad()
def oracle_bound(model, context, continuation, masks, **options):
    truth = torch.tensor(continuation)
    total = 0.0
    for mask in torch.from_numpy(masks):
        x = torch.cat([torch.tensor(context, dtype=torch.int64), truth.masked_fill(mask, MASK)])
        logits = logits_of(model, x[None], len(context), **options)[0, len(context) :]
        p_mask = mask.sum() / len(mask)
        total += float((F.cross_entropy(logits[mask], truth[mask], reduction="none") / p_mask).sum())
    return -total / len(masks)


@torch.no_grad()
def greedy_tokens(model, context, length, **options):
    x, start = torch.tensor(context + [MASK] * length), len(context)
    hidden = list(range(length))
    for _ in range(length):
        logits = logits_of(model, x[None], start, **options)[0, start:][hidden]
        confidence, token = logits.softmax(-1).max(-1)
        at = int(confidence.argmax())
        x[start + hidden.pop(at)] = token[at]
    return x[start:].tolist()


def close(got, want):
    return got == pytest.approx(want, rel=1e-5, abs=2e-5)


# ----------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("options", OPTIONS)
def test_confidence_score_is_the_published_one(model, options):
    results = confidence_score(model, CONTEXTS, CONTINUATIONS, **options)
    assert close([r.score for r in results], [oracle_confidence(model, *pair, **options) for pair in PAIRS])
    assert [r.forwards for r in results] == [len(c) for c in CONTINUATIONS]
    assert results[9].score == 0.0 and not math.copysign(1, results[9].score) < 0


@pytest.mark.parametrize("options", OPTIONS)
def test_monte_carlo_likelihood_is_the_published_one(model, options):
    got = monte_carlo_likelihood(model, CONTEXTS, CONTINUATIONS, num_samples=8, stratum=4, seed=3, **options)
    for (context, continuation), value in zip(PAIRS, got, strict=True):
        if continuation:
            masks = monte_carlo_masks(context, continuation, num_samples=8, stratum=4, seed=3)
            assert close(value, oracle_bound(model, context, continuation, masks, **options))
        else:
            assert value == 0.0


@pytest.mark.parametrize("options", OPTIONS)
def test_greedy_continuations_are_found(model, options):
    contexts, continuations, want = [], [], []
    for context, length in ((QUESTION, 1), (QUESTION, 4), (QUESTION[:5], 3), ([7, MASK, 9], 3), ([9] * 30, 6)):
        tokens = greedy_tokens(model, context, length, **options)
        for i in range(length + 1):  # right, or wrong in one place, which is found at some step
            changed = [t if j != i else 299 - t for j, t in enumerate(tokens)]
            contexts.append(context)
            continuations.append(changed)
            want.append(i == length and MASK not in tokens)
    keep = [i for i, tokens in enumerate(continuations) if MASK not in tokens]
    contexts, continuations, want = ([part[i] for i in keep] for part in (contexts, continuations, want))
    assert any(want)
    assert is_greedy(model, contexts, continuations, **options) == want
    assert is_greedy(model, contexts, continuations, max_tokens=30, **options) == want
    assert is_greedy(model, [[1]], [[]], **options) == [True]


def test_a_bfloat16_model(gqa):
    model = MaskedDiffusionModel(CONFIGS["gqa"], seed=5, dtype=torch.bfloat16)
    want = [r.score for r in confidence_score(gqa, CONTEXTS, CONTINUATIONS, cfg_scale=0.5)]
    got = [r.score for r in confidence_score(model, CONTEXTS, CONTINUATIONS, cfg_scale=0.5)]
    assert got == pytest.approx(want, rel=0.03, abs=0.3)


# --------------------------------------------------------------------------------------------------------- the packing


@pytest.mark.parametrize("options", OPTIONS)
def test_alone_packed_or_shuffled(model, options):
    def all_three(contexts, continuations, **more):
        return (
            [r.score for r in confidence_score(model, contexts, continuations, **options, **more)],
            monte_carlo_likelihood(model, contexts, continuations, num_samples=8, stratum=4, **options, **more),
            [float(x) for x in is_greedy(model, contexts, continuations, **options, **more)],
        )

    together = all_three(CONTEXTS, CONTINUATIONS)
    alone = [all_three([context], [continuation]) for context, continuation in PAIRS]
    backwards = all_three(CONTEXTS[::-1], CONTINUATIONS[::-1])
    for i, result in enumerate(together):
        assert close([a[i][0] for a in alone], result) and close(backwards[i][::-1], result)
        for max_tokens in (1, 25, 60):
            assert close(all_three(CONTEXTS, CONTINUATIONS, max_tokens=max_tokens)[i], result)


def test_equal_sequences_are_run_once(gqa, monkeypatch):
    seen = []
    forward = MaskedDiffusionModel.forward

    def spy(self, tokens, cu_seqlens, **options):
        seen.append((len(cu_seqlens) - 1, len(tokens)))
        return forward(self, tokens, cu_seqlens, **options)

    monkeypatch.setattr(MaskedDiffusionModel, "forward", spy)
    letters = [[40], [41], [42], [43]]
    confidence_score(gqa, [QUESTION] * 4, letters, max_tokens=13)
    monte_carlo_likelihood(gqa, [QUESTION] * 4, letters, num_samples=16)
    assert seen == [(1, 12), (1, 12)]  # four candidates of one token, sixteen samples: one sequence
    seen.clear()
    confidence_score(gqa, [QUESTION] * 3, [[40, 41], [42, 43], [44, 45, 46]])
    assert [sequences for sequences, _ in seen] == [
        2,
        3,
        1 + 2 - 2,
    ]  # shared at first, then one of three tokens is left
    seen.clear()
    monte_carlo_likelihood(gqa, [QUESTION], [[40, 41, 42]], num_samples=128)
    assert sum(sequences for sequences, _ in seen) <= 7


@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
def test_first_layer_is_kept_between_steps(gqa, cfg_scale, monkeypatch):
    """What is revealed is projected again, for those that go on alone; what a context's last candidates share stays so."""
    projected, taken, take = [], [], FirstProjection.take
    monkeypatch.setattr(FirstProjection, "take", lambda first, index: taken.append(len(index)) or take(first, index))
    layer = gqa.layers[0].self_attn.qkv_proj
    hook = layer.register_forward_hook(lambda module, inputs, out: projected.append(len(out)))
    half = 2 if cfg_scale else 1
    confidence_score(gqa, [QUESTION] * 50, [[i] for i in range(20, 70)], cfg_scale=cfg_scale)
    assert projected == [half * (len(QUESTION) + 1)] and not taken
    projected.clear()
    confidence_score(gqa, [QUESTION] * 4, [[20, 21, 22], [23, 24, 25], [26], [27]], cfg_scale=cfg_scale)
    hook.remove()
    assert projected == [half * n for n in (2 * len(QUESTION) + 4, 2, 2)]
    assert taken == [half * 2 * (len(QUESTION) + 3)]


def test_packs_stay_below_max_tokens(gqa, monkeypatch):
    seen = []
    forward = MaskedDiffusionModel.forward

    def spy(self, tokens, cu_seqlens, **options):
        seen.append(len(tokens))
        return forward(self, tokens, cu_seqlens, **options)

    monkeypatch.setattr(MaskedDiffusionModel, "forward", spy)
    for options in ({}, {"cfg_scale": 1.0}):
        for call in (confidence_score, is_greedy, monte_carlo_likelihood):
            seen.clear()
            call(gqa, CONTEXTS, CONTINUATIONS, max_tokens=100, **options)
            assert 40 < max(seen) <= 100


def test_masks_in_a_context_are_tokens_like_others(gqa):
    context = [7, MASK, 9]
    before = list(context)
    confidence_score(gqa, [context], [[10, 11]])
    assert context == before
    scores = confidence_score(gqa, [context, [7, 8, 9]], [[10, 11]] * 2)
    assert scores[0].forwards == 2 and scores[0].score != scores[1].score


def test_nothing_to_do_and_no_global_randomness(gqa):
    state = torch.random.get_rng_state()
    numpy_state = np.random.get_state()[1].tolist()
    assert confidence_score(gqa, [], []) == [] == monte_carlo_likelihood(gqa, [], []) == is_greedy(gqa, [], [])
    monte_carlo_likelihood(gqa, CONTEXTS[:2], CONTINUATIONS[:2], num_samples=4)
    assert torch.equal(state, torch.random.get_rng_state()) and numpy_state == np.random.get_state()[1].tolist()
    assert all(parameter.grad is None for parameter in gqa.parameters())


def test_not_a_number_is_said_and_stays_with_its_sequence():
    model = MaskedDiffusionModel(CONFIGS["gqa"], seed=5)
    want = [r.score for r in confidence_score(model, CONTEXTS, CONTINUATIONS)]
    with torch.no_grad():
        model.embed_tokens.weight[200] = torch.nan  # as an input it spoils one sequence; as a row of the head all
        model.lm_head = torch.nn.Linear(32, 300, bias=False)
        model.lm_head.weight.copy_(model.embed_tokens.weight)
        model.lm_head.weight[200] = 0
    contexts, continuations = [*CONTEXTS, [200, 8]], [*CONTINUATIONS, [9, 10, 11]]
    got = [r.score for r in confidence_score(model, contexts, continuations)]
    assert math.isnan(got[-1]) and not any(math.isnan(value) for value in got[:-1])
    assert got[:-1] != want  # a changed head, the same walk
    assert math.isnan(monte_carlo_likelihood(model, [[200, 8]], [[9, 10]], num_samples=4)[0])
    assert is_greedy(model, [[200, 8]], [[9, 10]]) == [False]


# ----------------------------------------------------------------------------------------------------------- the masks


@pytest.mark.parametrize("length", [1, 2, 5, 7, 16, 33])
@pytest.mark.parametrize("num_samples,stratum", [(1, 16), (16, 16), (12, 4), (5, 5)])
def test_mask_counts_follow_the_published_rule(length, num_samples, stratum):
    tokens = list(range(10, 10 + length))
    masks = monte_carlo_masks([1, 2], tokens, num_samples=num_samples, stratum=stratum, seed=1)
    assert masks.shape == (num_samples, length)
    b = min(stratum, num_samples)
    allowed = []
    for k in range(1, length + 1):
        x = torch.round(torch.linspace(float(k), k + (b - 1) * (length / b), steps=b)).long()
        allowed.append((((x - 1) % length) + 1).tolist())
    for counts in masks.sum(1).reshape(-1, b).tolist():
        assert counts in allowed


def test_masks_are_uniform_and_keyed_by_content():
    masks = monte_carlo_masks([1], [10, 11, 12, 13, 14], num_samples=20000, stratum=5)
    counts = masks.sum(1)
    assert np.bincount(counts, minlength=6).tolist() == [0] + [4000] * 5  # each stratum has every count once
    for count in range(1, 5):
        share = masks[counts == count].mean(0)
        assert np.abs(share - count / 5).max() < 5 * 0.5 / 4000**0.5  # five standard errors at most
    again = monte_carlo_masks([1], [10, 11, 12, 13, 14], num_samples=20000, stratum=5)
    assert (masks == again).all()
    for change in (([2], [10, 11, 12, 13, 14], 0), ([1], [10, 11, 12, 13, 15], 0), ([1], [10, 11, 12, 13, 14], 1)):
        other = monte_carlo_masks(*change[:2], num_samples=20000, stratum=5, seed=change[2])
        assert (masks != other).any()
    assert (monte_carlo_masks([1], [2, 3], num_samples=8, seed=-1) | True).all()  # any integer is a seed


def test_the_estimate_is_unbiased(gqa):
    """Against all masks: 1/L sum_x (L / x) mean over the sets of x tokens of their cross-entropies."""
    context, continuation = QUESTION, [40, 41, 42, 43]
    length = len(continuation)
    every = [m for m in itertools.product([False, True], repeat=length) if any(m)]
    masks = np.array(every)
    weights = np.array([1 / length / math.comb(length, sum(m)) for m in every])
    item = make_items(gqa.config, [context], [continuation], False)[0]
    with torch.inference_mode():
        exact = -_estimate(gqa, [(item, masks, weights)], 1, 0.0, 8192)[0]
    terms = np.array([oracle_bound(gqa, context, continuation, mask[None]) for mask in masks])
    assert close(exact, float(weights @ terms))
    spread = math.sqrt(float(weights @ (terms - exact) ** 2))
    for stratum in (1, 4):
        got = monte_carlo_likelihood(gqa, [context], [continuation], num_samples=4000, stratum=stratum, seed=7)[0]
        assert abs(got - exact) < 4 * spread / 4000**0.5
    # The bound is one: it lies below the best order of revealing, which is what the confidence score takes.
    assert exact < confidence_score(gqa, [context], [continuation])[0].score


# ---------------------------------------------------------------------------------------------------------- the errors


def test_truncate_context():
    config = CONFIGS["gqa"]
    assert truncate_context(config, list(range(100)), [1] * 10) == list(range(46, 100))
    assert truncate_context(config, list(range(100)), [1] * 10, append_eos=True) == list(range(47, 100))
    assert truncate_context(config, [1, 2], [3]) == [1, 2] and truncate_context(config, [1], [1] * 64) == []
    cut = functools.partial(truncate_context, config, list(range(100)), keep=2)  # 0 and 1 begin each context
    assert cut([1] * 10) == [0, 1, *range(48, 100)] and cut([1] * 62) == [0, 1] and cut([1] * 63) == [99]
    assert truncate_context(config, [1, 2, 3], [4], keep=2) == [1, 2, 3] and cut([1] * 64) == []
    with pytest.raises(ValueError, match="continuation has 64 tokens and an eos, 1 over .* of 64, even without"):
        truncate_context(config, [1], [1] * 64, append_eos=True)


def test_the_longest_that_fits(gqa):
    contexts = [truncate_context(gqa.config, list(range(6, 200)), [10, 11], append_eos=True)]
    assert close(
        confidence_score(gqa, contexts, [[10, 11]], append_eos=True)[0].score,
        oracle_confidence(gqa, contexts[0], [10, 11], append_eos=True),
    )


@pytest.mark.parametrize("call", [confidence_score, monte_carlo_likelihood, is_greedy])
def test_errors(gqa, call):
    for arguments, options, error, match in (
        (([[1]], []), {}, ValueError, "contexts and continuations must be of one length, got 1 and 0"),
        (([[1], [300]], [[1], [2]]), {}, ValueError, r"contexts\[1\] holds token id 300, outside of \[0, 300\)"),
        (([[1]], [[-1]]), {}, ValueError, r"continuations\[0\] holds token id -1"),
        (([[1]], [[9, MASK]]), {}, ValueError, r"continuations\[0\] holds the mask token, id 5"),
        (([[1] * 60], [[2] * 5]), {}, ValueError, r"60 \+ 5 tokens, 1 over the model's .* of 64; .*truncate_context"),
        (([[1] * 60], [[2] * 4]), {"append_eos": True}, ValueError, r"60 \+ 4 tokens and an eos, 1 over"),
        ((["text"], [[1]]), {}, TypeError, r"contexts\[0\] must be a list of token ids, got str 'text'"),
        (([[1]], [[1.5]]), {}, TypeError, r"continuations\[0\] must be a list of token ids"),
        (([[1]], [3]), {}, TypeError, r"continuations\[0\] must be a list of token ids, got int"),
        (([[1]], [[1]]), {"cfg_scale": -1.0}, ValueError, "cfg_scale must be finite and >= 0, got -1.0"),
        (([[1]], [[1]]), {"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=match):
            call(gqa, *arguments, **options)


def test_errors_of_sample_counts(gqa):
    for options, match in (
        ({"num_samples": 20}, r"must be a multiple of stratum \(16\) or smaller than it, got 20; .* are 16 and 32"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"stratum": 0}, "stratum must be an integer of at least 1"),
        ({"num_samples": 2.0}, "num_samples must be an integer of at least 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=match):
            monte_carlo_likelihood(gqa, [[1]], [[2]], **options)
    with pytest.raises(ValueError, match="continuation is empty"):
        monte_carlo_masks([1], [])


def test_rows_of_the_last_layer(model):
    """What scoring rests on: hidden states of some rows alone."""
    tokens = torch.arange(20, 60)
    cu_seqlens = torch.tensor([0, 15, 15, 17, 40], dtype=torch.int32)
    rows = torch.tensor([0, 1, 14, 15, 30, 39], dtype=torch.int32)
    with torch.no_grad():
        want = model(tokens, cu_seqlens)[rows]
        torch.testing.assert_close(model(tokens, cu_seqlens, rows=rows), want, rtol=1e-5, atol=1e-5)
    for wrong in ([3, 2], [-1, 2], [0, 40]):
        with pytest.raises(ValueError, match=r"rows must ascend within \[0, 40\)"):
            model(tokens, cu_seqlens, rows=torch.tensor(wrong))


def test_the_example_of_the_page(gqa):
    page = (Path(__file__).resolve().parents[2] / "docs" / "scoring.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], names)
    assert names["best"] in range(3) and len(names["bounds"]) == 3
    assert illada.confidence_score is confidence_score and illada.monte_carlo_likelihood is monte_carlo_likelihood


# --------------------------------------------------------------------------------------------------------------- texts


def test_encode_pair():
    backend = train_tokenizer(["coding coder codex the code is codex y er x y ing x y"] * 9, 300)
    tokenizer = Tokenizer(backend)
    mask = tokenizer.decode([MASK], skip_special_tokens=False)
    seen = set()
    for candidate in ("e x y", "er x y", "ing x y", "", mask, f" {mask[:2]}"):
        for context in ("cod", "the cod", "", "the ", "x\n", mask[:-1], f"{mask} cod"):
            ids, more = encode_pair(tokenizer, context, candidate)
            assert ids + more == tokenizer.encode(context + candidate, parse_special_tokens=False)
            assert context.startswith(tokenizer.decode(ids)) and MASK not in ids + more
            assert bool(more) == bool(candidate)
            seen.add((context, tuple(more)))
    assert len(seen) == 6 * 7  # no two candidates look alike
    ids, more = encode_pair(tokenizer, f"the{mask} cod", f"er {mask}", parse_special_tokens=True)
    assert ids.count(MASK) == 1 and MASK not in more and len(ids) > ids.index(MASK)
    # A candidate that the normaliser empties has nothing to score, whatever else the context ends with.
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Replace("\u200b", ""), tokenizers.normalizers.Strip()]
    )
    for context in ("cod", "the ", ""):
        assert encode_pair(tokenizer, context, "\u200b")[1] == [] == encode_pair(tokenizer, context, " ")[1]
        assert encode_pair(tokenizer, context, "x")[1]


def test_added_tokens_that_are_not_special_are_text():
    """They are parsed everywhere; a text must not be cut at one, which begins it anew for some pre-tokenizers."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.train_from_iterator(
        ["the dog the fox"] * 9, tokenizers.trainers.BpeTrainer(vocab_size=40, show_progress=False)
    )
    backend.add_tokens(["[tool]"])
    backend.add_special_tokens(["<end>"])
    tokenizer = Tokenizer(backend)
    for context in ("the[tool]dog", "the<end>the[tool]dog", "[tool]"):
        ids, more = encode_pair(tokenizer, context, "the[tool]fox", parse_special_tokens=True)
        assert ids + more == tokenizer.encode(context + "the[tool]fox")
    assert tokenizer.token_to_id("<end>") not in encode_pair(tokenizer, "the", "<end>", parse_special_tokens=True)[1]
