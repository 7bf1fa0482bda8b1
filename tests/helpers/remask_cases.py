"""Cases for remask, and what the op has to do with each on any device: the same as the reference."""

from __future__ import annotations

import torch

import illada
from illada.ops import reference
from illada.ops.op_types import RemaskStatus, TokenSample

MASK = 5
MIXED = (5, 0, 9, 1, 12)
CASES = [
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
    {"entropy_bound": 0.4},
    {"entropy_bound": 0.0, "min_commit": 0},
    {"entropy_bound": 1e9},
    {"entropy_bound": -1.0, "min_commit": 0},
    {"entropy_bound": torch.tensor([0.0, 1.0, 0.5, 2.25, 3.0]), "min_commit": 2},
]


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
    if broken:
        # The order of the others may not depend on them.
        entropy[torch.rand(total, generator=generator) < 0.1] = torch.nan
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
        assert g.device.type == device.type and g.dtype == w.dtype and torch.equal(g.cpu(), w), name
    assert (around[:3] == mask_id).all() and (around[-3:] == mask_id).all()
    return want
