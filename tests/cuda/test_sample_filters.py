"""top_k, top_p and confidence_at_temperature on the device against their specification in float64."""

import pytest
import sample_filters as checks
import torch

import illada
from illada.ops import raw, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_rows(case, dtype, generator, *, strided):
    count, vocab, spread = case
    values = (torch.randn(count, vocab, generator=generator) * spread).to(dtype)
    if not strided:
        return values
    wide = torch.full((count, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = values
    return wide[:, 1 : vocab + 1]


@pytest.mark.parametrize("at_temperature", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*checks.CASES, (12, 40000, 0.02)], ids=str)
def test_matches_fp64(case, dtype, at_temperature, device, generator):
    # The last case has more ids in a bin than the list holds.
    checks.check_reference(
        make_rows(case, dtype, generator, strided=at_temperature), device, at_temperature=at_temperature
    )


@pytest.mark.parametrize("measure", ["margin", "entropy", "random"])
def test_measures_and_bias(measure, device, generator):
    logits = torch.randn(12, 2700, generator=generator) * 2
    ids = torch.randint(-1, 2700, (12, 4), generator=generator, dtype=torch.int32)
    ids[:, 0], ids[:, 3] = logits.argmax(-1), 2699
    bias = (ids, torch.tensor([[-torch.inf, 5.0, 9.0, 6.5]]).expand(12, 4).contiguous())
    checks.check_reference(logits, device, at_temperature=True, logit_bias=bias, measure=measure)


def test_which_ids_are_kept(device):
    checks.check_kept_ids(device)


def test_the_entropy_of_one_kept_id_is_0(device):
    checks.check_entropy_of_one_kept_id(device)


def test_broken_rows_are_not_filtered(device):
    checks.check_broken_rows(device)


def test_frequencies_are_the_renormalised_softmax(device, generator):
    checks.check_frequencies(device, generator, draws=2000)


@pytest.mark.parametrize("count", [2, 300])  # several CTAs a row, and one
def test_batch_and_split_change_nothing(count, device, generator):
    rows = make_rows((2, 20001, 3.0), torch.bfloat16, generator, strided=False).to(device)
    place = torch.arange(count, device=device) % 2
    ids = torch.tensor([11, 77], device=device)
    for at_temperature in (False, True):
        keywords = {
            "temperature": 1.3, "top_k": 900, "top_p": 0.8, "seed": 3, "extras": checks.ALL,
            "confidence_at_temperature": at_temperature,
        }  # fmt: skip
        alone = checks.to_host(illada.sample_tokens(rows[:1], row_ids=ids[:1], **keywords))
        many = checks.to_host(illada.sample_tokens(rows[place], row_ids=ids[place], **keywords))
        for name, field, single in zip(many._fields, many, alone, strict=True):
            assert (field[::2] == single).all(), name  # bit for bit


@pytest.mark.parametrize("vocab", [33, 30000])
def test_ties_and_far_logits(vocab, device):
    """Equal logits in numbers that no list holds; ranges of logits that leave one bin for all but the first."""
    flat = torch.zeros(vocab)
    far = torch.arange(vocab).float() * -1.5
    wide = torch.full((vocab,), -3e38)
    wide[5:9] = torch.tensor([3e38, 2.9e38, -1.0, 0.0])
    settings = [(1.0, 0, 0.37), (1.0, 7, 0.5), (50.0, 20, 1.0), (1e3, 25, 0.9), (1e37, 3, 0.99)]
    for row in (flat, far, wide, flat.bfloat16(), far.bfloat16()):
        for temperature, top_k, top_p in settings:
            logits = row.to(device).expand(10, -1)
            keywords = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 5}
            got = illada.sample_tokens(logits, **keywords).token.cpu()
            kept = reference.kept_ids(row.double(), temperature, top_k, top_p)
            assert kept[got].all()
            one = logits[:1].cpu()
            assert torch.equal(got[:1], reference.sample_tokens(one, **keywords).token)


def test_linear_sample_tokens(device, generator):
    """The same as from the logits that a matrix product of the same dtype makes, without a sync."""
    hidden = torch.randn(9, 64, generator=generator).to(torch.bfloat16).to(device)
    weight = torch.randn(1003, 64, generator=generator).to(torch.bfloat16).to(device)
    rows = torch.tensor([3, 0, 8, 3], dtype=torch.int32, device=device)
    keywords = {**checks.per_row(4, device), "seed": 3, "extras": checks.ALL, "confidence_at_temperature": True}
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, **keywords)
    want = illada.sample_tokens(hidden[rows.long()] @ weight.t(), **keywords)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_values_on_the_device_are_not_checked(device):
    """What a scalar may not be means: below 1 all, above 1 all, 0 and less the most likely id."""
    logits = torch.tensor([0.0, 2.0, 1.0], device=device).expand(50, 3)
    plain = illada.sample_tokens(logits, temperature=3.0, seed=1).token
    minus = torch.full((50,), -4, dtype=torch.int32, device=device)
    assert torch.equal(illada.sample_tokens(logits, temperature=3.0, seed=1, top_k=minus).token, plain)
    for value in (1.5, torch.nan):
        top_p = torch.full((50,), value, device=device)
        assert torch.equal(illada.sample_tokens(logits, temperature=3.0, seed=1, top_p=top_p).token, plain)
    top_p = torch.full((50,), -1.0, device=device)
    assert (illada.sample_tokens(logits, temperature=3.0, seed=1, top_p=top_p).token == 1).all()


def test_raw_and_no_rows(device, generator):
    logits = torch.randn(6, 500, generator=generator).to(device)
    settings = checks.per_row(6, device)
    want = illada.sample_tokens(logits, **settings, seed=3, extras=checks.ALL)
    out = illada.sample_tokens(logits, extras=checks.ALL)
    size = raw.sample_tokens_workspace(6, 500, logits.device, filtered=True)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    filters = {"top_ks": settings["top_k"], "top_ps": settings["top_p"]}
    raw.sample_tokens(out, logits, seed=3, temperatures=settings["temperature"], **filters, workspace=workspace)
    for g, w in zip(out, want, strict=True):
        assert torch.equal(g, w)
    with pytest.raises(ValueError, match="workspace must have"):
        raw.sample_tokens(out, logits, 1.0, top_k=2, workspace=workspace[: size - 16])
    with pytest.raises(ValueError, match="top_k must be at least 0, got -1"):
        raw.sample_tokens(out, logits, 1.0, top_k=-1, workspace=workspace)
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got 2"):
        raw.sample_tokens(out, logits, 1.0, top_p=2.0, workspace=workspace)
    assert illada.sample_tokens(logits[:0], temperature=1.0, top_k=3, top_p=0.5).token.shape == (0,)


def test_filters_in_a_graph(device, generator):
    """A replay sees new logits and new filters: nothing of them is read by the host."""
    logits = torch.randn(6, 3000, generator=generator).to(device)
    settings = checks.per_row(6, device)
    keywords = {"seed": 3, "extras": checks.ALL, "confidence_at_temperature": True}
    illada.sample_tokens(logits, **settings, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = illada.sample_tokens(logits, **settings, **keywords)
    seen = set()
    for top_k in (1, 40, 0):
        settings["top_k"].fill_(top_k)
        logits.copy_(logits.flip(1))
        graph.replay()
        got = [field.clone() for field in captured]
        for g, w in zip(got, illada.sample_tokens(logits, **settings, **keywords), strict=True):
            assert torch.equal(g, w)
        seen.add(str(got[3].tolist()))
    assert len(seen) == 3
