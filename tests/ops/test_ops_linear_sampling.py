"""linear_sample_tokens on every device against float64 of its inputs, whatever precision its logits have inside; errors.

The fused kernel's plans and row tiles are in tests/cuda/test_linear_sample_tokens.py.
"""

import pytest
import torch
from sampling_cases import ALL, check_linear, make_head
from torch.utils.flop_counter import FlopCounterMode

import illada
from illada.ops import reference

ON_CPU, ON_CUDA = pytest.mark.only("cpu"), pytest.mark.only("cuda")
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=ON_CUDA), pytest.param(torch.float32, marks=ON_CPU)]
CASES = [  # T, N (None: no rows given), C, V: what the row is for
    (1, None, 64, 1000),  # one row
    (9, 3, 64, 155136),  # iLLaDA's vocabulary
    (40, 32, 72, 4096),  # a width that is a multiple of 8 alone
    (64, None, 512, 1001),  # an odd vocabulary
    (70, 65, 100, 1000),  # a width that is not a multiple of 8
    (129, None, 64, 4096),  # one row more than a tile
    (400, 300, 512, 1000),
    (5, 300, 64, 999),  # rows taken many times
    (3, 1, 8, 1),  # one word
]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case, dtype, temperature, device, generator):
    hidden, weight, rows = make_head(case, dtype, device, generator)
    for extras in ((), ALL):
        check_linear(hidden, weight, rows, temperature=temperature, seed=2**33 + 1, step=4, extras=extras)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("case", [(20, 9, 64, 4096), (200, 130, 72, 1000)], ids=str)
def test_measures_and_arguments_of_each_row(case, measure, device, generator):
    hidden, weight, rows = make_head(case, torch.bfloat16, device, generator)
    count = len(rows)
    keywords = {
        "temperature": torch.rand(count, generator=generator).round(decimals=1),
        "seed": torch.randint(-(2**62), 2**62, (count,), generator=generator),
        "step": torch.randint(0, 2**31 - 1, (count,), generator=generator, dtype=torch.int32),
        "row_ids": torch.randint(0, 2**32, (count,), generator=generator),
    }
    check_linear(hidden, weight, rows, measure=measure, **{name: t.to(device) for name, t in keywords.items()})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", [(20, 9, 64, 4096), (200, 130, 72, 1001)], ids=str)
def test_logit_bias(case, temperature, device, generator):
    hidden, weight, rows = make_head(case, torch.bfloat16, device, generator)
    count, vocab = len(rows), len(weight)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:5] for _ in range(count)]).int()
    ids[::2, 1] = -1
    values = torch.randn(count, 5, generator=generator) * 4
    for bias in ((ids, values), (ids[1], values[1])):
        check_linear(
            hidden, weight, rows, temperature=temperature, seed=1, logit_bias=tuple(t.to(device) for t in bias)
        )
    free = illada.linear_sample_tokens(hidden, weight, rows=rows, temperature=temperature, seed=1)
    forbidden = free.token[:, None].int()
    minus = torch.full(forbidden.shape, -torch.inf, device=device)
    other = illada.linear_sample_tokens(
        hidden, weight, rows=rows, temperature=temperature, seed=1, logit_bias=(forbidden, minus)
    )
    assert (other.token != free.token).all() and other.confidence.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(300, 7, 64, 4096), (300, 300, 512, 1000), (300, 129, 100, 999)], ids=str)
def test_clear_maxima_are_found(case, dtype, device, generator):
    # Each hidden row is the weight row of its answer, so the answer's logit stands far out; both ends of V are among them.
    _, weight, rows = make_head(case, dtype, device, generator)
    answers = torch.randint(len(weight), (300,), generator=generator)
    answers[rows[0].item()], answers[rows[-1].item()] = 0, len(weight) - 1
    hidden = weight[answers.to(device)]
    got = illada.linear_sample_tokens(hidden, weight, rows=rows)
    assert torch.equal(got.token, answers.to(device)[rows.long()])
    assert (got.confidence > 0.99).all()


def test_random_measure_and_ties(device):
    hidden, weight = torch.zeros(4, 64, dtype=torch.bfloat16, device=device), torch.zeros(3000, 64, dtype=torch.bfloat16, device=device)  # fmt: skip
    greedy = illada.linear_sample_tokens(hidden, weight, measure="random", seed=3, step=1, extras=ALL)
    want = reference.sample_tokens(torch.zeros(4, 3000), measure="random", seed=3, step=1)
    assert not greedy.token.any() and not greedy.margin.any()  # all equal: the lowest id
    assert torch.equal(greedy.confidence.cpu().double(), want.confidence)
    drawn = illada.linear_sample_tokens(hidden, weight, temperature=1.0, seed=3, step=1)
    assert torch.equal(drawn.token.cpu(), reference.sample_tokens(torch.zeros(4, 3000), temperature=1.0, seed=3, step=1).token)  # fmt: skip


def test_a_row_depends_on_nothing_else(device, generator):
    hidden, weight, _ = make_head((300, None, 64, 4096), torch.bfloat16, device, generator)
    ids = torch.arange(300, device=device)
    keywords = {"temperature": 0.5, "seed": 8}
    whole = illada.linear_sample_tokens(hidden, weight, row_ids=ids, **keywords)
    for n in (0, 63, 64, 128, 299):
        rows = torch.tensor([n], dtype=torch.int32, device=device)
        alone = illada.linear_sample_tokens(hidden, weight, rows=rows, row_ids=ids[n : n + 1], **keywords)
        assert int(alone.token) == int(whole.token[n])
        # The fused kernel's sums are in another order; elsewhere the logits are rounded to 16 bits.
        fused = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        rtol = 1e-5 if fused else 2e-2
        torch.testing.assert_close(alone.confidence, whole.confidence[n : n + 1], rtol=rtol, atol=0)


@pytest.mark.parametrize("place", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_have_no_confidence(value, place, device, generator):
    hidden, weight, _ = make_head((70, None, 64, 1000), torch.bfloat16, device, generator)
    hidden[:, 0] = hidden[:, 0].abs() + 0.1
    (hidden if place == "hidden" else weight)[66, 0] = value
    got = illada.linear_sample_tokens(hidden, weight)
    broken = torch.full((70,), place == "weight")
    broken[66] = True
    assert torch.equal(got.confidence.cpu() == -torch.inf, broken)


def test_nothing_to_sample(device, generator):
    hidden, weight, _ = make_head((4, None, 64, 1000), torch.bfloat16, device, generator)
    none = torch.empty(0, dtype=torch.int32, device=device)
    for got in (
        illada.linear_sample_tokens(hidden, weight, rows=none, extras=ALL),
        illada.linear_sample_tokens(hidden[:0], weight, temperature=1.0, extras=ALL),
    ):
        assert all(field.shape == (0,) and field.device.type == device.type for field in got)


def test_float32(device, generator):
    hidden, weight, rows = make_head((20, 9, 64, 1000), torch.float32, device, generator)
    for temperature in (0.0, 1.0):
        check_linear(hidden, weight, rows, temperature=temperature, seed=2, extras=ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_sample_tokens_of_the_logits_on_a_cpu(dtype, generator):
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


def test_errors(device):
    here, other = ("cpu", "meta") if device.type == "cpu" else ("cuda:0", "cpu")
    hidden, weight = torch.zeros(4, 8, device=device), torch.zeros(9, 8, device=device)
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    wrong = [
        (ValueError, f"weight is on {other}, but hidden is on {here}", (hidden, weight.to(other)), {}),
        (ValueError, f"rows is on {other}, but hidden is on {here}", (hidden, weight), {"rows": rows.to(other)}),
        (TypeError, "weight must be float32, got bfloat16", (hidden, weight.bfloat16()), {}),
        (TypeError, "hidden must be float32, bfloat16", (hidden.double(), weight.double()), {}),
        (TypeError, "rows must be int32, int64, got float32", (hidden, weight), {"rows": rows.float()}),
        (ValueError, r"weight must have shape \[V, 8\]", (hidden, weight[:, :7]), {}),
        (ValueError, r"seed must have shape \[2\]", (hidden, weight), {"rows": rows, "seed": rows.long().repeat(2)}),
    ]
    if device.type == "cpu":  # which reads values
        out_of_range = {"rows": torch.tensor([1, 4], dtype=torch.int32)}
        wrong.append((ValueError, r"rows must be in \[0, 4\), got 1 .. 4", (hidden, weight), out_of_range))
    else:
        wrong.append((TypeError, "hidden must be float32, bfloat16, float16", (hidden.double(), weight.double()), {}))
    for error, message, arguments, keywords in wrong:
        with pytest.raises(error, match=message):
            illada.linear_sample_tokens(*arguments, **keywords)
