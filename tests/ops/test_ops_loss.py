"""Both cross-entropies against their specification: values, gradients, chunks, registration, errors."""

import os
import subprocess
import sys

import pytest
import torch

import illada
from illada.ops import raw, reference
from illada.testing import assert_close_like, relative_error

CASES = [  # T, C, V, share of masked rows, spread of the logits: what the row is for
    (1, 8, 1, 1.0, 1.0),  # one token, one word
    (37, 16, 1001, 0.5, 1.0),  # a vocabulary that is a multiple of nothing
    (150, 8, 130, 1.0, 30.0),  # all masked, more rows than one chunk, peaked
    (9, 32, 155136, 0.4, 0.02),  # iLLaDA's vocabulary, flat as at initialisation
]
DTYPES = [torch.float32, torch.bfloat16]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_linear_matches_fp64(case, dtype, generator):
    hidden, weight, targets, weights = make(*case, dtype, generator)
    rest = {"targets": targets, "token_weights": weights, "normalizer": 12.5}
    got = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), **rest, chunk_rows=64)
    baseline = grads_of(reference.linear_masked_cross_entropy, (hidden, weight), **rest)
    want = grads_of(reference.linear_masked_cross_entropy, (hidden.double(), weight.double()), **rest)
    for g, w, b in zip(got, want, baseline, strict=True):
        assert_close_like(g.to(b.dtype), w, b)
    assert (got[2][weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_logits_match_fp64(case, dtype, generator):
    hidden, weight, targets, weights = make(*case, dtype, generator)
    wide = torch.full((case[0], case[2] + 5), torch.nan, dtype=dtype)  # poison beside every row
    wide[:, : case[2]] = hidden @ weight.T
    logits = wide[:, : case[2]]
    logits[weights == 0] = torch.nan  # rows without a weight are never read
    got = grads_of(illada.masked_cross_entropy, (logits,), targets, weights)
    clean = logits.nan_to_num()
    baseline = grads_of(reference.masked_cross_entropy, (clean,), targets, weights)
    want = grads_of(reference.masked_cross_entropy, (clean.double(),), targets, weights)
    for g, w, b in zip(got, want, baseline, strict=True):
        assert_close_like(g.to(b.dtype), w, b)


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


def test_backward_in_place_runs_once(generator):
    leaf = torch.randn(3, 8, generator=generator, requires_grad=True)
    targets, weights = torch.zeros(3, dtype=torch.int64), torch.ones(3)
    loss = illada.masked_cross_entropy(leaf, targets, weights, inplace_backward=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True has no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward runs once; it has overwritten the logits"):
        torch.autograd.grad(loss, leaf)
    row = leaf[:1].expand(3, 8)
    with pytest.raises(
        ValueError, match=r"rows of logits that do not overlap, got strides \(0, 1\) for shape \[3, 8\]"
    ):
        illada.masked_cross_entropy(row, targets, weights, inplace_backward=True)
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


def test_rows_normalizer_and_chunks_do_not_change_the_result(generator):
    hidden, weight, targets, weights = make(40, 16, 300, 0.5, 1.0, torch.float32, generator)
    rest = (targets, weights)
    want = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), *rest, normalizer=7.0)
    rows = weights.nonzero().squeeze(-1).int()
    variants = [
        {"normalizer": 7.0, "rows": rows},
        {"normalizer": torch.tensor(7.0)},
        {"normalizer": 7.0, "chunk_rows": 3},
        {"normalizer": 7.0, "grad_weight_dtype": torch.float32},
    ]
    for variant in variants:
        got = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), *rest, **variant)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    part = rows[::2].contiguous()
    only = torch.zeros_like(weights).index_copy(0, part.long(), weights[part.long()])
    for function, tensors in (
        (illada.linear_masked_cross_entropy, (hidden, weight)),
        (illada.masked_cross_entropy, (hidden @ weight.T,)),
    ):
        got = grads_of(function, tensors, *rest, rows=part)
        for g, w in zip(got, grads_of(function, tensors, targets, only), strict=True):
            torch.testing.assert_close(g, w)


def test_nothing_masked(generator):
    hidden, weight, targets, weights = make(6, 8, 50, 0.0, 1.0, torch.float32, generator)
    for function, tensors in (
        (illada.linear_masked_cross_entropy, (hidden, weight)),
        (illada.masked_cross_entropy, (hidden @ weight.T,)),
    ):
        loss, nll, *grads = grads_of(function, tensors, targets, weights)
        assert loss == 0 and (nll == 0).all()
        assert all((g == 0).all() for g in grads)


def test_upstream_gradient_and_partial_requirements(generator):
    hidden, weight, targets, weights = make(20, 16, 90, 0.5, 1.0, torch.float32, generator)
    whole = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), targets, weights)
    leaf = hidden.detach().requires_grad_()
    loss = illada.linear_masked_cross_entropy(leaf, weight, targets, weights)
    (3 * loss).backward()  # the head alone is frozen
    torch.testing.assert_close(leaf.grad, 3 * whole[2])
    with torch.no_grad():
        assert illada.linear_masked_cross_entropy(leaf, weight, targets, weights).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_added_to_a_buffer(dtype, generator):
    hidden, weight, targets, weights = make(60, 16, 300, 0.5, 1.0, torch.float32, generator)
    want = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), targets, weights, normalizer=9.0)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    before = torch.randn(weight.shape, generator=generator).to(dtype)
    buffer = before.clone()
    keywords = {"normalizer": 9.0, "chunk_rows": 7, "grad_weight": buffer}
    loss, nll = illada.linear_masked_cross_entropy(*leaves, targets, weights, return_nll=True, **keywords)
    (loss + leaves[0].sum()).backward()  # a sum that it is part of
    torch.testing.assert_close(loss.detach(), want[0].detach())
    torch.testing.assert_close(nll, want[1])
    torch.testing.assert_close(leaves[0].grad - 1, want[2], rtol=1e-5, atol=1e-5)
    assert leaves[1].grad is None
    torch.testing.assert_close(
        buffer.float(), before.float() + want[3], **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {})
    )
    again = buffer.clone()
    loss = illada.linear_masked_cross_entropy(
        *leaves, targets, weights, **{**keywords, "grad_weight": torch.zeros_like(buffer)}
    )
    with pytest.raises(RuntimeError, match="must arrive in the total unscaled.*got a gradient of 0.5"):
        (loss / 2).backward()
    with torch.no_grad():
        assert illada.linear_masked_cross_entropy(*leaves, targets, weights, **keywords) == loss
    assert torch.equal(buffer, again)


def test_autocast_keeps_fp32_gradients(generator):
    hidden, weight, targets, weights = make(60, 64, 500, 0.5, 1.0, torch.float32, generator)
    want = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        got = grads_of(illada.linear_masked_cross_entropy, (hidden, weight), targets, weights)
    assert got[2].dtype == got[3].dtype == torch.float32
    assert 1e-5 < relative_error(got[3], want[3]) < 1e-2


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


def test_compiles_in_one_graph(generator):
    def loss_of(hidden, weight, targets, weights, rows):
        return illada.linear_masked_cross_entropy(hidden * 2, weight, targets, weights, rows=rows, normalizer=9.0)

    hidden, weight, targets, weights = make(12, 8, 40, 0.5, 1.0, torch.float32, generator)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    rows = weights.nonzero().squeeze(-1).int()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    want = loss_of(*leaves, targets, weights, rows)
    got = compiled(*leaves, targets, weights, rows)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(g, w)


def test_flops_count_masked_rows_only(generator):
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets, weights = make(30, 8, 40, 0.5, 1.0, torch.float32, generator)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    with FlopCounterMode(display=False) as counter:
        illada.linear_masked_cross_entropy(*leaves, targets, weights).backward()
    assert counter.get_total_flops() == 6 * int((weights != 0).sum()) * 40 * 8


def test_errors(generator):
    hidden, weight, targets, weights = make(6, 8, 50, 1.0, 1.0, torch.float32, generator)
    linear, plain = illada.linear_masked_cross_entropy, illada.masked_cross_entropy
    rows = torch.arange(6, dtype=torch.int32)
    bad = targets.clone()
    bad[3] = 50
    wrong = [
        (ValueError, r"weight must have shape \[V, 8\]", lambda: linear(hidden, weight[:, :4], targets, weights)),
        (TypeError, "hidden must be float32, bfloat16, got float64", lambda: linear(hidden.double(), weight.double(), targets, weights)),
        (TypeError, "weight must be float32, got bfloat16", lambda: linear(hidden, weight.bfloat16(), targets, weights)),
        (TypeError, "targets must be int64, int32, got float32", lambda: linear(hidden, weight, targets.float(), weights)),
        (TypeError, r"must be float32, got float64; pass token_weights.float\(\)$", lambda: linear(hidden, weight, targets, weights.double())),
        (ValueError, r"token_weights must have shape \[6\], got \[5\]", lambda: linear(hidden, weight, targets, weights[:5])),
        (TypeError, "rows must be int32, int64, got float32", lambda: linear(hidden, weight, targets, weights, rows=rows.float())),
        (ValueError, r"rows must be in \[0, 6\)", lambda: linear(hidden, weight, targets, weights, rows=rows + 1)),
        (ValueError, r"masked_cross_entropy: rows must be in \[0, 6\), got -1 .. 4", lambda: plain(hidden, targets, weights, rows=rows - 1)),
        (ValueError, r"rows must be in \[0, 6\), got -1 .. 4", lambda: illada.linear_masked_cross_entropy_vocab_parallel(hidden, weight, targets, weights, vocab_start=0, rows=rows - 1)),
        (ValueError, r"rows must ascend, each of them once, got \[1, 1\]", lambda: linear(hidden, weight, targets, weights, rows=rows[1:2].expand(2))),
        (ValueError, r"weight must have at least one row, got \[0, 8\]", lambda: linear(hidden, weight[:0], targets, weights)),
        (ValueError, "grad_weight shares memory with weight", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.detach())),
        (ValueError, "normalizer must be finite and positive, got 0", lambda: linear(hidden, weight, targets, weights, normalizer=0)),
        (ValueError, "normalizer must be finite and positive, got nan", lambda: linear(hidden, weight, targets, weights, normalizer=torch.tensor(torch.nan))),
        (ValueError, r"normalizer must have shape \[\], got \[1\]", lambda: plain(hidden, targets, weights, normalizer=torch.ones(1))),
        (ValueError, "chunk_rows must be at least 1, got 0", lambda: linear(hidden, weight, targets, weights, chunk_rows=0)),
        (TypeError, "grad_weight_dtype must be", lambda: linear(hidden, weight, targets, weights, grad_weight_dtype=torch.float64)),
        (ValueError, r"filter_eps must be in \[0, 1\), got 1", lambda: linear(hidden, weight, targets, weights, filter_eps=1)),
        (ValueError, r"grad_weight must have shape \[50, 8\], got \[8, 50\]", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.t())),
        (ValueError, "grad_weight must be contiguous", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.t().contiguous().t())),
        (TypeError, "grad_weight must be float32, bfloat16, got float64", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.double())),
        (ValueError, "grad_weight is on meta", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.to("meta"))),
        (ValueError, "grad_weight must not require grad", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.clone().requires_grad_())),
        (ValueError, "grad_weight brings its own dtype", lambda: linear(hidden, weight, targets, weights, grad_weight=weight.clone(), grad_weight_dtype=torch.float32)),
        (ValueError, r"targets\[3\] is 50, outside of \[0, 50\)", lambda: linear(hidden, weight, bad, weights)),
        (ValueError, "normalizer is on meta, but hidden is on cpu", lambda: linear(hidden, weight, targets, weights, normalizer=torch.ones((), device="meta"))),
        (TypeError, "logits must be float32, bfloat16, got float16", lambda: plain(hidden.half(), targets, weights)),
        (ValueError, "targets is on meta, but hidden is on cpu", lambda: linear(hidden, weight, targets.to("meta"), weights)),
        (ValueError, "last dimension of logits must be contiguous", lambda: plain(weight[:8].T, targets[:8], weights)),
    ]  # fmt: skip
    for error, match, call in wrong:
        with pytest.raises(error, match=match):
            call()
    weights[3] = 0  # now nobody asks for that target
    assert linear(hidden, weight, bad, weights).isfinite()


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
