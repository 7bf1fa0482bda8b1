"""sample_tokens on the device against its specification in float64; noise, splits of a row, ties, bias, layouts."""

import numpy as np
import pytest
import torch
from sample_filters import to_host

import illada
from illada.ops import raw, reference
from illada.ops.types import TokenSample
from illada.ops.variants import use_variants
from illada.testing import assert_close_like, plain_sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("entropy", "margin")
CASES = [  # N, V, spread: what the row is for
    (1, 1, 1.0),  # one word: p = 1, margin 1
    (3, 7, 1.0),  # less than a vector
    (129, 257, 4.0),  # many short rows, one id in the last vector
    (32, 4096, 2.0),  # two vocab tiles per row
    (3, 8193, 1.0),  # one id in the last vocab tile
    (1, 126464, 10.0),  # LLaDA, peaked
    (3, 155136, 2.0),  # iLLaDA
]
STEPS_CASES = [
    (1060, 8999, 2.0),
    (140, 70000, 2.0),
]  # ranges so long that a thread takes several steps: one and many vocab tiles


def make_rows(case, dtype, device, generator, layout="strided"):
    """Return logits in the layout: packed, strided and misaligned with NaNs around every row, or one row for all."""
    count, vocab, spread = case
    values = (torch.randn(count, vocab, generator=generator) * spread).to(dtype)
    if layout == "packed":
        return values.to(device)
    if layout == "expanded":
        return values[:1].to(device).expand(count, vocab)
    wide = torch.full((count, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = values
    return wide.to(device)[:, 1 : vocab + 1]


def on(device, *tensors):
    return [t.to(device) for t in tensors]


def both(logits, **keywords):
    """The op and the reference on the same arguments, results on the host."""
    host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    if "logit_bias" in host:
        host["logit_bias"] = tuple(t.cpu() for t in host["logit_bias"])
    return to_host(illada.sample_tokens(logits, **keywords)), reference.sample_tokens(logits.cpu(), **host)


def assert_same(got, want, logits):
    assert got.token.dtype == torch.int64 and torch.equal(got.token, want.token)
    baseline = to_host(plain_sample(logits, want.token.to(logits.device)))
    for name, g, w, b in zip(got._fields[1:], got[1:], want[1:], baseline[1:], strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            assert_close_like(g, w, b, factor=2.0)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, dtype, temperature, device, generator):
    logits = make_rows(case, dtype, device, generator)
    for extras in ((), ALL):  # two kernels
        got, want = both(logits, temperature=temperature, seed=2**40 + 3, step=5, extras=extras)
        assert_same(got, want, logits)


@pytest.mark.parametrize("extras", [(), ALL], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", STEPS_CASES)
def test_several_steps_a_thread(case, temperature, extras, device, generator):
    logits = make_rows(case, torch.bfloat16, device, generator, "packed")
    got, want = both(logits, temperature=temperature, seed=3, extras=extras)
    assert_same(got, want, logits)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(2, 2**20, 2.0), (40, 2**18 + 3, 5.0), (1, 2**22 - 1, 1.0)])
def test_large_vocabularies(case, dtype, temperature, device, generator):
    logits = make_rows(case, dtype, device, generator)
    got, want = both(logits, temperature=temperature, seed=3, extras=ALL)
    assert_same(got, want, logits)


@pytest.mark.parametrize("layout", ["packed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(5, 4000, 1.0), (4, 8200, 1.0), (6, 1003, 1.0)])
def test_layouts(case, dtype, layout, device, generator):
    logits = make_rows(case, dtype, device, generator, layout)
    got, want = both(logits, temperature=0.7, seed=6, extras=ALL)
    assert_same(got, want, logits)


@pytest.mark.parametrize("row_stride", [8, 12, 4104])
def test_rows_may_overlap_or_lie_apart(row_stride, device, generator):
    memory = torch.randn(9 * 4104, generator=generator).bfloat16().to(device)
    logits = memory.as_strided((9, 3001), (row_stride, 1), 3)
    got, want = both(logits, temperature=1.0, seed=6)
    assert_same(got, want, logits)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy", "random"])
@pytest.mark.parametrize("case", [(9, 700, 2.0), (9, 9000, 0.5)])
def test_measures_and_arguments_of_each_row(case, measure, device, generator):
    logits = make_rows(case, torch.float32, device, generator)
    temperature = torch.tensor([0.0, 1.0, 0.5, 1e-30, 1.0, 1e-3, 100.0, 1e30, 0.0])
    seed = torch.tensor([1, 2, -3, 2**62, -(2**63), 2**63 - 1, 0, -1, 2**32])
    step = torch.tensor([0, 1, 2, 3, 2**31 - 1, 0, 5, 2**31 - 1, 7], dtype=torch.int32)
    row_ids = torch.tensor([0, 9, 2**32 - 1, 4, 3, 2, 2**31, 0, 0])
    temperature, seed, step, row_ids = on(device, temperature, seed, step, row_ids)
    got, want = both(logits, temperature=temperature, seed=seed, step=step, row_ids=row_ids, measure=measure)
    assert torch.equal(got.token, want.token)
    assert (got.entropy is not None) == (measure == "entropy") and (got.margin is not None) == (measure == "margin")
    if measure == "random":
        assert torch.equal(got.confidence.double(), want.confidence)
        assert_close_like(got.logprob, want.logprob, plain_sample(logits, got.token.to(device)).logprob.cpu())
    else:
        baseline = plain_sample(logits, got.token.to(device), measure)
        assert_close_like(got.confidence, want.confidence, baseline.confidence.cpu())


def test_a_number_is_the_same_as_a_tensor_of_it(device, generator):
    logits = make_rows((5, 3000, 0.1), torch.bfloat16, device, generator)
    numbers = illada.sample_tokens(logits, temperature=0.5, seed=-7, step=9)
    seed, step = torch.full((5,), -7), torch.full((5,), 9, dtype=torch.int32)
    tensors = {"temperature": torch.full((5,), 0.5), "seed": seed, "step": step, "row_ids": torch.arange(5)}
    rows = illada.sample_tokens(logits, **{name: t.to(device) for name, t in tensors.items()})
    for a, b in zip(numbers[:3], rows[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tokens_as_on_a_cpu(dtype, temperature, device, generator):
    host = make_rows((20, 5003, 0.5), dtype, torch.device("cpu"), generator)
    keywords = {"temperature": temperature, "seed": 12, "step": 3}
    want, got = illada.sample_tokens(host, **keywords), illada.sample_tokens(host.to(device), **keywords)
    assert torch.equal(got.token.cpu(), want.token)
    torch.testing.assert_close(got.confidence.cpu(), want.confidence, rtol=2e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------ what a result depends on


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [2, 40, 600, 1100])  # the same rows with ever fewer CTAs per row
def test_batch_and_split_change_nothing(count, temperature, device, generator):
    rows = make_rows((2, 20001, 3.0), torch.bfloat16, device, generator)
    ids = torch.tensor([11, 77], device=device)
    keywords = {"temperature": temperature, "seed": 3, "step": 8, "extras": ALL}
    alone = to_host(illada.sample_tokens(rows[:1], row_ids=ids[:1], **keywords))
    place = torch.arange(count, device=device) % 2
    many = to_host(illada.sample_tokens(rows[place], row_ids=ids[place], **keywords))
    for name, field, single in zip(many._fields, many, alone, strict=True):
        assert (field[::2] == single).all(), name  # bit for bit


@pytest.mark.parametrize("loads", ["shared_64k", "shared_128k"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [(3, 8, 1.0), (5, 8200, 1.0), (2, 60000, 3.0), (140, 40968, 3.0)], ids=str)
def test_how_logits_are_loaded_changes_nothing(case, dtype, temperature, loads, device, generator):
    # One vector; more than one vocab tile; one CTA per vocab tile; one CTA per row, with more steps than have room.
    logits = make_rows((min(case[0], 5), *case[1:]), dtype, device, generator)
    logits = logits[torch.arange(case[0], device=device) % len(logits)]
    bias = (torch.tensor([0, 7, case[1] - 1], dtype=torch.int32), torch.tensor([1.0, -torch.inf, 4.0]))
    for logit_bias in (None, tuple(t.to(device) for t in bias)):
        keywords = {"temperature": temperature, "seed": 3, "extras": ALL, "logit_bias": logit_bias}
        want = to_host(illada.sample_tokens(logits, **keywords))
        with use_variants(sample_tokens=loads):
            got = to_host(illada.sample_tokens(logits, **keywords))
        for name, field, other in zip(want._fields, got, want, strict=True):
            assert torch.equal(field, other), name  # bit for bit


@pytest.mark.parametrize("loads", ["shared_64k", "shared_128k"])
def test_rows_that_cannot_go_through_shared_memory(loads, device, generator):
    # Of an odd length; of 32-bit elements.
    odd = make_rows((3, 1001, 1.0), torch.bfloat16, device, generator)
    single = make_rows((3, 4096, 1.0), torch.float32, device, generator)
    for logits in (odd, single):
        want = to_host(illada.sample_tokens(logits, temperature=1.0, seed=3))
        with use_variants(sample_tokens=loads):
            got = to_host(illada.sample_tokens(logits, temperature=1.0, seed=3))
        assert torch.equal(got.token, want.token) and torch.equal(got.confidence, want.confidence)


def test_noise_depends_on_its_key_alone(device, generator):
    logits = make_rows((1, 3000, 0.1), torch.bfloat16, device, generator)
    ids = torch.tensor([4, 4, 5, 4, 6, 4, 7, 4], device=device)
    tokens = illada.sample_tokens(logits.expand(8, -1), temperature=1.0, seed=9, step=2, row_ids=ids).token
    assert len(set(tokens[ids == 4].tolist())) == 1
    others = set(tokens.tolist())
    for seed, step in ((8, 2), (9, 3), (9 + 2**32, 2)):
        again = illada.sample_tokens(logits, temperature=1.0, seed=seed, step=step, row_ids=ids[:1])
        others.add(int(again.token))
    assert len(others) == 7  # nothing repeats among 3000 almost equal tokens


# --------------------------------------------------------------------------------------------------- distribution


def test_distribution_is_the_softmax(device, generator):
    # 100,000 draws over 64 ids, chi-square with 63 degrees of freedom, and a 65th id of probability 1e-4: Poisson(10).
    logits = torch.randn(64, generator=generator) * 1.5
    rare = 2 * (logits.double() / 2).logsumexp(0) + 2 * np.log(1e-4 / (1 - 1e-4))
    row = torch.cat([logits, rare.float()[None]]).to(device)
    tokens = illada.sample_tokens(row.expand(100_000, 65), temperature=2.0, seed=11).token.cpu()
    observed = torch.bincount(tokens, minlength=65)
    assert 1 <= int(observed[64]) <= 25
    expected = (logits.double() / 2.0).softmax(0) * observed[:64].sum()
    chi_square = float(((observed[:64] - expected) ** 2 / expected).sum())
    assert 30 < chi_square < 110  # 1e-4 .. 1 - 1e-4 quantiles are 30 and 117; a fit too good is a fault as well


# row_ids of seed 5, step 0 with which one of 63 ids of probability 1e-6 wins against id 0, and with which it is 1.02 to
# 3.9 times as far from winning as it may be. Of 2^20 row_ids, 78 win; 66 are expected.
WINNERS = [1024673, 262294, 599614, 339298, 158922, 196989, 545369, 48430, 600772, 614658, 335171, 162432]
LOSERS = [255614, 694606, 617346, 137954, 483519, 572056, 597120, 897601, 671314, 161420, 337508, 1608]


def test_tokens_of_probability_1e_6_win_when_their_noise_says_so(device):
    logits = torch.zeros(1, 64)
    logits[0, 0] = float(np.log((1 - 63e-6) / 1e-6))
    row_ids = torch.tensor(WINNERS + LOSERS, device=device)
    got, want = both(logits.to(device).expand(len(row_ids), 64), temperature=1.0, seed=5, row_ids=row_ids)
    assert torch.equal(got.token, want.token)
    assert (got.token[: len(WINNERS)] > 0).all() and not got.token[len(WINNERS) :].any()


# Keys (row_id, id) of seed 1, step 0 whose upper 32 bits are 0 or 1, found by trying all 2^32 row_ids: u < 2^-31.
SMALLEST = [(642646658, 0), (2447846268, 3), (2955754503, 0), (3358487240, 0), (4139135511, 2), (285470608, 0)]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("row_id,token", SMALLEST)
def test_uniforms_below_2_to_the_minus_31_are_exact(row_id, token, temperature, device):
    # The token gets the logit with which its noise just wins, and just loses, against a token with logit 0.
    gumbel = -np.log(-np.log1p(-reference.uniform64(1, row_id, 0, 2000)))
    assert gumbel[token] > 31 * np.log(2)
    rival = 256 + int(gumbel[256:].argmax())  # in another warp, and so strong that the token is nearly given up
    logits = torch.full((2, 2000), -torch.inf)
    logits[:, rival] = 0.0
    margin = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    logits[:, token] = (float(temperature * (gumbel[rival] - gumbel[token])) + margin).float()
    row_ids = torch.tensor([row_id, row_id], device=device)
    got = illada.sample_tokens(logits.to(device), temperature=temperature, seed=1, row_ids=row_ids)
    assert got.token.tolist() == [token, rival]


# ------------------------------------------------------------------------------------------- ties and broken rows


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_nan_and_infinities(dtype, temperature, device):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, 0.0],  # a tie: lowest id
            [nan, 3.0, 1.0, 0.0],
            [1.0, inf, 1.0, 0.0],
            [1.0, 0.0, inf, inf],
            [-inf, -inf, -inf, -inf],
            [-inf, 2.0, -inf, -inf],  # one possible token
            [nan, nan, nan, nan],
            [nan, inf, -inf, 0.0],
        ],
        dtype=dtype,
        device=device,
    )
    got, want = both(logits, temperature=temperature, seed=1, extras=ALL)
    assert torch.equal(got.token, want.token)
    broken = torch.tensor([False, True, True, True, True, False, True, True])
    assert (got.confidence[broken] == -inf).all() and (got.logprob[broken] == -inf).all()
    assert got.confidence[~broken].isfinite().all()
    assert got.confidence[5] == 1 and abs(got.entropy[5]) < 1e-30 and got.margin[5] == 1
    if temperature == 0:
        assert got.token.tolist() == [1, 1, 1, 2, 0, 1, 0, 1] and got.margin[0] == 0


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy", "random"])
def test_no_measure_gives_a_broken_row_a_confidence(measure, device):
    logits = torch.zeros(3, 20000, device=device)
    logits[0, 19999], logits[1, 12345], logits[2, :] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 1.0):
        got = illada.sample_tokens(logits, temperature=temperature, measure=measure)
        assert got.confidence.tolist() == [-torch.inf] * 3 == got.logprob.tolist()
        assert got.token[1:].tolist() == [12345, 0]


# Positions at the borders of a row's parts: neighbours, vectors of 8, warps of 32 vectors, blocks, vocab tiles.
EDGES = [0, 1, 7, 8, 255, 256, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384, 39998, 39999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [5.0, torch.inf])
def test_ties_anywhere_go_to_the_lowest_id(value, dtype, device, generator):
    first, second = torch.combinations(torch.tensor(EDGES)).T
    logits = torch.rand(len(first), 40000, generator=generator).to(dtype)
    row = torch.arange(len(first))
    logits[row, first] = logits[row, second] = value
    for temperature in (0.0, 1.0) if value == torch.inf else (0.0,):
        got = illada.sample_tokens(logits.to(device), temperature=temperature, seed=3)
        assert torch.equal(got.token.cpu(), first)


@pytest.mark.parametrize("case", [(1, 40000), (600, 3000), (1060, 9000)])
def test_all_logits_equal(case, device):
    for value in (0.0, -3.0):
        logits = torch.full((1, case[1]), value, device=device).expand(case)
        got = illada.sample_tokens(logits, extras=ALL)
        assert not got.token.any() and not got.margin.any()
        torch.testing.assert_close(got.entropy, torch.full_like(got.entropy, float(np.log(case[1]))), rtol=1e-6, atol=0)
    assert int(illada.sample_tokens(torch.tensor([[-0.0, 0.0, -0.0]], device=device)).token) == 0


# ------------------------------------------------------------------------------------------------------ logit_bias


def bias(device, ids, values):
    return torch.tensor(ids, dtype=torch.int32, device=device), torch.tensor(values, device=device)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(3, 2101, 1.0), (2, 20003, 1.0), (150, 61, 1.0)])
def test_logit_bias(case, dtype, temperature, device, generator):
    count, vocab, _ = case
    logits = make_rows(case, dtype, device, generator)
    best = int(logits[0].argmax())
    of_each_row = torch.randint(-1, vocab, (count, 5), generator=generator, dtype=torch.int32)
    of_each_row[0] = torch.tensor([vocab - 1, -1, 0, vocab - 1, 0])  # duplicates add up
    values = torch.randn(count, 5, generator=generator) * 4
    biases = [
        bias(device, [best, -1], [-torch.inf, 7.0]),
        bias(device, [3, 3, -1, 3, vocab - 1], [2.0, 2.0, torch.inf, 2.5, 6.0]),
        tuple(on(device, of_each_row, values)),
    ]
    for one in biases:
        got, want = both(logits, temperature=temperature, seed=4, logit_bias=one, extras=ALL)
        assert torch.equal(got.token, want.token)
        for g, w in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [400, 30000])
def test_forbidden_ids_are_never_sampled(vocab, temperature, device, generator):
    logits = make_rows((4, vocab, 3.0), torch.bfloat16, device, generator)
    forbidden = logits.topk(300).indices.int()  # of each row its 300 largest
    got, want = both(
        logits, temperature=temperature, seed=4, logit_bias=(forbidden, torch.full_like(forbidden, -torch.inf, dtype=torch.float32))
    )  # fmt: skip
    assert torch.equal(got.token, want.token) and not (got.token[:, None] == forbidden.cpu()).any()
    torch.testing.assert_close(got.confidence.double(), want.confidence, rtol=1e-5, atol=1e-7)
    everything = torch.arange(400, dtype=torch.int32, device=device)
    all_minus = torch.full((400,), -torch.inf, device=device)
    none_left = illada.sample_tokens(logits[:, :400], temperature=temperature, logit_bias=(everything, all_minus))
    assert none_left.confidence.tolist() == [-torch.inf] * 4 and not none_left.token.any()


@pytest.mark.parametrize("value", [9.0, -torch.inf, torch.inf, torch.nan])
def test_biased_ids_outside_of_the_vocabulary_are_skipped(value, device, generator):
    logits = make_rows((2, 2101, 1.0), torch.float32, device, generator)  # the last vector holds 2096 .. 2103
    plain = illada.sample_tokens(logits, logit_bias=bias(device, [2100], [0.5]))
    outside = illada.sample_tokens(
        logits, logit_bias=bias(device, [2100, 2101, 2103, 2**31 - 1, -1], [0.5] + [value] * 4)
    )
    for a, b in zip(plain[:3], outside[:3], strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------- other ways in


def empty_sample(count, device, extras=True):
    fields = [torch.full((count,), -7, device=device)] + [torch.full((count,), -7.0, device=device) for _ in range(4)]
    return TokenSample(*fields[: 5 if extras else 3])


@pytest.mark.parametrize("case", [(3, 20003, 1.0), (140, 99, 1.0)])
def test_raw_is_the_public_function(case, device, generator):
    logits = make_rows(case, torch.bfloat16, device, generator)
    count = len(logits)
    one = bias(device, [5, 7], [1.0, -torch.inf])
    row_ids = torch.arange(count, device=device) * 3
    seeds, steps = torch.arange(count, device=device), torch.arange(count, dtype=torch.int32, device=device)
    temperatures = torch.linspace(0, 2, count, device=device)
    want = illada.sample_tokens(
        logits, temperature=temperatures, seed=seeds, step=steps, row_ids=row_ids, logit_bias=one, measure="margin",
        extras=("entropy",),
    )  # fmt: skip
    workspace = torch.empty(raw.sample_tokens_workspace(*logits.shape, logits.device), dtype=torch.uint8, device=device)
    out = empty_sample(count, device)
    raw.sample_tokens(out, logits, 0.0, 0, 0, temperatures, seeds, steps, row_ids, *one, 1, workspace=workspace)
    for g, w in zip(out, want, strict=True):
        assert torch.equal(g, w)
    small = empty_sample(count, device, extras=False)
    raw.sample_tokens(small, logits, 0.5, 3, workspace=workspace)
    want = illada.sample_tokens(logits, temperature=0.5, seed=3)
    for g, w in zip(small[:3], want[:3], strict=True):
        assert torch.equal(g, w)


def test_no_rows(device):
    got = illada.sample_tokens(torch.empty(0, 50, device=device), temperature=1.0, extras=ALL)
    assert all(field.shape == (0,) and field.is_cuda for field in got)
