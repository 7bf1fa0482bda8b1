"""masked_cross_entropy on every device against its specification: values, gradients, layouts, shards, errors.

The linear loss is in test_ops_linear_loss.py; what it has on CPUs alone is at the end of this file.
"""

import os
import subprocess
import sys

import pytest
import torch
from loss_cases import assert_like_plain, make_rows, plain_results, results_of

import illada
from illada.ops import raw, reference
from illada.testing import assert_close_like

DTYPES = [torch.float32, torch.bfloat16]
EVERY_DTYPE = [*DTYPES, pytest.param(torch.float16, marks=pytest.mark.only("cuda"))]
ROWS = [  # T, V, share of masked rows, spread: what the row is for
    (1, 1, 1.0, 1.0),  # one word: loss 0, gradient 0
    (2, 7, 1.0, 1.0),  # less than a vector
    (0, 50, 1.0, 1.0),  # no tokens
    (127, 129, 0.5, 1.0),
    (128, 1000, 1.0, 0.02),  # flat, as at initialisation
    (129, 1001, 0.3, 30.0),  # peaked, rows that start anywhere
    (300, 264, 0.5, 1.0),
    (5, 4096, 1.0, 3.0),
    (3, 16385, 1.0, 1.0),  # one id more than a vocab tile
    (2, 155136, 1.0, 2.0),  # iLLaDA
]


def make(tokens, width, vocab, share, spread, dtype, generator):
    hidden = (torch.randn(tokens, width, generator=generator) * spread / width**0.5).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1  # first and last column
    masked = torch.rand(tokens, generator=generator) < share
    # 1 / p reaches 1000 at t = 0.
    weights = torch.where(masked, 10 ** (3 * torch.rand(tokens, generator=generator)), 0.0)
    return hidden, weight, targets, weights


def grads_of(function, tensors, *args, **kwargs):
    leaves = [x.detach().requires_grad_() for x in tensors]
    loss, nll = function(*leaves, *args, return_nll=True, **kwargs)
    return loss, nll, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("case", ROWS)
def test_matches_fp64(case, dtype, device, generator):
    token_dtype = torch.int32 if case[0] % 2 else torch.int64
    logits, targets, weights = make_rows(case, dtype, device, generator, token_dtype)
    arguments = {"normalizer": 12.5, "lse_factor": 0.0 if case[0] % 3 else 0.125}
    got = results_of(illada.masked_cross_entropy, logits, targets, weights, **arguments)
    assert_like_plain(got, *plain_results(logits, targets, weights, **arguments))
    for field in got[1:]:
        assert (field[weights.cpu() == 0] == 0).all()
    assert got[3].is_contiguous()


@pytest.mark.parametrize("kind", ["rows", "normalizer", "host normalizer", "nothing masked"])
def test_arguments(kind, device, generator):
    logits, targets, weights = make_rows((40, 333, 0.5, 1.0), torch.float32, device, generator)
    keywords = {}
    only = weights
    if kind == "rows":
        keywords["rows"] = torch.arange(0, 40, 3, dtype=torch.int32, device=device)
        only = torch.zeros_like(weights).index_copy(0, keywords["rows"].long(), weights[::3])
    elif kind == "nothing masked":
        only = weights = torch.zeros_like(weights)
    else:
        keywords["normalizer"] = torch.tensor(7, device=device if kind == "normalizer" else "cpu")
    got = results_of(illada.masked_cross_entropy, logits, targets, weights, **keywords)
    assert_like_plain(got, *plain_results(logits, targets, only, normalizer=keywords.get("normalizer", 1.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", range(0, 8, 3))
def test_every_alignment(start, dtype, device, generator):
    """Rows of logits and of the gradient start at different places between two multiples of 16 bytes."""
    for stride in (57, 60, 64):
        memory = torch.randn(8 * 64, generator=generator).to(dtype).to(device)
        logits = memory.as_strided((7, 50), (stride, 1), start)
        targets, weights = torch.arange(7, device=device) * 8, torch.arange(7.0, device=device)
        got = results_of(illada.masked_cross_entropy, logits, targets, weights)
        assert_like_plain(got, *plain_results(logits, targets, weights))


def test_rows_may_be_one_in_memory(device, generator):
    row = torch.randn(1, 700, generator=generator).to(device)
    targets, weights = torch.arange(9, device=device), torch.ones(9, device=device)
    got = illada.masked_cross_entropy(row.expand(9, -1), targets, weights, return_nll=True)
    want = reference.masked_cross_entropy(row.double().expand(9, -1), targets, weights, return_nll=True)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [1000, 40001])
def test_results_depend_on_the_row_alone(vocab, device, generator):
    logits, targets, weights = make_rows((1, vocab, 1.0, 3.0), torch.bfloat16, device, generator)
    alone = results_of(illada.masked_cross_entropy, logits, targets, weights)
    many = results_of(
        *(illada.masked_cross_entropy, logits.repeat(70, 1), targets.repeat(70), weights.repeat(70)), normalizer=1.0
    )
    for got, want in zip(many[1:3], alone[1:3], strict=True):
        assert (got == want).all()  # to the bit
    again = results_of(illada.masked_cross_entropy, logits.repeat(70, 1), targets.repeat(70), weights.repeat(70))
    assert all(torch.equal(a, b) for a, b in zip(many, again, strict=True))


def test_nan_and_infinities_stay_in_their_rows(device):
    logits = torch.zeros(5, 20000, device=device)
    logits[0, 19999], logits[1, 7], logits[2, :], logits[3, 5:] = torch.nan, torch.inf, -torch.inf, -torch.inf
    _, nll, lse, grad = results_of(
        *(illada.masked_cross_entropy, logits, torch.tensor([0, 0, 0, 4, 1], device=device)),
        torch.ones(5, device=device),
    )
    assert nll.isnan().tolist() == [True, True, True, False, False] and lse[2] == -torch.inf
    assert grad[3:].isfinite().all()
    torch.testing.assert_close(nll[3:], torch.tensor([5.0, 20000.0]).log())


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
@pytest.mark.parametrize("case", [(9, 1001, 0.5, 1.0), (3, 40000, 1.0, 1.0)])
def test_backward_in_place(case, dtype, device, generator):
    logits, targets, weights = make_rows(case, dtype, device, generator)
    want = results_of(illada.masked_cross_entropy, logits, targets, weights, lse_factor=0.5)
    leaf = logits.detach().requires_grad_()
    loss, lse = illada.masked_cross_entropy(leaf, targets, weights, return_lse=True, inplace_backward=True)
    total = loss + 0.5 * lse.square().sum()
    (grad,) = torch.autograd.grad(total, leaf, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad.cpu(), want[3])
    assert not logits.isnan().any()
    with pytest.raises(RuntimeError, match="the backward runs once; it has overwritten the logits"):
        torch.autograd.grad(total, leaf)


def test_backward_in_place_refuses(device):
    targets, weights = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"rows of logits that do not overlap, got strides \(0, 1\)"):
        illada.masked_cross_entropy(
            torch.zeros(1, 8, device=device).expand(3, 8), targets, weights, inplace_backward=True
        )
    leaf = torch.zeros(3, 8, device=device, requires_grad=True)
    loss = illada.masked_cross_entropy(leaf, targets, weights, inplace_backward=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_shards_together_are_the_whole(dtype, device, generator):
    logits, targets, weights = make_rows((20, 30000, 0.7, 3.0), dtype, device, generator)
    bounds = [0, 1000, 17500, 30000]
    targets[2:5] = torch.tensor([999, 1000, 17499], device=device)
    parts = [logits[:, a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    starts = bounds[:-1]
    halves = [illada.masked_cross_entropy_shard(x, targets, weights, vocab_start=a) for x, a in zip(parts, starts, strict=True)]  # fmt: skip
    lse = torch.where(weights != 0, torch.stack([h[0] for h in halves]).logsumexp(0), 0)
    target_logit = torch.stack([h[1] for h in halves]).sum(0)
    grads = [
        illada.masked_cross_entropy_shard_grad(x, targets, weights, lse, vocab_start=a, normalizer=7.0)
        for x, a in zip(parts, starts, strict=True)
    ]
    nll = (lse - target_logit).float().cpu()
    loss = nll @ weights.cpu() / 7.0
    got = (loss, nll, lse.float().cpu(), torch.cat([g.cpu() for g in grads], 1))
    assert_like_plain(got, *plain_results(logits, targets, weights, normalizer=7.0))
    inside = illada.masked_cross_entropy_shard_grad(
        parts[1], targets, weights, lse, vocab_start=1000, normalizer=7.0, inplace=True
    )
    assert inside.data_ptr() == parts[1].data_ptr() and torch.equal(inside, grads[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_has_a_gradient(dtype, inplace, generator):
    hidden, weight, targets, weights = make(37, 16, 1001, 0.5, 1.0, dtype, generator)
    logits = hidden @ weight.T

    def results(function, x, **keywords):
        leaf = x.detach().clone().requires_grad_()
        loss, nll, lse = function(leaf, targets, weights, return_nll=True, return_lse=True, **keywords)
        (grad,) = torch.autograd.grad(loss + 0.125 * lse.square().sum(), leaf)
        assert not keywords or (grad.data_ptr() == leaf.data_ptr()) == inplace
        return loss, nll, lse, grad

    got = results(illada.masked_cross_entropy, logits, inplace_backward=inplace)
    want = results(reference.masked_cross_entropy, logits.double())
    baseline = results(reference.masked_cross_entropy, logits)
    for g, w, b in zip(got, want, baseline, strict=True):
        assert_close_like(g.to(b.dtype), w, b)
    (lse,) = illada.masked_cross_entropy(logits.requires_grad_(), targets, weights, return_lse=True)[1:]
    (alone,) = torch.autograd.grad(lse.sum(), logits)  # without a loss
    torch.testing.assert_close(alone.float().sum(1), (weights != 0).float(), rtol=0.02, atol=0)


def test_backward_in_place_compiles(generator):
    leaf = torch.randn(3, 8, generator=generator, requires_grad=True)
    targets, weights = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    whole = torch.compile(
        lambda x: illada.masked_cross_entropy(x * 2, targets, weights, inplace_backward=True),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    (got,) = torch.autograd.grad(whole(leaf), leaf)
    (want,) = torch.autograd.grad(illada.masked_cross_entropy(leaf * 2, targets, weights), leaf)
    torch.testing.assert_close(got, want)


def test_every_instruction_set_agrees(generator):
    # In processes of their own: the choice is made once.
    code = (
        "import torch, illada; g = torch.Generator().manual_seed(1);"
        "x = torch.randn(5, 1037, generator=g, requires_grad=True); y = torch.arange(5);"
        "loss = illada.masked_cross_entropy(x, y, torch.ones(5)); loss.backward();"
        "s = illada.sample_tokens(x, temperature=0.8, seed=3, extras=('entropy', 'margin'));"
        "print(illada.build_info()['cpu_isa'], float(loss), float(x.grad.abs().sum()), s.token.tolist(),"
        " float(s.entropy.sum()), float(s.margin.sum()))"
    )

    def run(isa):
        env = {**os.environ, "ILLADA_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return done.stdout.split(maxsplit=3)

    lines = [run(isa) for isa in ("baseline", "avx2", "avx512")]
    assert lines[0][0] == "baseline"
    for line in lines[1:]:
        assert line[3].split("]")[0] == lines[0][3].split("]")[0]  # the same tokens
        got, want = ([float(x) for x in parts[1:3] + parts[3].split("]")[1].split()] for parts in (line, lines[0]))
        assert got == pytest.approx(want, rel=2e-6)


def test_memory_stays_below_one_chunk(generator):
    # The profiler sees every allocation inside the op; none may be larger than a chunk of logits.
    hidden, weight, targets, weights = make(400, 4, 5000, 1.0, 1.0, torch.float32, generator)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with torch.profiler.profile(profile_memory=True) as profile:
        illada.linear_masked_cross_entropy(*leaves, targets, weights, chunk_rows=50).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest == 50 * 5000 * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_spread_logits_hold_no_denormals(dtype, generator):
    # The GEMMs behind this op would be many times slower on them.
    logits = (60 * torch.randn(40, 1003, generator=generator)).to(dtype).requires_grad_()
    targets, weights = torch.randint(1003, (40,), generator=generator), torch.full((40,), 1e-3)
    (grad,) = torch.autograd.grad(illada.masked_cross_entropy(logits, targets, weights, normalizer=1e4), logits)
    assert ((grad == 0) | (grad.abs() >= torch.finfo(dtype).tiny)).all()
    assert 0.5 < (grad == 0).float().mean() < 1


def test_registration(generator):
    hidden, weight, targets, weights = make(12, 8, 40, 0.5, 1.0, torch.float32, generator)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    fp32 = torch.float32
    torch.library.opcheck(
        torch.ops.illada.linear_masked_ce_fwd.default,
        (*leaves, targets, weights, None, None, 1.0, 0, True, True, fp32, fp32, 0.0),
    )
    torch.library.opcheck(
        torch.ops.illada.linear_masked_ce_fwd_.default,
        (*(x.detach() for x in leaves), targets, weights, None, None, 1.0, 0, True, True, fp32, fp32, 0.0, weight * 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.illada.linear_masked_ce_bwd.default, (torch.tensor(2.0), hidden.detach(), weight.detach())
    )
    logits = (hidden @ weight.T).detach().requires_grad_()
    for inplace in (False, True):
        torch.library.opcheck(torch.ops.illada.masked_ce_fwd.default, (logits, targets, weights, None, 1.0, inplace))
    lse_parts = torch.stack([logits.detach().logsumexp(-1), torch.zeros(12)], dim=-1)
    rest = (torch.tensor(3.0), 1.0, lse_parts, torch.tensor(2.0), torch.ones(12), 5)
    for op in (torch.ops.illada.masked_ce_bwd.default, torch.ops.illada.masked_ce_bwd_.default):
        torch.library.opcheck(op, (logits.detach().clone(), targets, weights, *rest))
    torch.library.opcheck(torch.ops.illada.masked_ce_shard_fwd.default, (logits.detach(), targets, weights, 5))


@pytest.mark.parametrize("function", ["linear_masked_cross_entropy", "masked_cross_entropy"])
def test_double_backward_raises(function, generator):
    hidden, weight, targets, weights = make(5, 8, 20, 1.0, 1.0, torch.float32, generator)
    leaf = (hidden @ weight.T if function == "masked_cross_entropy" else hidden).requires_grad_()
    head = () if function == "masked_cross_entropy" else (weight,)
    loss = getattr(illada, function)(leaf, *head, targets, weights)
    (grad,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_flops_count_masked_rows_only(generator):
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets, weights = make(30, 8, 40, 0.5, 1.0, torch.float32, generator)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with FlopCounterMode(display=False) as counter:
        illada.linear_masked_cross_entropy(*leaves, targets, weights).backward()
    assert counter.get_total_flops() == 6 * int((weights != 0).sum()) * 40 * 8


def test_errors(generator):
    logits, targets, weights = torch.randn(6, 8, generator=generator), torch.zeros(6, dtype=torch.int64), torch.ones(6)
    rows, columns = torch.arange(6, dtype=torch.int32), torch.randn(50, 8, generator=generator)[:8].T
    loss = illada.masked_cross_entropy
    wrong = [
        (ValueError, r"masked_cross_entropy: rows must be in \[0, 6\), got -1 .. 4", lambda: loss(logits, targets, weights, rows=rows - 1)),
        (ValueError, r"normalizer must have shape \[\], got \[1\]", lambda: loss(logits, targets, weights, normalizer=torch.ones(1))),
        (TypeError, "logits must be float32, bfloat16, got float16", lambda: loss(logits.half(), targets, weights)),
        (ValueError, "last dimension of logits must be contiguous", lambda: loss(columns, torch.zeros(8, dtype=torch.int64), torch.ones(8))),
    ]  # fmt: skip
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()


def test_the_raw_backward_takes_lse_in_two_parts(generator):
    """An lse [N], which the backward once took, has half of the numbers that are read."""
    logits, targets, weights = torch.randn(3, 8, generator=generator), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    for lse_parts, error, message in [
        (torch.zeros(3), ValueError, r"lse_parts must have shape \[3, 2\], got \[3\]"),
        (torch.zeros(2, 2), ValueError, r"lse_parts must have shape \[3, 2\], got \[2, 2\]"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), TypeError, "lse_parts must be float32, got bfloat16"),
    ]:
        with pytest.raises(error, match=f"^raw.masked_cross_entropy_backward: {message}"):
            raw.masked_cross_entropy_backward(torch.empty_like(logits), logits, targets, weights, lse_parts)
