"""sample_tokens on every device against its specification in float64; noise, splits of a row, ties, bias, layouts, errors."""

import numpy as np
import pytest
import torch
from sample_filters import to_host
from sampling_cases import ALL, assert_same, both, make_rows, on
from torch.utils.flop_counter import FlopCounterMode

import illada
from illada.ops import raw, reference
from illada.ops.op_types import TokenSample
from illada.philox import philox4x32
from illada.testing import assert_close_like, plain_sample

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.only("cuda"))]
CASES = [  # N, V, spread: what the row is for
    (1, 1, 1.0),  # one word: p = 1, margin 1
    (3, 7, 1.0),  # less than a vector
    pytest.param((5, 1025, 4.0), marks=pytest.mark.only("cpu")),  # a block of the CPU's row loop and one more
    (129, 257, 4.0),  # many short rows, one id in the last vector
    (32, 4096, 2.0),  # two vocab tiles per row
    (3, 8193, 1.0),  # one id in the last vocab tile
    (1, 126464, 10.0),  # LLaDA, peaked
    (3, 155136, 2.0),  # iLLaDA
]

# Positions at the borders of a row's parts: neighbours, vectors of 8, warps of 32 vectors, blocks, vocab tiles.
EDGES = [0, 1, 7, 8, 255, 256, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384, 39998, 39999]

# row_ids of seed 5, step 0 with which one of 63 ids of probability 1e-6 wins against id 0, and with which it is 1.02 to
# 3.9 times as far from winning as it may be. Of 2^20 row_ids, 78 win; 66 are expected.
WINNERS = [1024673, 262294, 599614, 339298, 158922, 196989, 545369, 48430, 600772, 614658, 335171, 162432]
LOSERS = [255614, 694606, 617346, 137954, 483519, 572056, 597120, 897601, 671314, 161420, 337508, 1608]

# Keys (row_id, id) of seed 1, step 0 whose upper 32 bits are 0 or 1, found by trying all 2^32 row_ids: u < 2^-31.
SMALLEST = [(642646658, 0), (2447846268, 3), (2955754503, 0), (3358487240, 0), (4139135511, 2), (285470608, 0)]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, dtype, temperature, device, generator):
    logits = make_rows(case, dtype, device, generator)
    for extras in ((), ALL):  # two kernels
        got, want = both(logits, temperature=temperature, seed=2**40 + 3, step=5, extras=extras)
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


def test_noise_depends_on_its_key_alone(device, generator):
    logits = make_rows((1, 3000, 0.1), torch.bfloat16, device, generator)
    ids = torch.tensor([4, 4, 5, 4, 6, 4, 7, 4], device=device)
    tokens = illada.sample_tokens(logits.expand(8, -1), temperature=1.0, seed=9, step=2, row_ids=ids).token
    alone = illada.sample_tokens(logits, temperature=1.0, seed=9, step=2, row_ids=ids[:1]).token
    assert set(tokens[ids == 4].tolist()) == {int(alone)}
    others = set(tokens.tolist())
    for seed, step in ((8, 2), (9, 3), (9 + 2**32, 2)):
        again = illada.sample_tokens(logits, temperature=1.0, seed=seed, step=step, row_ids=ids[:1])
        others.add(int(again.token))
    assert len(others) == 7  # nothing repeats among 3000 almost equal tokens


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


def test_tokens_of_probability_1e_6_win_when_their_noise_says_so(device):
    logits = torch.zeros(1, 64)
    logits[0, 0] = float(np.log((1 - 63e-6) / 1e-6))
    row_ids = torch.tensor(WINNERS + LOSERS, device=device)
    got, want = both(logits.to(device).expand(len(row_ids), 64), temperature=1.0, seed=5, row_ids=row_ids)
    assert torch.equal(got.token, want.token)
    assert (got.token[: len(WINNERS)] > 0).all() and not got.token[len(WINNERS) :].any()


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
    assert illada.sample_tokens(logits, logit_bias=biases[0]).token[0] != best
    one_each = bias(device, [[5], [vocab - 1], *[[-1]] * (count - 2)], [[40.0]] * count)
    assert illada.sample_tokens(logits, logit_bias=one_each).token[:2].tolist() == [5, vocab - 1]


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
    size = raw.sample_tokens_workspace(*logits.shape, logits.device)
    assert device.type == "cuda" or size == 0
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
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
    assert all(field.shape == (0,) and field.device.type == device.type for field in got)


# ------------------------------------------------------------------------------------------------ on the CPU alone


def test_a_step_may_be_negative_in_both_forms(generator):
    logits = make_rows((2, 3000, 0.1), torch.float32, CPU, generator)
    keywords = {"temperature": 1.0, "seed": 3, "measure": "random"}
    numbers = [illada.sample_tokens(logits, step=s, **keywords) for s in (-1, 2**31 - 1, -(2**31))]
    rows = [illada.sample_tokens(logits, step=torch.full((2,), s).int(), **keywords) for s in (-1, 2**31 - 1, -(2**31))]
    assert len({tuple(sample.token.tolist()) for sample in numbers}) == 3
    for a, b in zip(numbers, rows, strict=True):
        assert torch.equal(a.token, b.token) and torch.equal(a.confidence, b.confidence)
    want = reference.sample_tokens(logits, step=-1, **keywords)
    assert torch.equal(numbers[0].token, want.token) and torch.equal(numbers[0].confidence.double(), want.confidence)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def test_arguments_of_each_row_may_be_strided(generator):
    logits = make_rows((5, 3000, 0.1), torch.float32, CPU, generator)
    seeds, every_other = torch.arange(5), torch.arange(10)[::2]
    want = illada.sample_tokens(logits, temperature=1.0, seed=seeds * 2, row_ids=seeds * 2)
    got = illada.sample_tokens(logits, temperature=1.0, seed=every_other, row_ids=every_other)
    assert torch.equal(got.token, want.token)


def test_registration(generator):
    logits = torch.randn(4, 33, generator=generator)
    arguments = (1.0, 3, 2, None, None, None, None, None, None, 0, 0, 1.0, None, None, False, True, False)
    torch.library.opcheck(torch.ops.illada.sample_tokens.default, (logits, *arguments))
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(33, 8, generator=generator)
    rows = torch.tensor([1, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.illada.linear_sample_tokens.default, (hidden, weight, rows, *arguments))


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
