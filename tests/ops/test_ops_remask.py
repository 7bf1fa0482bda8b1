"""remask on every device against its specification: rules, limits, ties, status, raw calls, errors."""

import pytest
import torch
from remask_cases import CASES, MASK, MIXED, check, make_case

import illada
from illada.ops import raw
from illada.ops.op_types import RULES, RemaskStatus, TokenSample


@pytest.mark.parametrize("token_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rule", CASES, ids=str)
def test_matches_reference(rule, token_dtype, device, generator):
    for coarse in (True, False, True):
        check(make_case(MIXED, generator, coarse=coarse), rule, device, token_dtype=token_dtype)


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
    want_tokens, got_tokens = tokens.to(device, copy=True), tokens.to(device, copy=True)
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
    committed = RemaskStatus(out.committed, rows[:0], out.finished[:0], out.ended[:0])  # the others are optional
    raw.remask(
        committed, got_tokens, rows, cu_rows, sample.token, sample.confidence, sample.entropy, RULES.index(name),
        0.0 if limits is not None else limit, limits, MASK, 1, ends,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 31, 100, 127, 128, 129, 500, 1023])
def test_ties_go_to_the_lowest_row(count, device, generator):
    tokens, rows, cu_rows, sample = make_case((1024,), generator, masked=1.0, broken=False)
    confidence = torch.full((1024,), 0.25)
    confidence[::3] = -0.0  # as sure as 0
    confidence[1::3] = 0.0
    for rule in ({"quota": count}, {"threshold": 9.0, "min_commit": count}):
        check((tokens, rows, cu_rows, sample._replace(confidence=confidence)), rule, device)
        check((tokens, rows, cu_rows, sample._replace(confidence=torch.zeros(1024))), rule, device)


@pytest.mark.parametrize("quota", [float("inf"), 1e30, 2**31, 2**63 - 1, 10**400])
def test_a_quota_of_any_size_commits_all(quota, generator):
    tokens, rows, cu_rows, sample = make_case(MIXED, generator)
    wanted = illada.remask(tokens.clone(), rows, cu_rows, sample, quota=100, mask_id=5)
    assert wanted.sum() > 0
    assert torch.equal(illada.remask(tokens, rows, cu_rows, sample, quota=quota, mask_id=5), wanted)


def test_ids_that_the_canvas_cannot_hold(generator):
    tokens, rows, cu_rows, sample = make_case(MIXED, generator)
    tokens, before = tokens.int(), tokens.int()
    for wrong in (2**40 + 7, 2**31, -(2**31) - 1):
        sample.token[3] = wrong
        with pytest.raises(ValueError, match=rf"remask: sample.token\[3\] is {wrong}, which int32 tokens cannot hold"):
            illada.remask(tokens, rows, cu_rows, sample, quota=1, mask_id=5)
    assert torch.equal(tokens, before)
    for name in ("mask_id", "min_commit"):
        with pytest.raises(ValueError, match=f"remask: {name} must fit 64 bits"):
            illada.remask(tokens, rows, cu_rows, sample, threshold=0.5, **{"mask_id": 5, name: 2**63})


def test_status_of_finished_and_ended_sequences():
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


def test_takes_the_surest_and_never_a_broken_row(device):
    tokens = torch.tensor([5, 5, 5, 9, 5], device=device)
    confidence = torch.tensor([0.2, torch.nan, 0.9, 1.0, -torch.inf], device=device)
    sample = TokenSample(torch.arange(20, 25, device=device), confidence, torch.zeros(5, device=device))
    rows = torch.arange(5, dtype=torch.int32, device=device)
    cu_rows = torch.tensor([0, 5], dtype=torch.int32, device=device)
    committed = illada.remask(tokens, rows, cu_rows, sample, quota=1, mask_id=5)
    assert committed.dtype == torch.int32 and committed.tolist() == [1]
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
    tokens, rows, cu_rows, sample = make_case(MIXED, generator)
    fields = (sample.token, sample.confidence, sample.entropy)
    torch.library.opcheck(torch.ops.illada.remask.default, (tokens, rows, cu_rows, *fields, 3, 0.4, None, 5, 1, None))


def test_step_compiles_in_one_graph(generator):
    def step(tokens, hidden, weight, rows, cu_rows):
        sample = illada.linear_sample_tokens(hidden, weight, rows=rows, temperature=0.5, seed=2)
        return illada.remask(tokens, rows, cu_rows, sample, quota=2, mask_id=5)

    tokens, rows, cu_rows, _ = make_case(MIXED, generator)
    hidden = torch.randn(len(tokens), 8, generator=generator)
    weight = torch.randn(40, 8, generator=generator)
    want_tokens, got_tokens = tokens.clone(), tokens.clone()
    want = step(want_tokens, hidden, weight, rows, cu_rows)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(got_tokens, hidden, weight, rows, cu_rows)
    assert got.tolist() == want.tolist() and torch.equal(got_tokens, want_tokens)


def test_errors(generator):
    tokens, rows, cu_rows, drawn = make_case(MIXED, generator)
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
        (ValueError, r"outside of \[0, 55\)", call(rows=rows + 60)),
    ]
    for error, match, function in wrong:
        with pytest.raises(error, match=match):
            function()
    assert torch.equal(tokens, before)
