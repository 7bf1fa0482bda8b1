"""masked_cross_entropy on CUDA: large vocabularies, targets that only CPUs check, raw calls, graphs, errors. The rest is in
tests/ops/test_ops_loss.py."""

import pytest
import torch
from loss_cases import assert_like_plain, make_rows, plain_results, results_of

import illada
from illada.ops import raw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(40, 126464, 0.5, 1.0), (3, 2**20 + 1, 1.0, 5.0), (1, 2**22 - 1, 1.0, 1.0)])
def test_large_vocabularies_match_fp64(case, dtype, device, generator):
    logits, targets, weights = make_rows(case, dtype, device, generator)
    got = results_of(illada.masked_cross_entropy, logits, targets, weights)
    assert_like_plain(got, *plain_results(logits, targets, weights))


# -------------------------------------------------------------------------------------------- targets out of range


@pytest.mark.parametrize("bad", [-1, 1000, 2**40, -(2**31)])
def test_targets_out_of_range(bad, device, generator, monkeypatch):
    logits = torch.randn(4, 1000, generator=generator).to(device)
    targets, weights = torch.tensor([3, bad, 999, bad], device=device), torch.tensor([1.0, 2.0, 3.0, 0.0]).to(device)
    loss, nll, lse, grad = results_of(illada.masked_cross_entropy, logits, targets, weights)
    assert loss.isnan() and nll.isnan().tolist() == [False, True, False, False] and nll[3] == 0
    torch.testing.assert_close(grad[1], 2 * logits[1].softmax(-1).cpu(), rtol=1e-5, atol=1e-8)  # without the one-hot
    assert lse[:3].isfinite().all() and (grad[3] == 0).all()
    monkeypatch.setenv("ILLADA_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"targets\[1\] is {bad}, outside of \[0, 1000\), and its weight is not zero"):
        illada.masked_cross_entropy(logits, targets, weights)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 4\), got 0 .. 4"):
        illada.masked_cross_entropy(logits, targets, weights, rows=torch.tensor([0, 4]).int().to(device))
    with pytest.raises(ValueError, match="normalizer must be finite and positive, got 0"):
        illada.masked_cross_entropy(logits, targets.clamp(0, 5), weights, normalizer=torch.zeros((), device=device))
    weights[1] = 0  # now nobody asks for that target
    assert illada.masked_cross_entropy(logits, targets, weights).isfinite()
    only = torch.tensor([0, 2], dtype=torch.int32, device=device)
    assert illada.masked_cross_entropy(logits, targets, weights + 1, rows=only).isfinite()


# ------------------------------------------------------------------------------------------------ raw calls


def raw_buffers(logits, weights, **extra):
    size = raw.masked_cross_entropy_workspace(logits.shape[0], logits.shape[1], logits.device)
    nll, lse = torch.full((2, len(logits)), -7.0, device=logits.device)
    return {
        "nll": nll,
        "lse": lse,
        "lse_parts": torch.stack([lse, lse], dim=-1),
        "workspace": logits.new_empty(size, dtype=torch.uint8),
        **extra,
    }


FUSED = [  # rows, V: how a row is held
    (6, 16384),  # by one CTA
    (5, 20001),  # by a cluster of two
    (3, 65000),  # of four
    (2, 131072),  # of eight
    (2, 155136),  # of eight with ten vectors a thread
    (2, 163841),  # not at all: a forward and a backward
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FUSED)
def test_forward_and_gradient_at_once(case, dtype, device, generator):
    rows, vocab = case
    tokens = rows + 4
    logits = (3 * torch.randn(rows, vocab + 3, generator=generator)).to(dtype).to(device)[:, 2 : vocab + 2]
    targets = torch.randint(vocab, (tokens,), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(tokens, generator=generator).to(device)
    order = torch.randperm(tokens, generator=generator)[:rows].int().to(device)
    if rows > 2:
        weights[order[1].long()] = 0
        order[2] = tokens  # outside: as if without a weight
    normalizer = torch.tensor(3.0, device=device)
    arguments = {"rows": order, "normalizer": normalizer, "scale": 0.5}

    apart = raw_buffers(logits, weights)
    raw.masked_cross_entropy(logits, targets, weights, rows=order, **apart)
    want = torch.empty(rows, vocab, dtype=dtype, device=device)
    raw.masked_cross_entropy_backward(want, logits, targets, weights, apart["lse_parts"], **arguments)
    other = torch.full((rows, vocab), torch.nan, dtype=dtype, device=device)
    raw.masked_cross_entropy(logits, targets, weights, **raw_buffers(logits, weights, grad=other), **arguments)
    inside = raw_buffers(logits, weights, grad=logits)
    raw.masked_cross_entropy(logits, targets, weights, **inside, **arguments)

    torch.testing.assert_close(inside["nll"], apart["nll"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inside["lse"], apart["lse"], rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(logits, want, **tolerance)
    torch.testing.assert_close(other, want, **tolerance)
    if rows > 2:
        assert not inside["nll"][1:3].any() and not logits[1:3].any()


def test_sum_of_many_rows(device, generator):
    nll, weights = torch.rand(2, 5000, generator=generator).to(device)
    weights[::3], nll[::3] = 0, torch.nan
    loss = torch.empty((), device=device)
    raw.weighted_sum(loss, nll, weights, normalizer=torch.tensor(4.0, device=device), scale=3.0)
    want = (weights.double() * nll.nan_to_num().double()).sum() * 0.75
    torch.testing.assert_close(loss.double(), want, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="inputs are on the CPU, but the outputs are on cuda"):
        raw.weighted_sum(loss, nll.cpu(), weights)


def test_raw_calls_in_a_graph(device, generator):
    logits = torch.empty(4, 20000, dtype=torch.bfloat16, device=device)
    targets, weights = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, device=device)
    loss, dloss, grad = torch.empty((), device=device), torch.empty((), device=device), torch.empty_like(logits)
    chunk = torch.empty_like(logits)
    outputs = raw_buffers(logits, weights)
    inside = raw_buffers(logits, weights, grad=chunk)

    def run():
        raw.masked_cross_entropy(logits, targets, weights, **outputs)
        raw.weighted_sum(loss, outputs["nll"], weights)
        raw.masked_cross_entropy_backward(grad, logits, targets, weights, outputs["lse_parts"], dloss=dloss)
        raw.masked_cross_entropy(chunk, targets, weights, **inside)

    def refill(seed):
        host = torch.Generator().manual_seed(seed)
        logits.copy_(torch.randn(logits.shape, generator=host))
        chunk.copy_(logits)
        targets.copy_(torch.randint(20000, (4,), generator=host))
        weights.copy_(torch.rand(4, generator=host).round(decimals=1))
        dloss.fill_(seed)

    refill(0)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in (1, 2):
        refill(seed)
        graph.replay()
        got = [t.clone() for t in (loss, grad, chunk)]
        want = results_of(illada.masked_cross_entropy, logits, targets, weights)
        torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[1].cpu(), seed * want[3], rtol=1e-2, atol=1e-9)
        torch.testing.assert_close(got[2].cpu(), want[3], rtol=1e-2, atol=1e-9)


def wrong_raw_calls(logits, targets, weights, outputs):
    host = torch.zeros(4)
    nll, inside = outputs["nll"], logits.view(-1)
    workspace = outputs["workspace"]
    yield "targets must be device memory, got a pointer to host memory", (logits, targets.cpu(), weights), {}
    yield "targets must not be null", (logits, targets[:0], weights), {}
    yield "token_weights must be device memory", (logits, targets, host), {}
    yield "rows must be device memory", (logits, targets, weights), {"rows": host.int()}
    yield "normalizer must be device memory", (logits, targets, weights), {"normalizer": host[0]}
    yield "nll must be device memory", (logits, targets, weights), {"nll": host}
    yield "lse must be device memory", (logits, targets, weights), {"lse": host}
    yield "target_logit must be device memory", (logits, targets, weights), {"target_logit": host}
    yield "grad must be device memory", (logits, targets, weights), {"grad": logits.cpu()}
    yield "nll overlaps lse", (logits, targets, weights), {"lse": nll}
    yield "nll overlaps token_weights", (logits, targets, weights), {"nll": weights}
    yield "target_logit overlaps logits", (logits, targets, weights), {"target_logit": inside[:8].view(torch.float32)}
    yield "grad overlaps logits", (logits[:3], targets, weights), {"grad": logits[1:]}
    yield (
        "grad row stride 1 is less than vocab_size",
        (logits, targets, weights),
        {"grad": logits.as_strided((4, 20000), (1, 1))},
    )
    part = logits[:, :19000]
    yield (
        "grad is logits, but its row stride is 19500 and not 20000",
        (part, targets, weights),
        {"grad": logits.as_strided((4, 19000), (19500, 1))},
    )
    yield "logits have 4 rows, but there are 3 tokens", (logits, targets, weights[:3]), {}
    yield "vocab_start must not be negative", (logits, targets, weights), {"vocab_start": -1}
    yield "vocab_size must be positive", (logits[:, :0], targets, weights), {}
    yield f"workspace must have {len(workspace)} bytes, got 8", (logits, targets, weights), {"workspace": workspace[:8]}
    yield "workspace must have .* bytes, got 0", (logits, targets, weights), {"workspace": None}
    yield "workspace must be 16-byte aligned", (logits, targets, weights), {"workspace": torch.cat([workspace] * 2)[8:]}
    yield "workspace must be device memory", (logits, targets, weights), {"workspace": workspace.cpu()}
    yield "workspace overlaps logits", (logits, targets, weights), {"workspace": inside.view(torch.uint8)}
    yield "inputs are on the CPU, but the outputs are on cuda", (logits.cpu(), targets, weights), {}


def test_wrong_raw_calls(device):
    logits = torch.zeros(4, 20000, dtype=torch.bfloat16, device=device)
    targets, weights = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, device=device)
    outputs = raw_buffers(logits, weights)
    for message, arguments, keywords in wrong_raw_calls(logits, targets, weights, outputs):
        with pytest.raises(ValueError, match=message):
            raw.masked_cross_entropy(*arguments, **{**outputs, **keywords})
        assert (outputs["nll"] == -7).all() and (outputs["lse"] == -7).all() and not logits.any(), message
    lse, lse_parts, grad = outputs["lse"], outputs["lse_parts"], torch.empty_like(logits)
    for message, arguments, keywords in [
        (r"lse_parts must have shape \[4, 2\], got \[4\]", (grad, logits, targets, weights, lse), {}),
        ("grad must not be null", (grad[:0], logits, targets, weights, lse_parts), {}),
        ("dlse must be device memory", (grad, logits, targets, weights, lse_parts), {"dlse": lse.cpu()}),
        ("dloss must be device memory", (grad, logits, targets, weights, lse_parts), {"dloss": lse.cpu()[0]}),
        ("grad overlaps logits", (logits[1:], logits[:3], targets, weights, lse_parts[:3]), {}),
        (
            "grad overlaps lse_parts",
            (lse_parts[:2].view(1, 4), weights.view(1, 4), targets[:1], weights[:1], lse_parts[:1]),
            {},
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            raw.masked_cross_entropy_backward(*arguments, **keywords)
    with pytest.raises(ValueError, match="loss overlaps nll"):
        raw.weighted_sum(lse[:1], lse, weights)
    raw.masked_cross_entropy(logits, targets, weights, **outputs)  # and no error was left behind
    torch.testing.assert_close(outputs["nll"].cpu(), torch.full((4,), 20000.0).log())
