"""sample_tokens, linear_sample_tokens and remask against their specification; noise, ties, errors."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import illada
from illada.ops import raw, reference
from illada.ops.types import RULES as RULE_NAMES
from illada.ops.types import RemaskStatus, TokenSample
from illada.random import philox4x32
from illada.testing import assert_close_like, plain_sample

CASES = [  # N, V, spread: what the row is for
    (1, 1, 1.0),  # one word: p = 1, margin 1
    (3, 7, 1.0),  # less than a vector
    (5, 1025, 4.0),  # a block of the row loop and one more
    (2, 155136, 2.0),  # iLLaDA
    (3, 126464, 10.0),  # LLaDA, peaked
]
DTYPES = [torch.float32, torch.bfloat16]
ALL = ("entropy", "margin")


def rows_of(case, dtype, generator):
    count, vocab, spread = case
    wide = torch.full((count, vocab + 3), torch.nan, dtype=dtype)  # poison beside every row
    wide[:, :vocab] = (torch.randn(count, vocab, generator=generator) * spread).to(dtype)
    return wide[:, :vocab]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, dtype, temperature, generator):
    logits = rows_of(case, dtype, generator)
    keywords = {"temperature": temperature, "seed": 2**40 + 3, "step": 5, "extras": ALL}
    got = illada.sample_tokens(logits, **keywords)
    want = reference.sample_tokens(logits, **keywords)
    assert torch.equal(got.token, want.token)
    baseline = plain_sample(logits, want.token)
    for g, w, b in zip(got[1:], want[1:], baseline[1:], strict=True):
        assert_close_like(g, w, b, factor=2.0)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy", "random"])
def test_measures_and_arguments_of_each_row(measure, generator):
    logits = rows_of((6, 700, 2.0), torch.float32, generator)
    keywords = {
        "temperature": torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 0.0]),
        "seed": torch.tensor([1, 2, -3, 2**62, 1, 5]),
        "step": torch.tensor([0, 1, 2, 3, 2**31 - 1, 5], dtype=torch.int32),
        "row_ids": torch.tensor([0, 9, 2**32 - 1, 4, 3, 2]),
        "measure": measure,
    }
    got, want = (f(logits, **keywords) for f in (illada.sample_tokens, reference.sample_tokens))
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.confidence.double(), want.confidence, rtol=2e-6, atol=1e-7)
    assert (got.entropy is not None) == (measure == "entropy")
    assert (got.margin is not None) == (measure == "margin")


def test_noise_depends_on_its_key_alone(generator):
    logits = rows_of((1, 3000, 0.1), torch.bfloat16, generator)
    same = logits.repeat(8, 1)
    ids = torch.tensor([4, 4, 5, 4, 6, 4, 7, 4])
    sample = illada.sample_tokens(same, temperature=1.0, seed=9, step=2, row_ids=ids)
    alone = illada.sample_tokens(logits, temperature=1.0, seed=9, step=2, row_ids=ids[:1])
    assert (sample.token[ids == 4] == alone.token).all()
    others = {int(alone.token)} | set(sample.token[ids != 4].tolist())
    others |= {int(illada.sample_tokens(logits, temperature=1.0, seed=s, step=t, row_ids=ids[:1]).token) for s, t in ((8, 2), (9, 3))}  # fmt: skip
    assert len(others) == 6  # nothing repeats among 3000 almost equal tokens


def test_a_step_may_be_negative_in_both_forms(generator):
    logits = rows_of((2, 3000, 0.1), torch.float32, generator)
    keywords = {"temperature": 1.0, "seed": 3, "measure": "random"}
    numbers = [illada.sample_tokens(logits, step=s, **keywords) for s in (-1, 2**31 - 1, -(2**31))]
    rows = [illada.sample_tokens(logits, step=torch.full((2,), s).int(), **keywords) for s in (-1, 2**31 - 1, -(2**31))]
    assert len({tuple(sample.token.tolist()) for sample in numbers}) == 3
    for a, b in zip(numbers, rows, strict=True):
        assert torch.equal(a.token, b.token) and torch.equal(a.confidence, b.confidence)
    want = reference.sample_tokens(logits, step=-1, **keywords)
    assert torch.equal(numbers[0].token, want.token) and torch.equal(numbers[0].confidence.double(), want.confidence)


def test_distribution_is_the_softmax(generator):
    # 100,000 draws over 64 ids, temperature folded into the logits: chi-square with 63 degrees of freedom.
    logits = torch.randn(64, generator=generator) * 1.5
    draws = illada.sample_tokens(logits.expand(100_000, 64), temperature=2.0, seed=11)
    expected = (logits.double() / 2.0).softmax(0) * 100_000
    observed = torch.bincount(draws.token, minlength=64)
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert 30 < chi_square < 110  # 1e-4 .. 1 - 1e-4 quantiles are 30 and 117; a fit too good is a fault as well


def test_uniforms_reach_the_tails():
    # u is made of 64 bits, so -log(1 - u) is exact below 2^-32, where rare tokens win or lose.
    u = np.concatenate([reference.uniform64(1, row, 0, 1 << 18) for row in range(8)])
    assert u.min() > 0 and 0 < 1 - u.max() < 1e-5
    smallest = np.sort(u)[:1000] * len(u)  # order statistics: uniform on [0, 1000] in expectation
    assert abs(smallest[-1] - 1000) < 5 * 1000**0.5
    bits = np.unpackbits((u * 2.0**53).astype(np.uint64).view(np.uint8))
    assert abs(bits.reshape(len(u), 64).mean(0)[:48] - 0.5).max() < 5 * 0.5 / len(u) ** 0.5


def test_rare_token_is_seen_at_its_rate():
    # One token of probability 1e-4 among others: 200,000 draws, Poisson(20).
    logits = torch.zeros(4)
    logits[2] = float(np.log(1e-4 * 3 / (1 - 1e-4)))
    tokens = illada.sample_tokens(logits.expand(200_000, 4), temperature=1.0, seed=5).token
    assert 4 <= int((tokens == 2).sum()) <= 42


def test_ties_nan_and_infinities():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, 0.0],  # a tie: lowest id
            [nan, 3.0, 1.0, 0.0],
            [1.0, inf, 1.0, 0.0],
            [-inf, -inf, -inf, -inf],
            [-inf, 2.0, -inf, -inf],  # one possible token
        ]
    )
    for temperature in (0.0, 1.0):
        got = illada.sample_tokens(logits, temperature=temperature, seed=1, extras=ALL)
        want = reference.sample_tokens(logits, temperature=temperature, seed=1, extras=ALL)
        assert torch.equal(got.token, want.token)
        assert got.confidence[1:4].tolist() == [-inf] * 3 == got.logprob[1:4].tolist()
        assert got.confidence[4] == 1 and abs(got.entropy[4]) < 1e-30 and got.margin[4] == 1
    assert illada.sample_tokens(logits).token.tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logit_bias(temperature, generator):
    logits = rows_of((3, 2100, 1.0), torch.bfloat16, generator)
    best = int(logits[0].argmax())
    forbid = (torch.tensor([best, -1], dtype=torch.int32), torch.tensor([-torch.inf, 7.0]))
    one_each = (torch.tensor([[5], [2099], [-1]], dtype=torch.int32), torch.tensor([[20.0], [20.0], [20.0]]))
    for bias in (forbid, one_each):
        keywords = {"temperature": temperature, "seed": 4, "logit_bias": bias, "extras": ALL}
        got, want = (f(logits, **keywords) for f in (illada.sample_tokens, reference.sample_tokens))
        assert torch.equal(got.token, want.token)
        for g, w in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)
    assert illada.sample_tokens(logits, logit_bias=forbid).token[0] != best
    assert illada.sample_tokens(logits, logit_bias=one_each).token[:2].tolist() == [5, 2099]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_sample_tokens(dtype, generator):
    hidden = torch.randn(300, 16, generator=generator).to(dtype)
    weight = torch.randn(1000, 16, generator=generator).to(dtype)
    rows = torch.tensor([7, 3, 299, 3], dtype=torch.int32)
    keywords = {"temperature": 0.7, "seed": 3, "extras": ALL}
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, **keywords)
    want = illada.sample_tokens(hidden[rows.long()] @ weight.T, **keywords)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.confidence, want.confidence)
    with FlopCounterMode(display=False) as counter:
        assert illada.linear_sample_tokens(hidden, weight).token.shape == (300,)  # several chunks
    assert counter.get_total_flops() == 2 * 300 * 1000 * 16
    assert illada.linear_sample_tokens(hidden, weight, rows=rows[:0]).token.shape == (0,)


def candidates(generator, lengths=(5, 0, 9, 1, 12)):
    """A canvas with masks (id 5) and texts, sampled rows of every sequence, and a sample with ties and NaNs."""
    total = sum(lengths)
    tokens = torch.randint(10, 20, (2 * total,), generator=generator)
    rows = torch.randperm(2 * total, generator=generator)[:total].sort().values.int()
    tokens[rows.long()] = torch.where(torch.rand(total, generator=generator) < 0.8, 5, tokens[rows.long()])
    confidence = (torch.rand(total, generator=generator) * 8).round() / 8  # coarse: many ties
    confidence[1], confidence[6] = torch.nan, -torch.inf
    entropy = torch.rand(total, generator=generator)
    entropy[[0, 8, 9, 16, 20]] = torch.nan  # which may not break the order of the others
    sample = TokenSample(torch.arange(100, 100 + total), confidence, confidence, entropy)
    cu_rows = torch.tensor([0, *lengths]).cumsum(0).int()
    return tokens, rows, cu_rows, sample


RULES = [
    {"quota": 3},
    {"quota": 100},
    {"quota": torch.tensor([0, 2, 1, 1, 5], dtype=torch.int32)},
    {"threshold": 0.5},
    {"threshold": torch.tensor([0.9, 0.1, 2.0, 0.0, 0.3])},
    {"threshold": 2.0, "min_commit": 0},
    {"threshold": 2.0, "min_commit": 2},
    {"factor": 1.0},
    {"factor": 2.5},
    {"entropy_bound": 0.4},
    {"entropy_bound": torch.tensor([0.0, 1.0, 0.1, 0.2, 3.0])},
]


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_remask_matches_reference(rule, token_dtype, generator):
    for _ in range(5):
        tokens, rows, cu_rows, sample = candidates(generator)
        got_tokens, want_tokens = tokens.to(token_dtype), tokens.clone()
        got = illada.remask(got_tokens, rows, cu_rows, sample, mask_id=5, **rule)
        want = reference.remask(want_tokens, rows, cu_rows, sample, mask_id=5, **rule)
        assert got.dtype == torch.int32 and got.tolist() == want.tolist()
        assert torch.equal(got_tokens.long(), want_tokens)
        untouched = torch.ones_like(tokens, dtype=torch.bool)
        untouched[rows.long()] = False
        assert torch.equal(got_tokens[untouched].long(), tokens[untouched])


@pytest.mark.parametrize("quota", [float("inf"), 1e30, 2**31, 2**63 - 1, 10**400])
def test_a_quota_of_any_size_commits_all(quota, generator):
    tokens, rows, cu_rows, sample = candidates(generator)
    wanted = illada.remask(tokens.clone(), rows, cu_rows, sample, quota=100, mask_id=5)
    assert wanted.sum() > 0
    assert torch.equal(illada.remask(tokens, rows, cu_rows, sample, quota=quota, mask_id=5), wanted)


def test_ids_that_the_canvas_cannot_hold(generator):
    tokens, rows, cu_rows, sample = candidates(generator)
    tokens, before = tokens.int(), tokens.int()
    for wrong in (2**40 + 7, 2**31, -(2**31) - 1):
        sample.token[3] = wrong
        with pytest.raises(ValueError, match=rf"remask: sample.token\[3\] is {wrong}, which int32 tokens cannot hold"):
            illada.remask(tokens, rows, cu_rows, sample, quota=1, mask_id=5)
    assert torch.equal(tokens, before)
    for name in ("mask_id", "min_commit"):
        with pytest.raises(ValueError, match=f"remask: {name} must fit 64 bits"):
            illada.remask(tokens, rows, cu_rows, sample, threshold=0.5, **{"mask_id": 5, name: 2**63})


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_remask_status_matches_reference(rule, token_dtype, generator):
    ends = torch.tensor([101, 104, 109, 120])
    for _ in range(5):
        tokens, rows, cu_rows, sample = candidates(generator)
        sample.token[torch.rand(27, generator=generator) < 0.1] = 5  # commits that leave a mask
        keywords = {"mask_id": 5, "end_ids": ends, "return_status": True, **rule}
        got = illada.remask(tokens.to(token_dtype, copy=True), rows, cu_rows, sample, **keywords)
        want = reference.remask(tokens, rows, cu_rows, sample, **keywords)
        for name, g, w in zip(RemaskStatus._fields, got, want, strict=True):
            assert g.dtype == w.dtype and torch.equal(g, w), name


def test_remask_status_of_finished_and_ended_sequences():
    tokens = torch.tensor([5, 5, 9, 5, 5, 5])
    sample = TokenSample(torch.tensor([2, 8, 8, 5, 8]), torch.tensor([0.1, 0.9, 0.5, 0.4, torch.nan]), torch.zeros(5))
    rows = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    cu_rows = torch.tensor([0, 0, 2, 3, 5], dtype=torch.int32)  # empty, all committed, nothing masked, a NaN
    keywords = {"mask_id": 5, "end_ids": torch.tensor([2]), "return_status": True}
    status = illada.remask(
        tokens, rows, cu_rows, sample, quota=torch.tensor([3, 3, 3, -1], dtype=torch.int32), **keywords
    )
    assert status.committed.tolist() == [0, 2, 0, 0] and status.remaining.tolist() == [0, 0, 0, 2]
    assert status.finished.tolist() == [True, True, True, False] and status.ended.tolist() == [
        False,
        True,
        False,
        False,
    ]
    status = illada.remask(tokens, rows, cu_rows, sample, quota=9, **keywords)
    assert status.committed.tolist() == [0, 0, 0, 1] and status.remaining.tolist() == [0, 0, 0, 2]  # a mask committed
    assert tokens.tolist() == [2, 8, 9, 5, 5, 5]
    assert not illada.remask(tokens, rows, cu_rows, sample, quota=9, mask_id=5, return_status=True).ended.any()


@pytest.mark.parametrize("rule", [rule for rule in RULES if "min_commit" not in rule], ids=str)
def test_raw_remask_is_the_public_function(rule, generator):
    tokens, rows, cu_rows, sample = candidates(generator)
    (name, limit), ends = next(iter(rule.items())), torch.tensor([101, 109])
    limits = limit if isinstance(limit, torch.Tensor) else None
    want_tokens, got_tokens = tokens.clone(), tokens.clone()
    want = illada.remask(want_tokens, rows, cu_rows, sample, mask_id=5, end_ids=ends, return_status=True, **rule)
    out = RemaskStatus(*(torch.full_like(field, True) for field in want))
    number = 0.0 if limits is not None else limit
    arguments = (RULE_NAMES.index(name), number, limits, 5, 1, ends)
    raw.remask(out, got_tokens, rows, cu_rows, sample.token, sample.confidence, sample.entropy, *arguments)
    assert torch.equal(got_tokens, want_tokens) and all(torch.equal(g, w) for g, w in zip(out, want, strict=True))
    committed = RemaskStatus(out.committed, rows[:0], out.finished[:0], out.ended[:0])  # the others are optional
    raw.remask(committed, tokens, rows, cu_rows, sample.token, sample.confidence, sample.entropy, *arguments)
    assert torch.equal(tokens, want_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_sample_tokens_is_the_public_function(dtype, generator):
    logits = rows_of((6, 1001, 2.0), dtype, generator)
    bias = (torch.tensor([3, -1, 9], dtype=torch.int32), torch.tensor([2.0, 0.0, -torch.inf]))
    temperatures, seeds = torch.linspace(0, 2, 6), torch.arange(6) - 3
    steps, row_ids = torch.arange(6, dtype=torch.int32), torch.arange(6) * 7
    want = illada.sample_tokens(
        logits, temperature=temperatures, seed=seeds, step=steps, row_ids=row_ids, logit_bias=bias, measure="margin",
        extras=("entropy",),
    )  # fmt: skip
    out = TokenSample(torch.full((6,), -7), *torch.full((4, 6), -7.0))
    raw.sample_tokens(out, logits, 0.0, 0, 0, temperatures, seeds, steps, row_ids, *bias, 1)
    assert all(torch.equal(g, w) for g, w in zip(out, want, strict=True))
    raw.sample_tokens(out._replace(entropy=None, margin=None), logits, 0.5, 3)
    want = illada.sample_tokens(logits, temperature=0.5, seed=3)
    assert all(torch.equal(g, w) for g, w in zip(out[:3], want[:3], strict=True))
    assert raw.sample_tokens_workspace(6, 1001, logits.device) == 0


def test_arguments_of_each_row_may_be_strided(generator):
    logits = rows_of((5, 3000, 0.1), torch.float32, generator)
    seeds, every_other = torch.arange(5), torch.arange(10)[::2]
    want = illada.sample_tokens(logits, temperature=1.0, seed=seeds * 2, row_ids=seeds * 2)
    got = illada.sample_tokens(logits, temperature=1.0, seed=every_other, row_ids=every_other)
    assert torch.equal(got.token, want.token)


def test_remask_takes_the_surest_and_never_a_broken_row():
    tokens = torch.tensor([5, 5, 5, 9, 5])
    sample = TokenSample(torch.arange(20, 25), torch.tensor([0.2, torch.nan, 0.9, 1.0, -torch.inf]), torch.zeros(5))
    rows, cu_rows = torch.arange(5, dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    assert illada.remask(tokens, rows, cu_rows, sample, quota=1, mask_id=5).tolist() == [1]
    assert tokens.tolist() == [5, 5, 22, 9, 5]
    assert illada.remask(tokens, rows, cu_rows, sample, quota=9, mask_id=5).tolist() == [1]
    assert tokens.tolist() == [20, 5, 22, 9, 5]


def test_published_rule_at_temperature_zero(generator):
    # LLaDA's step on one block: argmax, softmax probability of it, top-k of those among the masks.
    logits = torch.randn(12, 501, generator=generator)
    tokens = torch.full((12,), 5)
    tokens[3] = 77
    confidence, x0 = logits.softmax(-1).max(-1)
    confidence[3] = -torch.inf
    want = tokens.clone()
    chosen = confidence.topk(4).indices
    want[chosen] = x0[chosen]
    rows, cu_rows = torch.arange(12, dtype=torch.int32), torch.tensor([0, 12], dtype=torch.int32)
    illada.remask(tokens, rows, cu_rows, illada.sample_tokens(logits), quota=4, mask_id=5)
    assert torch.equal(tokens, want)


def test_registration(generator):
    logits = torch.randn(4, 33, generator=generator)
    arguments = (1.0, 3, 2, None, None, None, None, None, None, 0, 0, 1.0, None, None, False, True, False)
    torch.library.opcheck(torch.ops.illada.sample_tokens.default, (logits, *arguments))
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(33, 8, generator=generator)
    rows = torch.tensor([1, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.illada.linear_sample_tokens.default, (hidden, weight, rows, *arguments))
    tokens, rows, cu_rows, sample = candidates(generator)
    fields = (sample.token, sample.confidence, sample.entropy)
    torch.library.opcheck(torch.ops.illada.remask.default, (tokens, rows, cu_rows, *fields, 3, 0.4, None, 5, 1, None))


def test_step_compiles_in_one_graph(generator):
    def step(tokens, hidden, weight, rows, cu_rows):
        sample = illada.linear_sample_tokens(hidden, weight, rows=rows, temperature=0.5, seed=2)
        return illada.remask(tokens, rows, cu_rows, sample, quota=2, mask_id=5)

    tokens, rows, cu_rows, _ = candidates(generator)
    hidden = torch.randn(len(tokens), 8, generator=generator)
    weight = torch.randn(40, 8, generator=generator)
    want_tokens, got_tokens = tokens.clone(), tokens.clone()
    want = step(want_tokens, hidden, weight, rows, cu_rows)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(got_tokens, hidden, weight, rows, cu_rows)
    assert got.tolist() == want.tolist() and torch.equal(got_tokens, want_tokens)


def test_philox_known_answers():
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, want in cases:
        got = philox4x32(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32))
        assert got.dtype == np.uint32 and got.tolist() == want


def test_errors(generator):
    logits = torch.randn(3, 9, generator=generator)
    sample, linear = illada.sample_tokens, illada.linear_sample_tokens
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    ids, values = torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    wrong = [
        (ValueError, r"logits must have shape \[N, V\], got \[3\]", lambda: sample(logits[:, 0])),
        (TypeError, "logits must be float32, bfloat16, got float16", lambda: sample(logits.half())),
        (ValueError, "last dimension of logits must be contiguous", lambda: sample(logits.T)),
        (ValueError, "vocabulary is empty", lambda: sample(logits[:, :0])),
        (ValueError, "temperature must be finite and >= 0, got -1", lambda: sample(logits, temperature=-1.0)),
        (ValueError, "got inf in row 2", lambda: sample(logits, temperature=torch.tensor([0, 1, torch.inf]))),
        (TypeError, "temperature must be float32, got int64", lambda: sample(logits, temperature=torch.ones(3).long())),
        (ValueError, r"seed must have shape \[3\], got \[2\]", lambda: sample(logits, seed=torch.ones(2).long())),
        (ValueError, "seed must fit 64 bits", lambda: sample(logits, seed=2**63)),
        (ValueError, "step must fit 32 bits, got 2147483648", lambda: sample(logits, step=2**31)),
        (TypeError, "seed must be an integer or a tensor of 3, got 1.5", lambda: sample(logits, seed=1.5)),
        (TypeError, "step must be an integer or a tensor of 3, got 2.0", lambda: sample(logits, step=2.0)),
        (TypeError, "row_ids must be int64, got int32", lambda: sample(logits, row_ids=torch.ones(3, dtype=torch.int32))),
        (ValueError, r"row_ids must be in \[0, 2\^32\), got -1 in row 0", lambda: sample(logits, row_ids=torch.full((3,), -1))),
        (ValueError, "measure must be one of probability, margin, entropy, random, got 'p'", lambda: sample(logits, measure="p")),
        (ValueError, "extras may hold 'entropy' and 'margin', got 'x'", lambda: sample(logits, extras=("x",))),
        (TypeError, "logit_bias ids must be int32", lambda: sample(logits, logit_bias=(ids.long(), values))),
        (ValueError, r"logit_bias values must have shape \[2\]", lambda: sample(logits, logit_bias=(ids, values[:1]))),
        (ValueError, "logit_bias id 9 in row 0 is outside", lambda: sample(logits, logit_bias=(ids + 9, values))),
        (TypeError, "weight must be float32", lambda: linear(hidden, weight.bfloat16())),
        (TypeError, "rows must be int32, int64, got float32", lambda: linear(hidden, weight, rows=torch.ones(1))),
        (ValueError, r"rows must be in \[0, 4\), got 1 .. 4", lambda: linear(hidden, weight, rows=torch.tensor([1, 4], dtype=torch.int32))),
    ]  # fmt: skip
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()


def test_remask_errors(generator):
    tokens, rows, cu_rows, drawn = candidates(generator)
    no_entropy = drawn._replace(entropy=None)

    def call(tokens=tokens, rows=rows, cu_rows=cu_rows, sample=drawn, mask_id=5, **rule):
        return lambda: illada.remask(tokens, rows, cu_rows, sample, mask_id=mask_id, **(rule or {"quota": 1}))

    before = tokens.clone()
    wrong = [
        (ValueError, "give exactly one of quota, threshold, factor, entropy_bound, got none", call(quota=None)),
        (ValueError, "got quota, factor", call(quota=1, factor=1.0)),
        (ValueError, "quota must be a number", call(quota=-1)),
        (ValueError, "threshold must be a number", call(threshold=float("nan"))),
        (TypeError, "quota must be int32, got int64", call(quota=torch.ones(5).long())),
        (ValueError, r"threshold must have shape \[5\], got \[4\]", call(threshold=torch.ones(4))),
        (ValueError, "entropy_bound needs sample.entropy", call(sample=no_entropy, entropy_bound=1.0)),
        (ValueError, "min_commit must be >= 0, got -1", call(threshold=1.0, min_commit=-1)),
        (TypeError, "tokens must be int64, int32, got float32", call(tokens=tokens.float())),
        (ValueError, r"sample.token must have shape \[26\]", call(rows=rows[:-1])),
        (TypeError, "sample.token must be int64, got int32", call(sample=drawn._replace(token=drawn.token.int()))),
        (
            TypeError,
            "sample.confidence must be float32",
            call(sample=drawn._replace(confidence=drawn.confidence.double())),
        ),
        (
            ValueError,
            r"sample.entropy must have shape \[27\]",
            call(sample=drawn._replace(entropy=drawn.entropy[1:]), entropy_bound=1.0),
        ),
        (ValueError, r"cu_rows must run from 0 to 27, got 0 to 26", call(cu_rows=cu_rows.clamp(max=26))),
        (ValueError, "cu_rows must ascend", call(cu_rows=torch.tensor([0, 9, 3, 27], dtype=torch.int32))),
        (ValueError, r"outside of \[0, 54\)", call(rows=rows + 60)),
    ]
    for error, match, function in wrong:
        with pytest.raises(error, match=match):
            function()
    assert torch.equal(tokens, before)
