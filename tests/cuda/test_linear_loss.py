"""linear_masked_cross_entropy on the device: against float64, chunks, precision, memory, and that nobody waits."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

import illada
from illada.ops import linear_loss, raw, reference
from illada.testing import assert_close_like, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # T, C, V, share of masked rows, spread of the logits: what the row is for
    (1, 8, 1, 1.0, 1.0),  # one token, one word
    (37, 16, 1001, 0.5, 1.0),  # a vocabulary that is a multiple of nothing
    (150, 8, 130, 1.0, 30.0),  # all masked, peaked, three chunks
    (300, 64, 1000, 0.3, 0.02),  # flat, as at initialisation
    (129, 24, 4096, 1.0, 1.0),
    (3, 16, 155136, 0.7, 1.0),  # iLLaDA's vocabulary
]


@pytest.fixture(params=["chosen", "portable"], autouse=True)
def _path(request, monkeypatch):
    """Run each test with this GPU's own kernels, where it has some, and without them."""
    if request.param == "portable":
        monkeypatch.setattr(linear_loss.kernels, "forward_sm90", lambda *arguments, **keywords: None)


def make_head(case, dtype, device, generator):
    """Return hidden, head, targets, weights, rows; NaNs surround hidden's rows and fill those without a weight."""
    tokens, width, vocab, share, spread = case
    hidden = torch.full((tokens, width + 8), torch.nan, dtype=dtype)
    hidden[:, :width] = (torch.randn(tokens, width, generator=generator) * spread / width**0.5).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1
    masked = torch.rand(tokens, generator=generator) < share
    masked[0] = True
    weights = torch.where(masked, 10 ** (3 * torch.rand(tokens, generator=generator)), 0.0)  # 1 / t at t = 1e-3
    hidden[~masked] = torch.nan
    rows = masked.nonzero().squeeze(-1).int()
    return tuple(t.to(device) for t in (hidden, weight, targets, weights, rows)), width


def head_results(function, hidden, weight, *args, **keywords):
    """Return loss, nll, d_hidden and d_weight on the host."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, nll = function(*leaves, *args, return_nll=True, **keywords)
    return tuple(t.detach().cpu() for t in (loss, nll, *torch.autograd.grad(loss, leaves)))


def plain_head(hidden, weight, *args, **keywords):
    """Compute the loss as a user would write it: logits in the inputs' dtype, their softmax in float32."""
    return reference.masked_cross_entropy((hidden @ weight.T).float(), *args, **keywords)


def expected(hidden, weight, targets, weights, normalizer, dtype=None):
    """Return (float64, plain torch) on the host, with zeros for what nobody may read."""
    hidden = torch.where(weights[:, None] != 0, hidden, 0)
    hidden, weight, targets, weights = (t.cpu() for t in (hidden, weight, targets, weights))
    arguments = {"targets": targets, "token_weights": weights, "normalizer": normalizer}
    want = head_results(reference.linear_masked_cross_entropy, hidden.double(), weight.double(), **arguments)
    if dtype is None:
        return want, head_results(plain_head, hidden, weight, **arguments)
    return want, head_results(lambda h, w, **k: plain_head(h.to(dtype), w.to(dtype), **k), hidden, weight, **arguments)


def assert_head_like_plain(got, want, baseline):
    for name, g, w, b in zip(("loss", "nll", "d_hidden", "d_weight"), got, want, baseline, strict=True):
        try:
            assert_close_like(g, w, b)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_head_matches_fp64(case, dtype, with_rows, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(case, dtype, device, generator)
    hidden = hidden[:, :width]
    keywords = {"rows": rows} if with_rows else {}
    got = head_results(
        illada.linear_masked_cross_entropy, hidden, weight, targets, weights, normalizer=12.5, chunk_rows=64, **keywords
    )
    assert_head_like_plain(got, *expected(hidden, weight, targets, weights, 12.5))
    assert (got[2][weights.cpu() == 0] == 0).all() and (got[1][weights.cpu() == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_fp32(dtype, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(CASES[3], torch.float32, device, generator)
    hidden = hidden[:, :width]
    # Such a normalizer sends the gradients of float16 logits below what float16 holds, were it used before the GEMMs.
    normalizer = torch.tensor(1e5, device=device)
    with torch.autocast("cuda", dtype):
        got = head_results(
            *(illada.linear_masked_cross_entropy, hidden, weight, targets, weights),
            rows=rows, normalizer=normalizer, chunk_rows=40,
        )  # fmt: skip
    assert got[2].dtype == got[3].dtype == torch.float32
    want, baseline = expected(hidden, weight, targets, weights, 1e5, torch.bfloat16)
    assert_head_like_plain(got, want, baseline)


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
    ]
    for variant in variants:
        got = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets.int(), weights, **variant)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_rows", [True, False])
def test_head_with_nothing_masked(with_rows, device, generator):
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


def test_float16_gradients_wait_for_their_scaler(device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (70, 16, 300, 0.5, 1.0), torch.float16, device, generator
    )
    hidden, weights = hidden[:, :width].contiguous(), weights.clamp(max=1)
    want, _ = expected(hidden, weight, targets, weights, None)
    for normalizer in (1e6, torch.tensor(1e6, device=device)):  # the tokens of a global batch
        leaf = hidden.detach().requires_grad_()
        buffer = torch.zeros(weight.shape, device=device)
        for keywords in ({}, {"grad_weight": buffer}):
            leaf.grad = None
            head = weight.detach().requires_grad_()
            loss = illada.linear_masked_cross_entropy(
                leaf, head, targets, weights, rows=rows, normalizer=normalizer, grad_weight_dtype=None, **keywords
            )
            scale = 1.0 if keywords else 65536.0
            (loss * scale).backward()
            if keywords:
                assert relative_error(buffer.cpu() * 1e6, want[3]) < 5e-3
            else:
                assert relative_error(leaf.grad.cpu().double() * 1e6 / scale, want[2]) < 5e-3
                assert relative_error(head.grad.cpu().double() * 1e6 / scale, want[3]) < 5e-3


def test_scaled_loss_with_a_buffer_is_not_silent(device, generator):
    (hidden, weight, targets, weights, _), width = make_head((20, 16, 90, 1.0, 1.0), torch.bfloat16, device, generator)
    leaf, buffer = hidden[:, :width].contiguous().requires_grad_(), torch.zeros(90, 16, device=device)
    loss = illada.linear_masked_cross_entropy(leaf, weight, targets, weights, grad_weight=buffer)
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
        loss, nll = illada.linear_masked_cross_entropy(hidden, weight, targets, weights, return_nll=True)
    torch.testing.assert_close(loss.cpu(), whole[0])
    torch.testing.assert_close(nll.cpu(), whole[1])


def test_backward_of_the_head_runs_once(device, generator):
    (hidden, weight, targets, weights, _), width = make_head((9, 8, 50, 1.0, 1.0), torch.float32, device, generator)
    leaf = hidden[:, :width].contiguous().requires_grad_()
    loss = illada.linear_masked_cross_entropy(leaf, weight, targets, weights)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward runs once; the gradients .* given away"):
        torch.autograd.grad(loss, leaf)
    (grad,) = torch.autograd.grad(
        illada.linear_masked_cross_entropy(leaf, weight, targets, weights) ** 2, leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1])
def test_scale_in_place(start, dtype, device, generator):
    memory = torch.randn(70001, generator=generator).to(dtype).to(device)
    data, want = memory[start:-1], memory.clone()
    for factor in (1.0, -2.5):
        raw.scale(data, torch.tensor(factor, device=device))
        want[start:-1] *= factor
        assert torch.equal(memory, want)
    raw.scale(data[:0], torch.tensor(3.0, device=device))
    with pytest.raises(ValueError, match="factor must be device memory"):
        raw.scale(data, torch.tensor(3.0))
    with pytest.raises(ValueError, match="takes CUDA tensors"):
        raw.scale(data.cpu(), torch.tensor(3.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_weight_gradient_in_bfloat16(dtype, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head((90, 16, 300, 1.0, 1.0), dtype, device, generator)
    hidden = hidden[:, :width]
    want, baseline = expected(hidden, weight, targets, weights, None)
    got = head_results(
        illada.linear_masked_cross_entropy, hidden, weight, targets, weights, grad_weight_dtype=torch.bfloat16
    )
    got = (*got[:3], got[3].bfloat16())  # autograd gives it the weight's dtype
    assert_head_like_plain(got, want, (*baseline[:3], baseline[3].bfloat16()))


def test_targets_of_the_head_out_of_range(device, generator, monkeypatch):
    (hidden, weight, targets, weights, _), width = make_head((5, 8, 50, 1.0, 1.0), torch.float32, device, generator)
    hidden = hidden[:, :width]
    targets[3] = 50
    loss, nll, d_hidden, d_weight = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights)
    assert loss.isnan() and nll.isnan().tolist() == [False] * 3 + [True, False]
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()
    monkeypatch.setenv("ILLADA_DEBUG", "1")
    with pytest.raises(ValueError, match=r"targets\[3\] is 50, outside of \[0, 50\)"):
        illada.linear_masked_cross_entropy(hidden, weight, targets, weights)
    rows = torch.tensor([0, 1, 2, 5], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 5\), got 0 .. 5"):
        illada.linear_masked_cross_entropy(hidden, weight, targets, weights, rows=rows)
    assert illada.linear_masked_cross_entropy(hidden, weight, targets, weights, rows=rows[:3]).isfinite()


def test_head_errors(device):
    hidden, weight = torch.zeros(4, 8, device=device), torch.zeros(9, 8, device=device)
    targets, weights = torch.zeros(4, dtype=torch.int64, device=device), torch.ones(4, device=device)
    loss = illada.linear_masked_cross_entropy
    for error, match, call in [
        (ValueError, "weight is on cpu, but hidden is on cuda:0", lambda: loss(hidden, weight.cpu(), targets, weights)),
        (ValueError, "targets is on cpu", lambda: loss(hidden, weight, targets.cpu(), weights)),
        (ValueError, "normalizer is on meta", lambda: loss(hidden, weight, targets, weights, normalizer=torch.ones((), device="meta"))),
        (TypeError, "hidden must be float32, bfloat16, float16, got float64", lambda: loss(hidden.double(), weight.double(), targets, weights)),
        (ValueError, "last dimension of weight must be contiguous", lambda: loss(hidden, weight.expand(9, 8).t().contiguous().t(), targets, weights)),
        (ValueError, "normalizer must be finite and positive, got -1", lambda: loss(hidden, weight, targets, weights, normalizer=torch.tensor(-1))),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()


# ------------------------------------------------------------------------------------------------ memory, waiting


def test_chunks_of_cuda():
    for count, vocab, dtype in [(4096, 155136, torch.bfloat16), (8192, 155136, torch.bfloat16), (5, 9, torch.float32), (0, 9, torch.float32), (9000, 126464, torch.float32)]:  # fmt: skip
        rows = linear_loss.chunks.chunk_rows_of(count, vocab, dtype, is_cuda=True)
        assert rows % 128 == 0 and rows > 0
        assert min(rows, count) * vocab * dtype.itemsize <= 1_400_000_000
        assert count == 0 or -(-count // rows) <= -(-count * vocab * dtype.itemsize // 1_250_000_000)


@pytest.mark.parametrize("with_rows", [True, False])
def test_memory_stays_within_a_chunk(with_rows, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (400, 8, 5000, 1.0, 1.0), torch.float32, device, generator
    )
    leaves = [hidden[:, :width].contiguous().requires_grad_(), weight.requires_grad_()]
    keywords = {"rows": rows} if with_rows else {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    illada.linear_masked_cross_entropy(*leaves, targets, weights, chunk_rows=50, **keywords)
    chunk, d_weight = 50 * 5000 * 4, 5000 * width * 4
    assert torch.cuda.max_memory_allocated() - before < chunk + d_weight + 200_000 < 400 * 5000 * 4 / 4


@contextlib.contextmanager
def nobody_waits():
    """Reading a value on the host raises; on a GPU, torch looks for every other synchronisation too."""

    def refuse(name):
        def method(self, *args, **kwargs):
            if self.is_cuda:
                raise AssertionError(f"Tensor.{name} waits for the device")
            return getattr(torch._C.TensorBase, name)(self, *args, **kwargs)

        return method

    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    on_gpu = _get_current_dispatch_mode() is None
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.Tensor, name, refuse(name), raising=False)
        if on_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default") if on_gpu else None


def test_the_guard_sees_who_waits(device):
    with nobody_waits(), pytest.raises(AssertionError, match="item waits"):
        torch.ones(1, device=device).item()


@pytest.mark.parametrize("function", ["rows", "no rows", "logits", "logits with rows"])
def test_nobody_waits_for_the_device(function, device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (70, 16, 300, 0.5, 1.0), torch.bfloat16, device, generator
    )
    leaves = [hidden[:, :width].contiguous().requires_grad_(), weight.requires_grad_()]
    normalizer = torch.tensor(3.0, device=device)
    with nobody_waits():
        keywords = {"rows": rows if "rows" in function.replace("no rows", "") else None, "normalizer": normalizer}
        if function.startswith("logits"):
            loss, lse = illada.masked_cross_entropy(
                leaves[0] @ leaves[1].t(), targets, weights, return_lse=True, inplace_backward=True, **keywords
            )
            loss = loss + lse.sum()
        else:
            loss = illada.linear_masked_cross_entropy(*leaves, targets, weights, chunk_rows=20, **keywords)
        (2 * loss).backward()


# ------------------------------------------------------------------------------------------- compilation, checkpoints


def test_loss_compiles_in_one_graph(device, generator):
    if _get_current_dispatch_mode() is not None:
        pytest.skip("aten operators of a traced graph need their own CUDA kernels")

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


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_one(dtype, with_rows, one_process, device, generator):
    """Two processes are in tests/ops/test_vocab_parallel.py, shards of logits in test_loss.py."""
    (hidden, weight, targets, weights, rows), width = make_head(CASES[1], dtype, device, generator)
    hidden = hidden[:, :width]
    got = head_results(
        *(illada.linear_masked_cross_entropy_vocab_parallel, hidden, weight, targets, weights),
        vocab_start=0, rows=rows if with_rows else None, chunk_rows=7, normalizer=torch.tensor(12.5, device=device),
    )  # fmt: skip
    assert_head_like_plain(got, *expected(hidden, weight, targets, weights, 12.5))
    targets[0] = weight.shape[0]  # in no shard
    nll = illada.linear_masked_cross_entropy_vocab_parallel(
        hidden, weight, targets, weights, vocab_start=0, return_nll=True
    )[1]
    assert nll.isnan().nonzero().tolist() == [[0]]
