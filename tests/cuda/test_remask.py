"""remask on CUDA: sequences at the limits of its blocks and registers, values that only CPUs check, the same as a CPU. The
rest is in tests/ops/test_ops_remask.py."""

import pytest
import torch
from remask_cases import CASES, MASK, MIXED, check, make_case

import illada
from illada.ops.op_types import TokenSample

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


@pytest.mark.parametrize("count", [1, 8192, 8193, 19999])
def test_ties_among_more_candidates_than_registers(count, device, generator):
    tokens, rows, cu_rows, sample = make_case((20000,), generator, masked=1.0, broken=False)
    sample = sample._replace(confidence=torch.full((20000,), 0.5))
    check((tokens, rows, cu_rows, sample), {"quota": count}, device)


def test_rows_outside_of_the_canvas_are_skipped(device):
    tokens = torch.full((8,), MASK, device=device)
    rows = torch.tensor([-1, 3, 5, 2, 2**31 - 1], dtype=torch.int32, device=device)
    confidence = torch.linspace(1, 0.5, 5, device=device)
    sample = TokenSample(torch.arange(20, 25, device=device), confidence, confidence)
    cu_rows = torch.tensor([0, 5], dtype=torch.int32, device=device)
    status = illada.remask(tokens[2:6], rows, cu_rows, sample, quota=9, mask_id=MASK, return_status=True)
    assert tokens.tolist() == [MASK] * 4 + [23, 21, MASK, MASK] and status.committed.tolist() == [2]


def test_same_as_on_a_cpu(device, generator):
    for rule in CASES:
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
