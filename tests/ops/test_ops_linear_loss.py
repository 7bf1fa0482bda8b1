"""linear_masked_cross_entropy on every device: against float64, chunks, precision, gradients into a buffer, errors.

What one device alone has is in test_ops_loss.py (CPUs) and in tests/cuda/test_linear_loss*.py.
"""

import pytest
import torch
from devices import tracing
from loss_cases import assert_head_like_plain, expected_head, head_results, make_head
from torch.utils.checkpoint import checkpoint

import illada
from illada.ops import linear_loss
from illada.testing import relative_error

ON_CPU, ON_CUDA = pytest.mark.only("cpu"), pytest.mark.only("cuda")
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=ON_CUDA)]
CASES = [  # T, C, V, share of masked rows, spread of the logits: what the row is for
    (1, 8, 1, 1.0, 1.0),  # one token, one word
    (37, 16, 1001, 0.5, 1.0),  # a vocabulary that is a multiple of nothing
    (150, 8, 130, 1.0, 30.0),  # all masked, peaked, three chunks
    (300, 64, 1000, 0.3, 0.02),  # flat, as at initialisation
    (129, 24, 4096, 1.0, 1.0),
    pytest.param((3, 16, 155136, 0.7, 1.0), marks=ON_CUDA),  # iLLaDA's vocabulary
    pytest.param((9, 32, 155136, 0.4, 0.02), marks=ON_CPU),
]


@pytest.fixture(params=["chosen", pytest.param("portable", marks=ON_CUDA)], autouse=True)
def _path(request, monkeypatch):
    """Run each test with a GPU's own kernels, where it has some, and without them."""
    if request.param == "portable":
        monkeypatch.setattr(linear_loss.kernels, "forward_sm90", lambda *arguments, **keywords: None)


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_fp64(case, dtype, with_rows, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(case, dtype, device, generator)
    hidden = hidden[:, :width]
    keywords = {"rows": rows} if with_rows else {}
    got = head_results(
        illada.linear_masked_cross_entropy, hidden, weight, targets, weights, normalizer=12.5, chunk_rows=64, **keywords
    )
    assert_head_like_plain(got, *expected_head(hidden, weight, targets, weights, 12.5))
    assert (got[2][weights.cpu() == 0] == 0).all() and (got[1][weights.cpu() == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast_keeps_fp32(dtype, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(CASES[3], torch.float32, device, generator)
    hidden = hidden[:, :width]
    # Such a normalizer sends the gradients of float16 logits below what float16 holds, were it used before the GEMMs.
    normalizer = torch.tensor(1e5, device=device)
    with torch.autocast(device.type, dtype):
        got = head_results(
            *(illada.linear_masked_cross_entropy, hidden, weight, targets, weights),
            rows=rows, normalizer=normalizer, chunk_rows=40,
        )  # fmt: skip
    assert got[2].dtype == got[3].dtype == torch.float32
    want, baseline = expected_head(hidden, weight, targets, weights, 1e5, torch.bfloat16)
    assert_head_like_plain(got, want, baseline)
    assert 1e-5 < relative_error(got[3], want[3]) < 1e-2


def test_chunks_and_arguments_change_nothing(device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (70, 16, 300, 0.5, 1.0), torch.float32, device, generator
    )
    hidden = hidden[:, :width]
    want = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, normalizer=7.0)
    no_weight = torch.where(weights == 0)[0][:1].int()
    variants = [
        {"normalizer": 7.0, "rows": rows},
        {"normalizer": 7.0, "rows": torch.cat([no_weight, rows]).sort().values},  # NaNs in a row that is named
        {"normalizer": torch.tensor(7.0, device=device), "chunk_rows": 3},
        {"normalizer": torch.tensor(7.0), "chunk_rows": 1, "rows": rows},
        {"normalizer": torch.tensor(7, device=device), "chunk_rows": 1000},
        {"normalizer": 7.0, "grad_weight_dtype": torch.float32},
    ]
    for variant in variants:
        got = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets.int(), weights, **variant)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_rows_leave_the_others_out(device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (40, 16, 300, 0.5, 1.0), torch.float32, device, generator
    )
    hidden, part = hidden[:, :width], rows[::2].contiguous()
    only = torch.zeros_like(weights).index_copy(0, part.long(), weights[part.long()])
    got = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=part)
    for g, w in zip(got, head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, only), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_added_to_a_buffer(dtype, device, generator):
    (hidden, weight, targets, weights, _), width = make_head((60, 16, 300, 0.5, 1.0), torch.float32, device, generator)
    hidden = hidden[:, :width].nan_to_num()
    want = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, normalizer=9.0)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    before = torch.randn(weight.shape, generator=generator).to(dtype)
    buffer = before.clone().to(device)
    keywords = {"normalizer": 9.0, "chunk_rows": 7, "grad_weight": buffer}
    loss, nll = illada.linear_masked_cross_entropy(*leaves, targets, weights, return_nll=True, **keywords)
    (loss + leaves[0].sum()).backward()  # a sum that it is part of
    torch.testing.assert_close(loss.detach().cpu(), want[0])
    torch.testing.assert_close(nll.cpu(), want[1])
    torch.testing.assert_close(leaves[0].grad.cpu() - 1, want[2], rtol=1e-5, atol=1e-5)
    assert leaves[1].grad is None
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(buffer.cpu().float(), before.float() + want[3], **close)
    again = buffer.clone()
    with torch.no_grad():
        assert illada.linear_masked_cross_entropy(*leaves, targets, weights, **keywords) == loss
    assert torch.equal(buffer, again)


@pytest.mark.parametrize("with_rows", [True, False])
def test_nothing_masked(with_rows, device, generator):
    (hidden, weight, targets, weights, _), width = make_head((6, 8, 50, 0.0, 1.0), torch.bfloat16, device, generator)
    rows = torch.zeros(0, dtype=torch.int32, device=device) if with_rows else None
    got = head_results(
        illada.linear_masked_cross_entropy, hidden[:, :width], weight, targets, torch.zeros_like(weights), rows=rows
    )
    assert all((field == 0).all() for field in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_targets_of_any_stride(dtype, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head((70, 16, 300, 0.5, 1.0), dtype, device, generator)
    hidden = hidden[:, :width]
    want = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=rows)

    def strided(x):
        wide = torch.zeros(*x.shape, 3, dtype=x.dtype, device=device)
        wide[..., 0] = x
        return wide[..., 0]

    for keywords in ({"rows": strided(rows)}, {}):
        arguments = (hidden, weight, strided(targets), strided(weights))
        got = head_results(illada.linear_masked_cross_entropy, *arguments, **keywords)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got[0], want[0])
    hidden = hidden.nan_to_num()
    ones = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, torch.ones(70, device=device))
    got = head_results(
        illada.linear_masked_cross_entropy, hidden, weight, targets, torch.ones(1, device=device).expand(70)
    )
    torch.testing.assert_close(got[0], ones[0])


def test_scaled_loss_with_a_buffer_is_not_silent(device, generator):
    """A CPU reads the gradient that arrives, and raises. A GPU does not wait for it: the gradient of hidden is NaN."""
    (hidden, weight, targets, weights, _), width = make_head((20, 16, 90, 1.0, 1.0), torch.bfloat16, device, generator)
    leaf, buffer = hidden[:, :width].contiguous().requires_grad_(), torch.zeros(90, 16, device=device)
    loss = illada.linear_masked_cross_entropy(leaf, weight, targets, weights, grad_weight=buffer)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="must arrive in the total unscaled.*got a gradient of 0.5"):
            (loss / 2).backward()
    else:
        (loss / 2).backward()
        assert leaf.grad.isnan().all()


def test_partial_gradients_and_upstream_factor(device, generator):
    (hidden, weight, targets, weights, _), width = make_head((20, 16, 90, 1.0, 1.0), torch.float32, device, generator)
    hidden = hidden[:, :width].contiguous()
    whole = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights)
    for i, frozen in ((0, weight), (1, hidden)):
        leaf = (hidden, weight)[i].detach().requires_grad_()
        pair = (leaf, frozen) if i == 0 else (frozen, leaf)
        (3 * illada.linear_masked_cross_entropy(*pair, targets, weights)).backward()
        torch.testing.assert_close(leaf.grad.cpu(), 3 * whole[2 + i])
    with torch.no_grad():
        assert illada.linear_masked_cross_entropy(*pair, targets, weights).grad_fn is None
        loss, nll = illada.linear_masked_cross_entropy(hidden, weight, targets, weights, return_nll=True)
    torch.testing.assert_close(loss.cpu(), whole[0])
    torch.testing.assert_close(nll.cpu(), whole[1])


def test_backward_runs_once(device, generator):
    (hidden, weight, targets, weights, _), width = make_head((9, 8, 50, 1.0, 1.0), torch.float32, device, generator)
    leaf = hidden[:, :width].contiguous().requires_grad_()
    loss = illada.linear_masked_cross_entropy(leaf, weight, targets, weights)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    if device.type == "cpu":  # it keeps the gradients
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)
    else:
        with pytest.raises(RuntimeError, match="the backward runs once; the gradients .* given away"):
            torch.autograd.grad(loss, leaf)
    (grad,) = torch.autograd.grad(
        illada.linear_masked_cross_entropy(leaf, weight, targets, weights) ** 2, leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_weight_gradient_in_bfloat16(dtype, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head((90, 16, 300, 1.0, 1.0), dtype, device, generator)
    hidden = hidden[:, :width]
    want, baseline = expected_head(hidden, weight, targets, weights, None)
    got = head_results(
        illada.linear_masked_cross_entropy, hidden, weight, targets, weights, grad_weight_dtype=torch.bfloat16
    )
    got = (*got[:3], got[3].bfloat16())  # autograd gives it the weight's dtype
    assert_head_like_plain(got, want, (*baseline[:3], baseline[3].bfloat16()))


def elsewhere(x):
    """The same on another device."""
    return x.to("meta") if x.device.type == "cpu" else x.cpu()


def test_errors(device, monkeypatch):
    if device.type == "cuda":
        monkeypatch.setenv("ILLADA_DEBUG", "1")  # values are read
    here, other, f16 = ("cpu", "meta", "") if device.type == "cpu" else ("cuda:0", "cpu", ", float16")
    hidden, weight = torch.zeros(6, 8, device=device), torch.zeros(50, 8, device=device)
    targets, weights = torch.zeros(6, dtype=torch.int64, device=device), torch.ones(6, device=device)
    rows = torch.arange(6, dtype=torch.int32, device=device)
    bad = targets.clone()
    bad[3] = 50

    def linear(hidden=hidden, weight=weight, targets=targets, weights=weights, **keywords):
        return illada.linear_masked_cross_entropy(hidden, weight, targets, weights, **keywords)

    for error, match, call in [
        (ValueError, r"weight must have shape \[V, 8\]", lambda: linear(weight=weight[:, :4])),
        (TypeError, f"hidden must be float32, bfloat16{f16}, got float64", lambda: linear(hidden.double(), weight.double())),
        (TypeError, "weight must be float32, got bfloat16", lambda: linear(weight=weight.bfloat16())),
        (TypeError, "targets must be int64, int32, got float32", lambda: linear(targets=targets.float())),
        (TypeError, r"must be float32, got float64; pass token_weights.float\(\)$", lambda: linear(weights=weights.double())),
        (ValueError, r"token_weights must have shape \[6\], got \[5\]", lambda: linear(weights=weights[:5])),
        (TypeError, "rows must be int32, int64, got float32", lambda: linear(rows=rows.float())),
        (ValueError, r"rows must be in \[0, 6\), got 1 .. 6", lambda: linear(rows=rows + 1)),
        (ValueError, r"targets\[3\] is 50, outside of \[0, 50\)", lambda: linear(targets=bad)),
        (ValueError, r"weight must have at least one row, got \[0, 8\]", lambda: linear(weight=weight[:0])),
        (ValueError, "last dimension of weight must be contiguous", lambda: linear(weight=weight.t().contiguous().t())),
        (ValueError, "normalizer must be finite and positive, got 0", lambda: linear(normalizer=0)),
        (ValueError, "normalizer must be finite and positive, got nan", lambda: linear(normalizer=torch.tensor(torch.nan))),
        (ValueError, "normalizer must be finite and positive, got -1", lambda: linear(normalizer=torch.tensor(-1))),
        (ValueError, "chunk_rows must be at least 1, got 0", lambda: linear(chunk_rows=0)),
        (TypeError, "grad_weight_dtype must be", lambda: linear(grad_weight_dtype=torch.float64)),
        (ValueError, r"filter_eps must be in \[0, 1\), got 1", lambda: linear(filter_eps=1)),
        (ValueError, "grad_weight shares memory with weight", lambda: linear(grad_weight=weight.detach())),
        (ValueError, r"grad_weight must have shape \[50, 8\], got \[8, 50\]", lambda: linear(grad_weight=weight.t())),
        (ValueError, "grad_weight must be contiguous", lambda: linear(grad_weight=weight.t().contiguous().t())),
        (TypeError, "grad_weight must be float32, bfloat16, got float64", lambda: linear(grad_weight=weight.double())),
        (ValueError, f"grad_weight is on {other}", lambda: linear(grad_weight=elsewhere(weight))),
        (ValueError, "grad_weight must not require grad", lambda: linear(grad_weight=weight.clone().requires_grad_())),
        (ValueError, "grad_weight brings its own dtype", lambda: linear(grad_weight=weight.clone(), grad_weight_dtype=torch.float32)),
        (ValueError, f"weight is on {other}, but hidden is on {here}", lambda: linear(weight=elsewhere(weight))),
        (ValueError, f"targets is on {other}, but hidden is on {here}", lambda: linear(targets=elsewhere(targets))),
        (ValueError, f"normalizer is on meta, but hidden is on {here}", lambda: linear(normalizer=torch.ones((), device="meta"))),
        (ValueError, r"rows must be in \[0, 6\), got -1 .. 4", lambda: illada.linear_masked_cross_entropy_vocab_parallel(hidden, weight, targets, weights, vocab_start=0, rows=rows - 1)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    if device.type == "cpu":  # which looks at every row
        with pytest.raises(ValueError, match=r"rows must ascend, each of them once, got \[1, 1\]"):
            linear(rows=rows[1:2].expand(2))
    weights[3] = 0  # now nobody asks for that target
    assert linear(targets=bad).isfinite()
    assert linear(targets=bad, weights=torch.ones(6, device=device), rows=rows[:3]).isfinite()


def test_compiles_in_one_graph(device, generator):
    tracing()

    def loss_of(hidden, weight, targets, weights, rows):
        logits = hidden @ weight.t()
        plain, lse = illada.masked_cross_entropy(logits, targets, weights, return_lse=True, inplace_backward=True)
        return (
            plain
            + lse.square().mean()
            + illada.linear_masked_cross_entropy(hidden, weight, targets, weights, rows=rows)
        )

    (hidden, weight, targets, weights, rows), width = make_head((12, 8, 40, 1.0, 1.0), torch.float32, device, generator)
    leaves = [hidden[:, :width].contiguous().requires_grad_(), weight.requires_grad_()]
    want = loss_of(*leaves, targets, weights, rows)
    got = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*leaves, targets, weights, rows)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(g, w)


def test_checkpointing_changes_nothing(device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (40, 16, 300, 0.5, 1.0), torch.bfloat16, device, generator
    )
    hidden = hidden[:, :width]

    def checkpointed(*args, **keywords):
        return checkpoint(illada.linear_masked_cross_entropy, *args, use_reentrant=False, **keywords)

    want = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights, rows=rows)
    got = head_results(checkpointed, hidden, weight, targets, weights, rows=rows)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
