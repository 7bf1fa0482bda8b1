"""linear_masked_cross_entropy on CUDA alone: float16, broken targets, memory, that nobody waits, groups. The rest is in
tests/ops/test_ops_linear_loss.py."""

import contextlib

import pytest
import torch
from loss_cases import assert_head_like_plain, expected_head, head_results, make_head
from torch.utils._python_dispatch import _get_current_dispatch_mode

import illada
from illada.ops import linear_loss, raw
from illada.testing import relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["chosen", "portable"], autouse=True)
def _path(request, monkeypatch):
    """Run each test with this GPU's own kernels, where it has some, and without them."""
    if request.param == "portable":
        monkeypatch.setattr(linear_loss.kernels, "forward_sm90", lambda *arguments, **keywords: None)


def test_float16_gradients_wait_for_their_scaler(device, generator):
    (hidden, weight, targets, weights, rows), width = make_head(
        (70, 16, 300, 0.5, 1.0), torch.float16, device, generator
    )
    hidden, weights = hidden[:, :width].contiguous(), weights.clamp(max=1)
    want, _ = expected_head(hidden, weight, targets, weights, None)
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


def test_targets_of_the_head_out_of_range_are_nan(device, generator):
    (hidden, weight, targets, weights, _), width = make_head((5, 8, 50, 1.0, 1.0), torch.float32, device, generator)
    hidden = hidden[:, :width]
    targets[3] = 50
    loss, nll, d_hidden, d_weight = head_results(illada.linear_masked_cross_entropy, hidden, weight, targets, weights)
    assert loss.isnan() and nll.isnan().tolist() == [False] * 3 + [True, False]
    assert d_hidden.isfinite().all() and d_weight.isfinite().all()


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


# ------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_one(dtype, with_rows, one_process, device, generator):
    """Two processes are in tests/ops/test_vocab_parallel.py, shards of logits in test_loss.py."""
    (hidden, weight, targets, weights, rows), width = make_head((37, 16, 1001, 0.5, 1.0), dtype, device, generator)
    hidden = hidden[:, :width]
    got = head_results(
        *(illada.linear_masked_cross_entropy_vocab_parallel, hidden, weight, targets, weights),
        vocab_start=0, rows=rows if with_rows else None, chunk_rows=7, normalizer=torch.tensor(12.5, device=device),
    )  # fmt: skip
    assert_head_like_plain(got, *expected_head(hidden, weight, targets, weights, 12.5))
    targets[0] = weight.shape[0]  # in no shard
    nll = illada.linear_masked_cross_entropy_vocab_parallel(
        hidden, weight, targets, weights, vocab_start=0, return_nll=True
    )[1]
    assert nll.isnan().nonzero().tolist() == [[0]]
