"""The attention forward on CUDA tensors against float64, in units of the error of plain torch at the same dtype.

Every key, value and query that a sequence must not see is NaN: the rows between slots, the unused part of a slot, and
for one sequence at a time the whole rest of the pack. The kernels are those of the device: wgmma on compute capability
9.0, mma.sync elsewhere.
"""

import pytest
import torch
from packs import TILE_EDGES, Pack

import illada
from illada._native import native
from illada.ops import raw, reference
from illada.ops.attention.varlen import _pairs
from illada.ops.variants import use_variants
from illada.testing import assert_close_like

DIMS = pytest.mark.parametrize("dim", [64, 96, 128, 256])


@DIMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tile_edges_in_one_pack(dim, dtype, device):
    Pack(TILE_EDGES[:8], device, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("length", [1, 64, 127, 129, 177])
@DIMS
def test_one_sequence(length, dim, device):
    Pack([length], device, room=0, dim=dim).check()


@pytest.mark.slow
@pytest.mark.parametrize("length", [*TILE_EDGES, 1025])
@DIMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_length(length, dim, dtype, device):
    Pack([length], device, dim=dim, dtype=dtype).check()


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (14, 2), (16, 2)])
@DIMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_lengths(heads, kv_heads, dim, dtype, device):
    Pack([300, 0, 1, 65, 176, 129, 64, 31], device, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype).check()


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1), (16, 2), (3, 1), (64, 1)])
@DIMS
def test_groups(heads, kv_heads, dim, device):
    Pack([37, 0, 70, 1], device, heads=heads, kv_heads=kv_heads, dim=dim).check()


@DIMS
def test_queries_and_keys_of_different_lengths(dim, device):
    Pack([5, 100, 0, 33, 7], device, keys=[200, 3, 50, 129, 0], dim=dim).check()


@pytest.mark.parametrize("block, dim", [(1, 128), (3, 128), (32, 128), (64, 128), (3, 64), (3, 96), (32, 96), (3, 256)])
def test_block_against_a_long_cache(block, dim, device):
    """Few queries, many keys: split over keys and combined, and some sequences not."""
    Pack([block, block, 2], device, keys=[1500, 129, 40], room=20, dim=dim).check()


@pytest.mark.slow
@DIMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (7, 1)])
def test_blocks_against_long_caches(heads, kv_heads, dim, dtype, device):
    Pack(
        [32] * 5, device, keys=[2100, 1024, 0, 777, 1], room=9, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype
    ).check()


@pytest.mark.slow
def test_split_over_8192_keys(device):
    Pack([8], device, keys=[8192]).check()


def test_more_sequences_than_multiprocessors(device):
    Pack([1 + i % 5 for i in range(140)], device, room=1, dim=64, heads=2).check()


def test_many_items_of_one_tile_of_keys(device):
    """Each is over before the one before it has left: three items are in flight."""
    Pack([1 + i % 6 for i in range(420)], device, room=0, dim=64, heads=1).check()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_of_tiles(dim, device):
    pack = Pack([700], device, room=0, heads=96, kv_heads=96, dim=dim)
    assert not raw.varlen_attention_workspace(700, 1, 96, 96, dim)
    pack.check()


@DIMS
def test_scores_that_outgrow_the_first_tile(dim, device):
    """Large scores that grow along the keys: what was summed before must be scaled down, again and again."""
    pack = Pack([40], device, keys=[600], dim=dim, scale=6.0)
    slots = pack.lengths["cu_seqlens_k"]
    growth = torch.linspace(3, 0.1, 600)[:, None, None]  # the kernels begin with the last keys
    pack.k[slots[0] : slots[0] + 600] = (pack.k[slots[0] : slots[0] + 600] * growth).to(pack.k.dtype)
    pack.check()


def test_scale(device):
    q, k, v = (pack := Pack([70], device, room=0)).on_device()
    got = illada.varlen_attention(q, k, v, **pack.on_device_lengths(), softmax_scale=0.3)
    arguments = (x.double() for x in (pack.q, pack.k, pack.v))
    want = reference.varlen_attention(*arguments, **pack.lengths, softmax_scale=0.3)
    baseline = reference.varlen_attention(pack.q, pack.k, pack.v, **pack.lengths, softmax_scale=0.3)
    assert_close_like(got.cpu(), want, baseline)


@DIMS
def test_neighbours_in_the_pack_are_not_seen(dim, device):
    """One sequence keeps its numbers while all others are NaN, on both sides; and its result is the same to the bit."""
    pack = Pack([65, 130, 33], device, room=0, dim=dim)
    lengths = pack.on_device_lengths()
    want = illada.varlen_attention(*pack.on_device(), **lengths)
    for start, end in ((0, 65), (65, 195), (195, 228)):
        poisoned = []
        for x in pack.on_device():
            alone = torch.full_like(x, torch.nan)
            alone[start:end] = x[start:end]
            poisoned.append(alone)
        assert torch.equal(illada.varlen_attention(*poisoned, **lengths)[start:end], want[start:end])


# The two tiles of the sm_80 forward at D 128 and 256; the kernels of compute capability 9.0 have one number of warps.
WARPS = pytest.mark.parametrize("dim, warps", [(128, "4"), (128, "8"), (256, "4"), (256, "8")])


@WARPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_warps_at_tile_edges(dim, warps, dtype, device):
    """Tiles of 128 rows (32 tokens of four heads) and of 16 to 64 keys, in a pack too large to be split over keys."""
    with use_variants(attention_forward_warps=warps):
        lengths = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129]
        Pack(lengths, device, dim=dim, dtype=dtype).check()


@WARPS
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (7, 1), (64, 1)])
def test_warps_and_groups(dim, warps, heads, kv_heads, device):
    with use_variants(attention_forward_warps=warps):
        Pack([37, 0, 70, 1], device, keys=[65, 3, 0, 129], heads=heads, kv_heads=kv_heads, dim=dim).check()


@WARPS
def test_warps_with_split_keys(dim, warps, device):
    with use_variants(attention_forward_warps=warps):
        Pack([3, 40], device, keys=[1100, 321], room=5, dim=dim).check()


@WARPS
def test_a_plan_serves_other_warps(dim, warps, device):
    """A plan outlives a change of the choice: splits that fall within a tile of keys are no fault."""
    pack = Pack([3, 40], device, keys=[1100, 321], dim=dim)
    lengths = pack.on_device_lengths()
    shape = {"num_heads": 4, "num_kv_heads": 1, "head_dim": dim, "total_q": 43, "total_k": len(pack.k)}
    with use_variants(attention_forward_warps=warps):
        plan = illada.attention_plan(**lengths, **shape)
    with use_variants(attention_forward_warps="4" if warps == "8" else "8"):
        pack.check(plan=plan)


def test_warps_follow_the_shared_memory(device):
    """Two CTAs of four warps take 133 KB at D 128; where an SM has less, one of eight. The plan counts in its tiles.

    One CTA takes 131 KB at D 256; where an SM has less, it has half of the keys. D 96 has one tile, which also serves
    devices of compute capability 9.0: only the sm_80 kernels have the dim.
    """
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device()

    def tiling(dim):
        shape = {"total_q": 4096, "total_k": -1, "num_sequences": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": dim}
        made = native().attention_forward_tiling(**shape, launch=native().launch(device=index))
        return tuple(made[name] for name in ("tile_tokens", "cluster", "key_tile", "warps"))

    if (properties.major, properties.minor) == (9, 0) and "90a" in illada.build_info()["cuda_archs"]:
        assert tiling(128)[0] == 32 and tiling(128)[2:] == (128, 0)
        assert tiling(96) == (32, 1, 32, 4) and tiling(256) == (32, 1, 32, 8)
        return
    few = properties.shared_memory_per_multiprocessor < 2 * 66 * 1024
    known = {(8, 0): False, (8, 6): True, (8, 7): False, (8, 9): True, (10, 0): False, (12, 0): True}
    assert few == known.get((properties.major, properties.minor), few)
    assert tiling(128) == ((32, 1, 64, 8) if few else (32, 1, 32, 4))
    assert tiling(256) == ((32, 1, 16, 8) if few else (32, 1, 32, 8))
    assert tiling(64) == (32, 1, 48, 4) and tiling(96) == (32, 1, 32, 4)
    with use_variants(attention_forward_warps="8"):
        assert tiling(128) == (32, 1, 64, 8) and tiling(256) == (32, 1, 16, 8)
        assert tiling(64) == (32, 1, 48, 4) and tiling(96) == (32, 1, 32, 4)
    with use_variants(attention_forward_warps="4"):
        assert tiling(128) == (32, 1, 32, 4) and tiling(256) == (32, 1, 16 if few else 32, 8)


def test_no_keys_at_all(device):
    q = torch.randn(5, 4, 64, dtype=torch.bfloat16).to(device)
    none = q.new_empty(0, 2, 64)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    out, lse = illada.varlen_attention(q, none, none, starts, cu_seqlens_k=0 * starts, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    empty = illada.varlen_attention(q[:0], none, none, starts[:1])
    assert empty.shape == (0, 4, 64)


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize("lengths", [[70, 3], [9]])
def test_nothing_is_written_beside_the_results(lengths, dim, device):
    pack = Pack(lengths, device, keys=[400] * len(lengths), dim=dim)
    q, k, v = pack.on_device()
    on_device = pack.on_device_lengths()
    plan = illada.attention_plan(**on_device, num_heads=4, num_kv_heads=1, head_dim=dim, total_q=len(q))
    guarded = [torch.full((len(q) + 8, 4, dim), 7.0, dtype=q.dtype), torch.full((4 * len(q) + 64,), 7.0)]
    out, lse = (x.to(device) for x in guarded)
    size = raw.varlen_attention_workspace(len(q), len(lengths), 4, 1, dim)
    workspace = torch.full((size + 256,), 7, dtype=torch.uint8).to(device)
    inner = lse[32:-32].view(4, -1)
    raw.varlen_attention(out[4:-4], inner, q, k, v, plan.work, len(lengths), dim**-0.5, workspace=workspace[:size])
    want = illada.varlen_attention(q, k, v, **on_device, plan=plan, return_lse=True)
    assert torch.equal(out[4:-4], want[0]) and torch.equal(inner, want[1])
    for beside in (out[:4], out[-4:], lse[:32], lse[-32:], workspace[size:]):
        assert (beside == 7).all()


def test_in_a_graph_with_other_lengths(device):
    """What depends on the lengths is on the device: replays see what they have become."""
    packs = [
        Pack(lengths, device, keys=keys)
        for lengths, keys in [([9, 5], [300, 30]), ([2, 12], [0, 330]), ([14, 0], [200, 130])]
    ]
    q, k, v = (x.clone() for x in packs[0].on_device())
    lengths = packs[0].on_device_lengths()

    def call():
        return illada.varlen_attention(q, k, v, **lengths, return_lse=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for pack in packs:
        for old, new in zip((q, k, v), pack.on_device(), strict=True):
            old.copy_(new)
        for name, new in pack.on_device_lengths().items():
            lengths[name].copy_(new)
        graph.replay()
        want, baseline = pack.expected()
        assert_close_like(out.cpu(), want[0], baseline[0])
        assert_close_like(lse.cpu(), want[1], baseline[1])


ERRORS = {
    "dtype": (NotImplementedError, "bfloat16 and float16; got float32", lambda q, k, v: ([x.float() for x in (q, k, v)], {})),
    "head dim": (NotImplementedError, "head dims 64, 96, 128 and 256 .* got head dim 32", lambda q, k, v: ([x[..., :32].contiguous() for x in (q, k, v)], {})),
    "group": (NotImplementedError, "up to 64 query heads", lambda q, k, v: ([q.repeat(1, 33, 1), k[:, :1], v[:, :1]], {})),
    "token stride": (NotImplementedError, "q must have positive strides that are multiples of 8", lambda q, k, v: ([q.new_zeros(6, 260)[:, :256].unflatten(1, (2, 128)), k, v], {})),
    "expanded": (NotImplementedError, "k must have positive strides", lambda q, k, v: ([q, k[:, :1].expand(-1, 2, -1), v], {})),
    "alignment": (NotImplementedError, "16-byte aligned", lambda q, k, v: ([q, k, v.new_zeros(v.numel() + 1)[1:].view_as(v)], {})),
    "device": (ValueError, "k is on cpu, but q is on cuda:0", lambda q, k, v: ([q, k.cpu(), v], {})),
    "cu_seqlens device": (ValueError, "cu_seqlens is on cpu", lambda q, k, v: ([q, k, v], {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)})),
    "cu_seqlens dtype": (TypeError, "cu_seqlens must be int32, int64, got float32", lambda q, k, v: ([q, k, v], {"cu_seqlens": torch.tensor([0.0, 6.0]).to(q.device)})),
    "cu_seqlens shape": (ValueError, r"cu_seqlens must have shape \[S \+ 1\]", lambda q, k, v: ([q, k, v], {"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32).to(q.device)})),
    "seqused_k shape": (ValueError, r"seqused_k must have shape \[1\]", lambda q, k, v: ([q, k, v], {"seqused_k": torch.zeros(2, dtype=torch.int32).to(q.device)})),
    "scale": (ValueError, "softmax_scale must be finite and > 0, got -1.0", lambda q, k, v: ([q, k, v], {"softmax_scale": -1.0})),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what, device):
    error, message, make = ERRORS[what]
    q, k, v = torch.zeros(3, 6, 2, 128, dtype=torch.bfloat16).to(device)
    tensors, keywords = make(q, k, v)
    keywords = {"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32).to(device), **keywords}
    with pytest.raises(error, match=message):
        illada.varlen_attention(*tensors, **keywords)


def test_values_are_checked_on_request(device, monkeypatch):
    q = torch.zeros(6, 2, 128, dtype=torch.bfloat16).to(device)
    monkeypatch.setenv("ILLADA_DEBUG", "1")
    with pytest.raises(ValueError, match="cu_seqlens must end at 6 or before, got 7"):
        illada.varlen_attention(q, q, q, torch.tensor([0, 7], dtype=torch.int32).to(device))
    starts = torch.tensor([0, 6], dtype=torch.int32).to(device)
    with pytest.raises(ValueError, match="seqused_k must be within the key slots"):
        illada.varlen_attention(q, q, q, starts, cu_seqlens_k=starts, seqused_k=starts[1:] + 1)


def test_pairs_are_counted_from_the_plan(device, monkeypatch):
    """For FLOP counts: exact where the plan may be read."""
    pack = Pack([5, 0, 40], device, keys=[7, 3, 90])
    q, k, _ = pack.on_device()
    lengths = pack.on_device_lengths()
    plan = illada.attention_plan(**lengths, num_heads=4, num_kv_heads=1, head_dim=128, total_q=45).work
    monkeypatch.setenv("ILLADA_DEBUG", "1")
    assert _pairs(q, k, plan, 3) == 5 * 7 + 40 * 90
    monkeypatch.setenv("ILLADA_DEBUG", "0")
    assert _pairs(q, k, plan, 3) == 45 * len(k) // 3


def test_raw_calls_refuse_what_is_wrong(device):
    x = torch.zeros(6, 2, 128, dtype=torch.bfloat16)
    on_gpu = x.to(device)
    plan = illada.attention_plan(
        torch.tensor([0, 6], dtype=torch.int32).to(device), num_heads=2, num_kv_heads=2, head_dim=128, total_q=6
    ).work
    lse = torch.zeros(2, 6).to(device)
    with pytest.raises(ValueError, match="the inputs are on the CPU, but the outputs are on cuda"):
        raw.varlen_attention(on_gpu.clone(), lse, x, x, x, plan.cpu(), 1, 1.0)
    with pytest.raises(ValueError, match="q is on the CPU, but the plan is on cuda"):
        raw.varlen_attention(x.clone(), lse.cpu(), x, x, x, plan, 1, 1.0)
    with pytest.raises(ValueError, match="workspace must have"):
        raw.varlen_attention(on_gpu.clone(), lse, on_gpu, on_gpu, on_gpu, plan, 1, 1.0)
    workspace = torch.empty(raw.varlen_attention_workspace(6, 1, 2, 2, 128), dtype=torch.uint8).to(device)
    with pytest.raises(ValueError, match="out overlaps q"):
        raw.varlen_attention(on_gpu, lse, on_gpu, on_gpu, on_gpu, plan, 1, 1.0, workspace=workspace)
    with pytest.raises(ValueError, match="plan must have at least"):
        raw.varlen_attention(on_gpu.clone(), lse, on_gpu, on_gpu, on_gpu, plan[:5], 1, 1.0, workspace=workspace)
