"""varlen_attention on values that break CUDA's kernels alone: their order of tiles, one key, graphs. The rest is in
tests/ops/test_ops_properties_attention.py."""

import pytest
import torch
from attention_properties import NAMES, run

import illada


@pytest.fixture(params=["sums", "recompute"])
def _way(request, monkeypatch):
    monkeypatch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 1 << 20 if request.param == "recompute" else 0)


# Only the kernels of sm_90a sum dq.
WAYS = pytest.mark.parametrize(
    "dim, _way",
    [*((dim, way) for dim in (64, 128) for way in ("sums", "recompute")), (96, "recompute"), (256, "recompute")],
    indirect=["_way"],
)


@pytest.mark.usefixtures("_way")
@WAYS
def test_the_largest_of_huge_scores_has_1_in_the_backward_too(dim, device):
    """Scores that grow a little from tile to tile, next to a size that leaves them few digits."""
    keys, rows = 300, 64
    q, k = torch.zeros(rows, 1, dim), torch.full((keys, 1, dim), 0.0)
    q[:, 0, 0], q[:, 0, 1], q[:, 0, 2] = 2.0**12, 2 * torch.arange(rows), 1
    k[:, 0, 0], k[:, 0, 1], k[:, 0, 2] = 2.0**12, 1, -(2.0**14)
    k[0, 0, 2], k[-1, 0, 2] = 6, 0  # kernels begin with the last keys
    d_out = torch.eye(rows, dim)[:, None]
    tensors = [x.bfloat16().to(device) for x in (q, k, torch.zeros(keys, 1, dim))]
    lengths = {"cu_seqlens": [0, rows], "cu_seqlens_k": [0, keys]}
    lengths = {name: torch.tensor(x, dtype=torch.int32).to(device) for name, x in lengths.items()}
    got = run(illada.varlen_attention, tensors, lengths, d_out.to(device), softmax_scale=0.75)
    parts = got[NAMES.index("dv")][0, 0, :rows].cpu()
    assert ((parts - 1).abs() < 0.02).all(), parts


@pytest.mark.parametrize(
    "dtype, value", [(torch.bfloat16, 133120.0), (torch.float16, 16000.0), (torch.float16, 65504.0)]
)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_one_huge_key(dim, dtype, value, device):
    q, k, v = (torch.full((1, 1, dim), value, dtype=dtype).to(device).requires_grad_() for _ in range(3))
    out, lse = illada.varlen_attention(q, k, v, torch.tensor([0, 1], dtype=torch.int32).to(device), return_lse=True)
    out.sum().backward()
    assert (out == value).all() and torch.allclose(lse.cpu(), torch.tensor(value) ** 2 * dim**0.5, rtol=1e-6)
    assert (v.grad == 1).all() and (q.grad == 0).all() and (k.grad == 0).all()


@pytest.mark.usefixtures("_way")
@WAYS
def test_graph_with_fewer_tokens(dim, device, generator):
    """Rows that a replay's lengths leave out lose what the replay before left there."""
    q, k, v, d_out = (torch.randn(400, n, dim, generator=generator).bfloat16().to(device) for n in (4, 2, 2, 4))
    lengths = torch.tensor([0, 300, 400], dtype=torch.int32).to(device)

    def call():
        return run(illada.varlen_attention, (q, k, v), {"cu_seqlens": lengths}, d_out)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    for starts in ([0, 300, 320], [0, 1, 1], [0, 0, 0]):
        lengths.copy_(torch.tensor(starts))
        graph.replay()
        count = starts[-1]
        parts = [x[:count] for x in (q, k, v)]
        want = run(illada.varlen_attention, parts, {"cu_seqlens": lengths}, d_out[:count])
        for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), captured, want, strict=True):
            g, w = (x.detach().cpu().T if name == "lse" else x.detach().cpu() for x in (g, w))
            torch.testing.assert_close(g[:count].float(), w.float(), rtol=2e-2, atol=2e-2)
            assert (g[count:] == (-torch.inf if name == "lse" else 0)).all(), name
