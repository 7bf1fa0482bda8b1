"""linear_sample_tokens on the device against float64 of its 16-bit inputs, whatever precision its logits have inside."""

import numpy as np
import pytest
import torch

import illada
from illada.ops import raw, reference
from illada.ops.op_types import TokenSample
from illada.testing import assert_close_like, plain_sample

ALL = ("entropy", "margin")
HALVES = [torch.bfloat16, torch.float16]
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


def make(case, dtype, device, generator):
    """Return hidden and weight, strided with NaNs around every row, and rows in any order."""
    total, count, width, vocab = case

    def strided(rows, scale):
        wide = torch.full((rows + 2, width + 24), torch.nan, dtype=dtype)
        wide[1:-1, 8 : width + 8] = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
        return wide.to(device)[1:-1, 8 : width + 8]

    rows = None if count is None else torch.randint(total, (count,), generator=generator, dtype=torch.int32).to(device)
    return strided(total, 3.0 / width**0.5), strided(vocab, 1.0), rows


def exact_sample(logits, token):
    """The fields of a TokenSample, in the precision of the logits."""
    logprobs = logits.log_softmax(-1)
    logprob, p = logprobs.gather(1, token[:, None])[:, 0], logprobs.exp()
    top2 = p.topk(min(2, p.shape[1]), dim=-1).values
    margin = top2[:, 0] - top2[:, 1] if p.shape[1] > 1 else top2[:, 0]
    return TokenSample(token, logprob.exp(), logprob, -torch.special.xlogy(p, p).sum(-1), margin)


def check(hidden, weight, rows, **keywords):
    """The token's noisy logit is the largest within the rounding of 16-bit logits; the measures are as of plain torch."""
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, **keywords)
    selected = hidden if rows is None else hidden[rows.long()]
    exact = selected.cpu().double() @ weight.cpu().double().T
    plain = (selected @ weight.T).cpu()
    if (bias := keywords.get("logit_bias")) is not None:
        ids, values = (t.cpu().expand(len(exact), t.shape[-1]) for t in bias)
        used = torch.where(ids < 0, 0.0, values)
        exact = exact.scatter_add(1, ids.clamp(min=0).long(), used.double())
        plain = plain.float().scatter_add(1, ids.clamp(min=0).long(), used)
    count, vocab = exact.shape
    noisy = exact.clone()
    numbers = [keywords.get(name, default) for name, default in (("temperature", 0.0), ("seed", 0), ("step", 0))]
    row_ids = keywords.get("row_ids")
    per_row = [torch.as_tensor(a).cpu().expand(count).tolist() for a in numbers]
    per_row.append((torch.arange(count) if row_ids is None else row_ids.cpu()).tolist())
    for n, (temperature, seed, step, row_id) in enumerate(zip(*per_row, strict=True)):
        if temperature > 0:
            noisy[n] -= temperature * torch.from_numpy(
                np.log(-np.log1p(-reference.uniform64(seed, row_id, step, vocab)))
            )
    token = got.token.cpu()
    assert token.dtype == torch.int64 and ((token >= 0) & (token < vocab)).all()
    chosen = noisy.gather(1, token[:, None])[:, 0]
    rounding = torch.finfo(hidden.dtype).eps * exact.abs().nan_to_num(posinf=0.0).amax(1)
    assert (chosen >= noisy.amax(1) - rounding).all()

    want, baseline = exact_sample(exact, token), plain_sample(plain, token)
    of = {"probability": "confidence", "margin": "margin", "entropy": "entropy"}[keywords.get("measure", "probability")]
    sign = -1.0 if of == "entropy" else 1.0
    assert_close_like(sign * got.confidence.cpu(), getattr(want, of), getattr(baseline, of), factor=2.0)
    for name in ("logprob", *keywords.get("extras", ())):
        assert_close_like(getattr(got, name).cpu(), getattr(want, name), getattr(baseline, name), factor=2.0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case, dtype, temperature, device, generator):
    hidden, weight, rows = make(case, dtype, device, generator)
    for extras in ((), ALL):
        check(hidden, weight, rows, temperature=temperature, seed=2**33 + 1, step=4, extras=extras)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("case", [(20, 9, 64, 4096), (200, 130, 72, 1000)], ids=str)
def test_measures_and_arguments_of_each_row(case, measure, device, generator):
    hidden, weight, rows = make(case, torch.bfloat16, device, generator)
    count = len(rows)
    keywords = {
        "temperature": torch.rand(count, generator=generator).round(decimals=1),
        "seed": torch.randint(-(2**62), 2**62, (count,), generator=generator),
        "step": torch.randint(0, 2**31 - 1, (count,), generator=generator, dtype=torch.int32),
        "row_ids": torch.randint(0, 2**32, (count,), generator=generator),
    }
    check(hidden, weight, rows, measure=measure, **{name: t.to(device) for name, t in keywords.items()})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", [(20, 9, 64, 4096), (200, 130, 72, 1001)], ids=str)
def test_logit_bias(case, temperature, device, generator):
    hidden, weight, rows = make(case, torch.bfloat16, device, generator)
    count, vocab = len(rows), len(weight)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:5] for _ in range(count)]).int()
    ids[::2, 1] = -1
    values = torch.randn(count, 5, generator=generator) * 4
    for bias in ((ids, values), (ids[1], values[1])):
        check(hidden, weight, rows, temperature=temperature, seed=1, logit_bias=tuple(t.to(device) for t in bias))
    free = illada.linear_sample_tokens(hidden, weight, rows=rows, temperature=temperature, seed=1)
    forbidden = free.token[:, None].int()
    minus = torch.full(forbidden.shape, -torch.inf, device=device)
    other = illada.linear_sample_tokens(
        hidden, weight, rows=rows, temperature=temperature, seed=1, logit_bias=(forbidden, minus)
    )
    assert (other.token != free.token).all() and other.confidence.isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [(300, 7, 64, 4096), (300, 300, 512, 1000), (300, 129, 100, 999)], ids=str)
def test_clear_maxima_are_found(case, dtype, device, generator):
    # Each hidden row is the weight row of its answer, so the answer's logit stands far out; both ends of V are among them.
    _, weight, rows = make(case, dtype, device, generator)
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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [257, 1280, 1409, 5153])
def test_many_row_tiles(count, temperature, device, generator):
    # 3, 10, 12 (one of a single row) and 41 row tiles: odd and even, in one group and in two.
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the fused kernel needs compute capability 9.0; elsewhere the logits are rounded to 16 bits")
    hidden, weight, rows = make((40, count, 8, 3000), torch.bfloat16, device, generator)
    ids = torch.arange(count, device=device) % 40
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, row_ids=ids, temperature=temperature, seed=5)
    exact = hidden[rows.long()].cpu().double() @ weight.cpu().double().T
    if temperature:
        noise = [np.log(-np.log1p(-reference.uniform64(5, n, 0, 3000))) for n in range(40)]
        noisy = exact - torch.from_numpy(np.stack(noise))[ids.cpu()]
    else:
        noisy = exact
    assert torch.equal(got.token.cpu(), noisy.argmax(1))
    want = exact.log_softmax(1).gather(1, got.token.cpu()[:, None])[:, 0]
    torch.testing.assert_close(got.logprob.cpu().double(), want, rtol=1e-5, atol=1e-4)


def test_a_row_depends_on_nothing_else(device, generator):
    hidden, weight, _ = make((300, None, 64, 4096), torch.bfloat16, device, generator)
    ids = torch.arange(300, device=device)
    keywords = {"temperature": 0.5, "seed": 8}
    whole = illada.linear_sample_tokens(hidden, weight, row_ids=ids, **keywords)
    for n in (0, 63, 64, 128, 299):
        rows = torch.tensor([n], dtype=torch.int32, device=device)
        alone = illada.linear_sample_tokens(hidden, weight, rows=rows, row_ids=ids[n : n + 1], **keywords)
        assert int(alone.token) == int(whole.token[n])
        # The fused kernel's sums are in another order; elsewhere the logits are rounded to 16 bits.
        rtol = 1e-5 if torch.cuda.get_device_capability(device) == (9, 0) else 2e-2
        torch.testing.assert_close(alone.confidence, whole.confidence[n : n + 1], rtol=rtol, atol=0)


TILE_ROWS, TILE_IDS, SLICE_IDS = 128, 256, 32
ITEM_COST, CTA_COST = 0.2, 0.1  # in tiles: an item's and a CTA's beginning and end


def busy_share(row_tiles, vocab_size, sm_count):
    """Return the work of real rows and ids, divided by multiprocessors x the busiest one's work and waiting."""
    _, _, _, tasks = raw.head_plan(row_tiles * TILE_ROWS, vocab_size, sm_count)
    load = [CTA_COST] * sm_count
    for cta, _, _, _, tiles in tasks:
        load[cta] += tiles + ITEM_COST
    return row_tiles * -(-vocab_size // TILE_IDS) / (sm_count * max(load))


def check_plan(row_tiles, vocab_size, sm_count):
    """Check that row tiles meet every range once, and pairs of CTAs are in step on neighbouring tiles or ranges."""
    rows = row_tiles * TILE_ROWS
    cluster, ranges, slices, tasks = raw.head_plan(rows, vocab_size, sm_count)
    done = sorted((tile, vocab_range) for _, tile, vocab_range, _, _ in tasks if vocab_range < ranges)
    assert done == [(tile, vocab_range) for tile in range(row_tiles) for vocab_range in range(ranges)]
    assert (ranges - 1) * slices * SLICE_IDS < vocab_size <= ranges * slices * SLICE_IDS
    assert 48 * ranges <= 8192  # bytes of records of a row
    for cta, _, vocab_range, tiles, steps in tasks:
        ids = max(min((vocab_range + 1) * slices * SLICE_IDS, vocab_size) - vocab_range * slices * SLICE_IDS, 0)
        assert 0 <= cta < sm_count and tiles == -(-ids // TILE_IDS) <= steps
    if cluster == 2:
        for (cta, tile, vocab_range, _, steps), (other, other_tile, other_range, _, other_steps) in zip(
            tasks[::2], tasks[1::2], strict=True
        ):
            assert cta % 2 == 0 and other == cta + 1 and steps == other_steps
            assert (other_tile - tile, other_range - vocab_range) in {(1, 0), (0, 1)}


@pytest.mark.parametrize("sm_count", [132, 114, 78])
@pytest.mark.parametrize("vocab_size", [155136, 126464, 50304, 1000])
def test_plan_covers_everything_once(vocab_size, sm_count):
    for row_tiles in (*range(1, 40), 67, 68, 95, 131, 255, 256):
        check_plan(row_tiles, vocab_size, sm_count)


@pytest.mark.parametrize("sm_count", [132, 114, 78])
@pytest.mark.parametrize(
    ("vocab_size", "many", "few"), [(155136, 0.96, 0.88), (126464, 0.96, 0.9), (50304, 0.92, 0.8), (32000, 0.9, 0.66)]
)
def test_multiprocessors_are_busy(vocab_size, many, few, sm_count):
    # All numbers of rows from 1 to 32,768: those of a row tile have the same plan.
    shares = {row_tiles: busy_share(row_tiles, vocab_size, sm_count) for row_tiles in range(2, 257)}
    assert min(share for row_tiles, share in shares.items() if row_tiles >= 32) >= many
    assert min(shares.values()) >= few
    # One row tile waits for the weight and nothing else: its bytes are what is shared out.
    _, ranges, slices, _ = raw.head_plan(1, vocab_size, sm_count)
    assert vocab_size / (sm_count * slices * SLICE_IDS) >= few and ranges <= sm_count


@pytest.mark.parametrize("sm_count", [132, 114, 78])
def test_small_vocabularies_lose_less_than_a_tile_each(sm_count):
    for row_tiles in range(2, 257):
        _, _, _, tasks = raw.head_plan(row_tiles * TILE_ROWS, 1000, sm_count)
        tiles = [0] * sm_count
        for cta, _, _, _, steps in tasks:
            tiles[cta] += steps
        assert max(tiles) <= -(-row_tiles * 4 // sm_count) + 1


@pytest.mark.parametrize("place", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_have_no_confidence(value, place, device, generator):
    hidden, weight, _ = make((70, None, 64, 1000), torch.bfloat16, device, generator)
    hidden[:, 0] = hidden[:, 0].abs() + 0.1
    (hidden if place == "hidden" else weight)[66, 0] = value
    got = illada.linear_sample_tokens(hidden, weight)
    broken = torch.full((70,), place == "weight")
    broken[66] = True
    assert torch.equal(got.confidence.cpu() == -torch.inf, broken)


def test_nothing_to_sample(device, generator):
    hidden, weight, _ = make((4, None, 64, 1000), torch.bfloat16, device, generator)
    none = torch.empty(0, dtype=torch.int32, device=device)
    for got in (
        illada.linear_sample_tokens(hidden, weight, rows=none, extras=ALL),
        illada.linear_sample_tokens(hidden[:0], weight, temperature=1.0, extras=ALL),
    ):
        assert all(field.shape == (0,) and field.is_cuda for field in got)


def test_float32(device, generator):
    hidden, weight, rows = make((20, 9, 64, 1000), torch.float32, device, generator)
    for temperature in (0.0, 1.0):
        check(hidden, weight, rows, temperature=temperature, seed=2, extras=ALL)
