"""top_k, top_p and confidence_at_temperature on CUDA: no checks of values, workspaces, graphs. The rest is in
tests/ops/test_ops_filters.py."""

import pytest
import sample_filters as checks
import torch

import illada
from illada.ops import raw


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
