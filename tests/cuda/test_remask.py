"""remask on the device against its specification: rules, limits, long and empty sequences, ties, status, raw calls."""

import pytest
import torch

import illada
from illada.ops import raw, reference
from illada.ops.types import RULES, RemaskStatus, TokenSample

MASK = 5
MIXED = (5, 0, 9, 1, 12)


def make_case(lengths, generator, *, masked=0.8, coarse=True, broken=True):
    """A canvas with masks and texts, the sampled rows of every sequence in any order, a sample with ties and NaNs."""
    total = sum(lengths)
    tokens = torch.randint(10, 20, (2 * total + 1,), generator=generator)
    rows = torch.randperm(2 * total + 1, generator=generator)[:total].int()
    mask_here = torch.rand(total, generator=generator) < masked
    tokens[rows.long()] = torch.where(mask_here, MASK, tokens[rows.long()])
    confidence = torch.rand(total, generator=generator)
    if coarse:  # many ties
        confidence = (confidence * 8).round() / 8
    if broken:
        confidence[torch.rand(total, generator=generator) < 0.1] = torch.nan
        confidence[torch.rand(total, generator=generator) < 0.1] = -torch.inf
    entropy = torch.rand(total, generator=generator) * 2
    entropy[::3] = (entropy[::3] * 2).round() / 2
    token = torch.randint(100, 110, (total,), generator=generator)
    token[torch.rand(total, generator=generator) < 0.05] = MASK  # commits that leave a mask
    cu_rows = torch.tensor([0, *lengths]).cumsum(0).int()
    return tokens, rows, cu_rows, TokenSample(token, confidence, confidence, entropy)


def check(case, rule, device, *, token_dtype=torch.int64, end_ids=(101, 103), mask_id=MASK):
    """The op and the reference agree in everything that they return and write; the neighbours of `tokens` stay."""
    tokens, rows, cu_rows, sample = case
    ends = torch.tensor(end_ids, dtype=torch.int64)
    want_tokens = tokens.clone()
    want = reference.remask(
        want_tokens, rows, cu_rows, sample, mask_id=mask_id, end_ids=ends, return_status=True, **rule
    )
    around = torch.full((len(tokens) + 6,), mask_id, dtype=token_dtype, device=device)  # would be taken for candidates
    got_tokens = around[3:-3]
    got_tokens.copy_(tokens)
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in rule.items()}
    got = illada.remask(
        got_tokens, rows.to(device), cu_rows.to(device), TokenSample(*(f.to(device) for f in sample[:4])),
        mask_id=mask_id, end_ids=ends.to(device), return_status=True, **on_device,
    )  # fmt: skip
    assert torch.equal(got_tokens.cpu().long(), want_tokens)
    for name, g, w in zip(RemaskStatus._fields, got, want, strict=True):
        assert g.is_cuda and g.dtype == w.dtype and torch.equal(g.cpu(), w), name
    assert (around[:3] == mask_id).all() and (around[-3:] == mask_id).all()
    return want


ALL_RULES = [
    {"quota": 0},
    {"quota": 3},
    {"quota": 100},
    {"quota": torch.tensor([0, 2, 1, 1, 5], dtype=torch.int32)},
    {"quota": torch.tensor([-3, 2**31 - 1, 2, 0, 8], dtype=torch.int32)},
    {"threshold": 0.5},
    {"threshold": -1.0},
    {"threshold": torch.tensor([0.9, 0.1, 2.0, 0.0, 0.375])},
    {"threshold": 2.0, "min_commit": 0},
    {"threshold": 2.0, "min_commit": 5},
    {"threshold": 2.0, "min_commit": 2**40},
    {"factor": 1.0},
    {"factor": 2.5},
    {"factor": 0.0, "min_commit": 0},
    {"factor": torch.tensor([0.5, 1.0, 1.5, 4.0, 3.0]), "min_commit": 0},
    {"entropy_bound": 0.5},
    {"entropy_bound": 0.0, "min_commit": 0},
    {"entropy_bound": 1e9},
    {"entropy_bound": -1.0, "min_commit": 0},
    {"entropy_bound": torch.tensor([0.0, 1.0, 0.5, 2.25, 3.0]), "min_commit": 2},
]


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", ALL_RULES, ids=str)
def test_matches_reference(rule, token_dtype, device, generator):
    for coarse in (True, False, True):
        check(make_case(MIXED, generator, coarse=coarse), rule, device, token_dtype=token_dtype)


SHAPES = [  # lengths: what the row is for
    (0,),
    (0, 7, 0),  # empty first and last
    (3, 0, 0, 4),
    (32, 33, 31, 1),  # warps
    (1024,),  # the most that the small block takes
    (1025,),
    (1000, 25),
    (128, 0, 897),
    (8192,),  # the most that fits the registers
    (8193,),
    (3, 8191, 8200, 0, 40),
]
ONE_OF_EACH = [
    {"quota": 17},
    {"quota": 700},
    {"threshold": 0.625},
    {"factor": 2.5, "min_commit": 5},
    {"entropy_bound": 9.25},
    {"entropy_bound": 60.0, "min_commit": 0},
]


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
def test_shapes(lengths, rule, coarse, device, generator):
    check(make_case(lengths, generator, coarse=coarse), rule, device)


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=str)
def test_more_candidates_than_registers(rule, device, generator):
    check(make_case((20000,), generator, masked=0.95), rule, device, token_dtype=torch.int32)


@pytest.mark.parametrize("rule", [{"quota": 3}, {"factor": 2.0}, {"entropy_bound": 1.0}], ids=str)
def test_many_sequences(rule, device, generator):
    lengths = torch.randint(0, 8, (300,), generator=generator).tolist()
    check(make_case(lengths, generator), rule, device)


@pytest.mark.parametrize("count", [1, 2, 31, 100, 127, 128, 129, 500, 1023])
def test_ties_go_to_the_lowest_row(count, device, generator):
    tokens, rows, cu_rows, sample = make_case((1024,), generator, masked=1.0, broken=False)
    confidence = torch.full((1024,), 0.25)
    confidence[::3] = -0.0  # as sure as 0
    confidence[1::3] = 0.0
    for rule in ({"quota": count}, {"threshold": 9.0, "min_commit": count}):
        check((tokens, rows, cu_rows, sample._replace(confidence=confidence)), rule, device)
        check((tokens, rows, cu_rows, sample._replace(confidence=torch.zeros(1024))), rule, device)


@pytest.mark.parametrize("count", [1, 8192, 8193, 19999])
def test_ties_among_more_candidates_than_registers(count, device, generator):
    tokens, rows, cu_rows, sample = make_case((20000,), generator, masked=1.0, broken=False)
    sample = sample._replace(confidence=torch.full((20000,), 0.5))
    check((tokens, rows, cu_rows, sample), {"quota": count}, device)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_confidences_of_any_sign_and_size(count, device):
    # Negative ones are what the entropy measure gives; infinity and denormals are numbers like others.
    values = [-1e-45, -3e38, torch.inf, 1e-45, 0.0, -7.5, 3e38, -0.0, torch.nan, -torch.inf]
    confidence = torch.tensor(values)
    tokens, rows = torch.full((10,), MASK), torch.arange(10, dtype=torch.int32)
    sample = TokenSample(torch.arange(20, 30), confidence, confidence, confidence.abs().nan_to_num(0))
    cu_rows = torch.tensor([0, 10], dtype=torch.int32)
    want = check((tokens, rows, cu_rows, sample), {"quota": count}, device)
    assert want.committed.tolist() == [min(count, 8)]
    check((tokens, rows, cu_rows, sample), {"threshold": 0.0, "min_commit": count}, device)
    check((tokens, rows, cu_rows, sample), {"factor": 3.0, "min_commit": count}, device)


@pytest.mark.parametrize("rule", [{"quota": 4}, {"threshold": 0.0}, {"factor": 9.0}, {"entropy_bound": 9.0}], ids=str)
def test_sequences_without_candidates(rule, device, generator):
    tokens, rows, cu_rows, sample = make_case((6, 5, 7), generator, masked=1.0, broken=False)
    tokens[rows[:6].long()] = 11  # nothing masked
    confidence = sample.confidence.clone()
    confidence[6:11] = torch.tensor([torch.nan, -torch.inf, -torch.nan, torch.nan, -torch.inf])  # nothing to rank
    want = check((tokens, rows, cu_rows, sample._replace(confidence=confidence)), rule, device)
    assert want.committed.tolist()[:2] == [0, 0] and want.remaining.tolist()[:2] == [0, 5]
    assert want.finished.tolist()[:2] == [True, False] and want.committed[2] > 0


def test_a_committed_mask_remains(device, generator):
    tokens, rows, cu_rows, sample = make_case((40,), generator, masked=1.0, broken=False)
    sample = sample._replace(token=torch.full((40,), MASK))
    want = check((tokens, rows, cu_rows, sample), {"quota": 40}, device, end_ids=(MASK,))
    assert (want.committed.tolist(), want.remaining.tolist(), want.ended.tolist()) == ([40], [40], [True])


@pytest.mark.parametrize("ends", [(), (107,), (1, 2, 3, 104), tuple(range(50, 110))], ids=len)
def test_only_a_committed_end_ends(ends, device, generator):
    seen = torch.zeros(2, dtype=torch.bool)
    for _ in range(4):
        want = check(make_case(MIXED, generator), {"quota": 2}, device, end_ids=ends)
        seen[want.ended.long()] = True
    assert seen[0] and seen[1] == (len(ends) > 0)  # the tokens are 100 .. 109


@pytest.mark.parametrize("token_dtype,mask_id", [(torch.int64, 2**40), (torch.int32, 2**31 - 1), (torch.int32, -1)])
def test_any_mask_id(token_dtype, mask_id, device, generator):
    tokens, rows, cu_rows, sample = make_case(MIXED, generator)
    tokens[tokens == MASK] = mask_id
    check((tokens, rows, cu_rows, sample), {"quota": 2}, device, token_dtype=token_dtype, mask_id=mask_id)


def test_large_tokens_are_written_whole(device):
    tokens, rows = torch.full((2,), MASK, device=device), torch.tensor([0, 1], dtype=torch.int32, device=device)
    confidence = torch.ones(2, device=device)
    sample = TokenSample(torch.tensor([2**40 + 1, 2**31 + 7], device=device), confidence, confidence)
    cu_rows = torch.tensor([0, 2], dtype=torch.int32, device=device)
    assert illada.remask(tokens, rows, cu_rows, sample, quota=2, mask_id=MASK).tolist() == [2]
    assert tokens.tolist() == [2**40 + 1, 2**31 + 7]


def test_rows_outside_of_the_canvas_are_skipped(device):
    tokens = torch.full((8,), MASK, device=device)
    rows = torch.tensor([-1, 3, 5, 2, 2**31 - 1], dtype=torch.int32, device=device)
    confidence = torch.linspace(1, 0.5, 5, device=device)
    sample = TokenSample(torch.arange(20, 25, device=device), confidence, confidence)
    cu_rows = torch.tensor([0, 5], dtype=torch.int32, device=device)
    status = illada.remask(tokens[2:6], rows, cu_rows, sample, quota=9, mask_id=MASK, return_status=True)
    assert tokens.tolist() == [MASK] * 4 + [23, 21, MASK, MASK] and status.committed.tolist() == [2]


def test_no_rows_and_no_sequences(device):
    def none(dtype):
        return torch.empty(0, dtype=dtype, device=device)

    tokens, cu_rows = torch.full((4,), MASK, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    sample = TokenSample(none(torch.int64), none(torch.float32), none(torch.float32), none(torch.float32))
    for rule in ({"quota": 1}, {"threshold": 0.0}, {"factor": 1.0}, {"entropy_bound": 1.0}):
        for canvas in (tokens, tokens[:0]):
            status = illada.remask(canvas, none(torch.int32), cu_rows, sample, mask_id=MASK, return_status=True, **rule)
            assert status.committed.tolist() == [0, 0] and status.finished.tolist() == [True, True]
        committed = illada.remask(tokens, none(torch.int32), cu_rows[:1], sample, mask_id=MASK, **rule)
        assert committed.shape == (0,)


@pytest.mark.parametrize("rule", [{"quota": 2}, {"quota": torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)}, {"threshold": 0.5},
                                  {"factor": torch.full((5,), 2.0)}, {"entropy_bound": 1.0}], ids=str)  # fmt: skip
def test_raw_is_the_public_function(rule, device, generator):
    tokens, rows, cu_rows, sample = make_case(MIXED, generator)
    (name, limit), ends = next(iter(rule.items())), torch.tensor([101, 103], device=device)
    limits = limit.to(device) if isinstance(limit, torch.Tensor) else None
    rows, cu_rows = rows.to(device), cu_rows.to(device)
    sample = TokenSample(*(f.to(device) for f in sample[:4]))
    want_tokens, got_tokens = tokens.to(device), tokens.to(device)
    want = illada.remask(
        want_tokens, rows, cu_rows, sample, mask_id=MASK, end_ids=ends, return_status=True,
        **{name: limit if limits is None else limits},
    )  # fmt: skip
    out = RemaskStatus(*(torch.full_like(field, True) for field in want))
    raw.remask(
        out, got_tokens, rows, cu_rows, sample.token, sample.confidence, sample.entropy, RULES.index(name),
        0.0 if limits is not None else limit, limits, MASK, 1, ends,
    )  # fmt: skip
    assert torch.equal(got_tokens, want_tokens)
    for g, w in zip(out, want, strict=True):
        assert torch.equal(g, w)


def test_same_as_on_a_cpu(device, generator):
    for rule in ALL_RULES:
        tokens, rows, cu_rows, sample = make_case(MIXED, generator)
        here = tokens.to(device)
        on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in rule.items()}
        want = illada.remask(tokens, rows, cu_rows, sample, mask_id=MASK, return_status=True, **rule)
        sample = TokenSample(*(f.to(device) for f in sample[:4]))
        got = illada.remask(
            here, rows.to(device), cu_rows.to(device), sample, mask_id=MASK, return_status=True, **on_device
        )
        assert torch.equal(here.cpu(), tokens)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.cpu(), w)


@pytest.mark.parametrize("count", [40, 9000])  # in registers, and read again
def test_what_has_no_rank_or_does_not_fit_is_no_candidate(count, device):
    confidence = torch.linspace(0.9, 0.1, count)
    entropy = torch.linspace(0.1, 0.9, count)
    entropy[::3] = torch.nan
    entropy[1::3] = -torch.tensor(torch.nan)  # by its sign bit it would come first
    token = torch.arange(10, 10 + count)
    token[2] += 2**40
    sample = TokenSample(token, confidence, confidence, entropy)
    sample = TokenSample(*(x.to(device) for x in sample[:4]))
    rows = torch.arange(count, dtype=torch.int32, device=device)
    cu_rows = torch.tensor([0, count], dtype=torch.int32, device=device)
    ranked = int((~entropy.isnan()).sum())
    for dtype in (torch.int64, torch.int32):
        misfits = int(dtype == torch.int32)
        for rule, wanted in (({"entropy_bound": 1e9}, ranked - misfits), ({"quota": 1e30}, count - misfits)):
            tokens = torch.full((count,), 5, dtype=dtype, device=device)
            status = illada.remask(tokens, rows, cu_rows, sample, mask_id=5, return_status=True, **rule)
            assert status.committed.item() == wanted and status.remaining.item() == count - wanted
            assert tokens[2].item() == (5 if misfits else 12 + 2**40)
