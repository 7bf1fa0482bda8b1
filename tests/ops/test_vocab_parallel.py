"""The loss over shards of the vocabulary: two gloo processes against one that holds all of it."""

import pytest
import torch
import torch.distributed as dist
from two_processes import gloo, run_in_two

import illada
from illada.ops import reference
from illada.testing import assert_close_like

TOKENS, WIDTH, VOCAB = 60, 16, 301
BOUNDS = [0, 100, VOCAB]  # shards of different sizes
CASES = [
    {"dtype": torch.float32},
    {"dtype": torch.float32, "chunk_rows": 7, "rows": True, "normalizer": 12.5},
    {"dtype": torch.bfloat16, "normalizer": torch.tensor(3)},
    {"dtype": torch.float32, "autocast": True, "rows": True},
    {"dtype": torch.float32, "hidden_grad": False},
    {"dtype": torch.float32, "masked": 0.0},
]


def make_problem(dtype, masked=0.5):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[:4] = torch.tensor([0, 99, 100, VOCAB - 1])  # both ends of both shards
    weights = torch.where(
        torch.rand(TOKENS, generator=generator) < masked, 10 * torch.rand(TOKENS, generator=generator), 0
    )
    hidden[weights == 0] = torch.nan  # nobody may look
    return hidden, weight, targets, weights


def vocab_parallel_results(case):
    """Return loss, nll, d_hidden and d_weight of this process's shard."""
    case = dict(case)
    hidden, weight, targets, weights = make_problem(case.pop("dtype"), case.pop("masked", 0.5))
    start, end = BOUNDS[dist.get_rank() :][:2]
    hidden.requires_grad_(case.pop("hidden_grad", True))
    shard = weight[start:end].clone().requires_grad_()
    if case.pop("rows", False):
        case["rows"] = weights.nonzero().squeeze(-1).int()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.pop("autocast", False)):
        loss, nll = illada.linear_masked_cross_entropy_vocab_parallel(
            hidden, shard, targets, weights, vocab_start=start, return_nll=True, **case
        )
    (2 * loss).backward()
    return loss.detach(), nll, hidden.grad, shard.grad


def run_process(folder):
    with gloo(folder) as rank:
        torch.save([vocab_parallel_results(case) for case in CASES], f"{folder}/{rank}.pt")
        hidden, weight, targets, weights = make_problem(torch.float32)
        targets[int(weights.nonzero()[0])] = VOCAB
        start, end = BOUNDS[rank:][:2]
        with pytest.raises(ValueError, match=f"target {VOCAB} is in no shard, and its weight is not zero"):
            illada.linear_masked_cross_entropy_vocab_parallel(
                hidden, weight[start:end], targets, weights, vocab_start=start
            )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(run_process, folder, timeout=120)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def whole_results(case, dtype):
    """Return the results of one process, by plain torch."""
    hidden, weight, targets, weights = make_problem(case["dtype"], case.get("masked", 0.5))
    hidden = torch.where(weights[:, None] != 0, hidden, 0).to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_()
    logits = hidden @ weight.T
    logits = logits if dtype == torch.float64 else logits.float()
    loss, nll = reference.masked_cross_entropy(
        logits, targets, weights, normalizer=case.get("normalizer"), return_nll=True
    )
    (2 * loss).backward()
    return loss.detach(), nll, hidden.grad, weight.grad


@pytest.mark.parametrize("index", range(len(CASES)))
def test_two_processes_make_the_whole(index, two_processes):
    case = CASES[index]
    first, second = two_processes[0][index], two_processes[1][index]
    for a, b in zip(first[:3], second[:3], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # the same everywhere
    got = (*first[:3], torch.cat([first[3], second[3]]))
    want = whole_results(case, torch.float64)
    baseline = whole_results(case, torch.bfloat16 if case.get("autocast") else case["dtype"])
    for g, w, b in zip(got, want, baseline, strict=True):
        if g is not None:
            assert_close_like(g.to(b.dtype), w, b)
    if case.get("masked") == 0:
        assert all((field == 0).all() for field in got)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_halves_of_a_shard(offset, generator):
    logits = torch.randn(20, 300, generator=generator) + offset
    targets, weights = torch.randint(300, (20,), generator=generator), torch.rand(20, generator=generator).round()
    logits[weights == 0] = torch.nan
    leaf = logits.clone().requires_grad_()
    want_loss, want_lse = illada.masked_cross_entropy(leaf, targets, weights, normalizer=7.0, return_lse=True)
    (want,) = torch.autograd.grad(3 * want_loss + want_lse.square().sum(), leaf)

    parts, starts = logits.split([1, 100, 199], dim=1), (0, 1, 101)
    halves = [illada.masked_cross_entropy_shard(x, targets, weights, vocab_start=s) for x, s in zip(parts, starts, strict=True)]  # fmt: skip
    lse = torch.where(weights != 0, torch.stack([h[0] for h in halves]).logsumexp(0), 0)
    target_logit = torch.stack([h[1] for h in halves]).sum(0)
    torch.testing.assert_close(lse.float(), want_lse)
    torch.testing.assert_close(weights @ (lse - target_logit).float() / 7.0, want_loss)
    rest = {"normalizer": 7.0, "dloss": torch.tensor(3.0), "dlse": 2 * lse.float()}
    grads = [
        illada.masked_cross_entropy_shard_grad(x.clone(), targets, weights, lse, vocab_start=s, inplace=s == 1, **rest)
        for x, s in zip(parts, starts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(grads, 1), want)


def test_wrong_shards(generator):
    hidden, weight, targets, weights = make_problem(torch.float32)
    logits, whole = torch.zeros(TOKENS, 9), torch.zeros(TOKENS)
    forward, backward = illada.masked_cross_entropy_shard, illada.masked_cross_entropy_shard_grad
    loss = illada.linear_masked_cross_entropy_vocab_parallel
    for error, match, call in [
        (ValueError, "vocab_start must not be negative, got -1", lambda: forward(logits, targets, weights, vocab_start=-1)),
        (ValueError, "vocab_start must not be negative, got -1", lambda: loss(hidden, weight, targets, weights, vocab_start=-1)),
        (ValueError, r"targets must have shape \[60\]", lambda: forward(logits, targets[1:], weights, vocab_start=0)),
        (TypeError, "logits must be float32, bfloat16, got float64", lambda: forward(logits.double(), targets, weights, vocab_start=0)),
        (ValueError, r"lse must have shape \[60\]", lambda: backward(logits, targets, weights, whole[1:], vocab_start=0)),
        (TypeError, "dlse must be float32", lambda: backward(logits, targets, weights, whole, vocab_start=0, dlse=whole.double())),
        (ValueError, r"dloss must have shape \[\]", lambda: backward(logits, targets, weights, whole, vocab_start=0, dloss=whole)),
        (ValueError, "normalizer must be finite and positive", lambda: backward(logits, targets, weights, whole, vocab_start=0, normalizer=0.0)),
        (ValueError, r"weight_shard must have shape \[V, 16\]", lambda: loss(hidden, weight[:, 1:], targets, weights, vocab_start=0)),
        (TypeError, "weight_shard must be float32", lambda: loss(hidden, weight.bfloat16(), targets, weights, vocab_start=0)),
        (ValueError, "chunk_rows must be at least 1, got 0", lambda: loss(hidden, weight, targets, weights, vocab_start=0, chunk_rows=0)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_one_process_alone(tmp_path, monkeypatch, generator):
    hidden, weight, targets, weights = make_problem(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        products = []
        monkeypatch.setattr(
            torch, "mm", lambda *args, mm=torch.mm, **keywords: products.append(args) or mm(*args, **keywords)
        )
        loss = illada.linear_masked_cross_entropy_vocab_parallel
        with torch.no_grad():
            alone = loss(*leaves, targets, weights, vocab_start=0)
        assert len(products) == 1 and not alone.requires_grad
        assert loss(*leaves, targets, weights, vocab_start=0) == alone and len(products) > 2
        (gradient,) = torch.autograd.grad(loss(*leaves, targets, weights, vocab_start=0), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.square().sum().backward()
        with pytest.raises(ValueError, match=r"weight_shard must have at least one row, got \[0, 16\]"):
            loss(hidden, weight[:0], targets, weights, vocab_start=0)
        strided = torch.stack([weights, weights], dim=1)[:, 0]
        torch.testing.assert_close(loss(*leaves, targets, strided, vocab_start=0), alone)
    finally:
        dist.destroy_process_group()
