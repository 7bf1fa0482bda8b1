"""varlen_attention on CUDA tensors, on values that break kernels, against float64. New memory holds NaN."""

import pytest
import torch
from adversarial import KINDS, MINUS_INFINITY, assert_near
from attention_properties import HEADS, NAMES, check, make, run

import illada
from illada.ops import reference

# Few queries of many keys are split over the keys: whole key splits are -inf.
# Groups of 1, 4 and 7 heads fill the kernels' tiles of rows up in other places.
SHAPES = {
    "several tiles": (150, 200, list(KINDS), HEADS),
    "key splits": (2, 700, ["-inf first", "-inf last", "huge", "two +inf"], HEADS),
    **{f"groups of {n}": (45, 70, ["normal", "offset 1e6", *MINUS_INFINITY], 2 * n) for n in (1, 4, 7)},
}


@pytest.fixture(params=["sums", "recompute"])
def _way(request, monkeypatch):
    monkeypatch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 1 << 20 if request.param == "recompute" else 0)


# Only the kernels of sm_90a sum dq.
WAYS = pytest.mark.parametrize(
    "dim, _way",
    [*((dim, way) for dim in (64, 128) for way in ("sums", "recompute")), (96, "recompute"), (256, "recompute")],
    indirect=["_way"],
)


def fill_with_nan(device):
    """Free memory full of NaNs, which the next tensors of these sizes get."""
    sizes = [1 << n for n in range(9, 24)]
    freed = [torch.full((size,), torch.nan, device=device) for size in sizes for _ in range(3)]
    del freed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("_way")
@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dim, dtype, device, generator):
    queries, keys, kinds, heads = SHAPES[shape]
    tensors, lengths, d_out = make(kinds, queries, keys, dim, dtype, generator, heads)
    on_device = [x.to(device) for x in tensors], {name: x.to(device) for name, x in lengths.items()}, d_out.to(device)
    fill_with_nan(device)
    check(run(illada.varlen_attention, *on_device), tensors, lengths, d_out, kinds)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("queries, keys", [(7, 70), (3, 1500)], ids=["whole", "key splits"])
def test_huge_scores_that_tie(queries, keys, device, generator):
    """Of scores that are the same to the last bit, in any order of sums, every key has the same part."""
    q, k = torch.zeros(queries, 2, 64), torch.zeros(keys, 2, 64)
    q[..., 0], k[..., 0] = 2.0**13, 2.0**15
    v, d_out = torch.randn(keys, 2, 64, generator=generator), torch.randn(queries, 2, 64, generator=generator)
    leaves = [x.bfloat16() for x in (q, k, v)]
    lengths = {"cu_seqlens": torch.tensor([0, queries]).int(), "cu_seqlens_k": torch.tensor([0, keys]).int()}
    on_device = [x.to(device) for x in leaves], {name: x.to(device) for name, x in lengths.items()}, d_out.to(device)
    got = run(illada.varlen_attention, *on_device, softmax_scale=1.0)
    want = run(reference.varlen_attention, [x.double() for x in leaves], lengths, d_out.bfloat16(), softmax_scale=1.0)
    for name, g, w in zip(("out", "lse"), got, want, strict=False):
        assert_near(g, w, 2.0**-7 * w.abs().amax(), name)
    # The logarithm of the number of keys has no digits beside such an lse: each key's part is 1 in the backward.
    assert_near(got[NAMES.index("dv")], d_out.bfloat16().double().sum(0).expand(keys, 2, 64), 2.0**-6, "dv")


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
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("lengths", [[70, 0, 33], []])
def test_rows_of_no_sequence(lengths, heads, kv_heads, device, generator):
    """As without them, and zeros behind, for groups of any size, whatever the rows hold."""
    owned, rest = sum(lengths), 150
    sizes = (heads, kv_heads, kv_heads, heads)
    tensors = [torch.randn(owned + rest, n, 64, generator=generator).bfloat16() for n in sizes]
    for x in tensors:
        x[owned:] = torch.nan
    q, k, v, d_out = (x.to(device) for x in tensors)
    starts = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int().to(device)}
    fill_with_nan(device)
    got = run(illada.varlen_attention, (q, k, v), starts, d_out)
    want = run(illada.varlen_attention, [x[:owned] for x in (q, k, v)], starts, d_out[:owned])
    for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        g, w = (x.detach().cpu().T if name == "lse" else x.detach().cpu() for x in (g, w))
        torch.testing.assert_close(g[:owned].float(), w.float(), rtol=2e-2, atol=2e-2)
        assert (g[owned:] == (-torch.inf if name == "lse" else 0)).all(), name


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
