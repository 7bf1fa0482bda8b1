"""The attention backward's kernels on CUDA: many tiles, the order of sums, workspaces, graphs, raw calls. The rest is in
tests/ops/test_ops_attention_backward.py.

Each pack goes all ways that there are for its head dim. Several ways exist only on compute capability 9.0.
"""

import pytest
import torch
from attention_cases import (
    NAMES,
    TILE_EDGES,
    WAYS,
    Pack,
    dims_and_ways,
    gradients,
    random_grads,
    sums_in_short_packs,  # noqa: F401
    to_device,
    ways_of,
)
from attention_cases import check_gradients as check
from torch import Tensor

import illada
from illada.ops import raw, reference
from illada.testing import assert_close_like

pytestmark = pytest.mark.usefixtures("sums_in_short_packs")
DIMS = [64, 96, 128, 256]


@pytest.mark.slow
@pytest.mark.parametrize("length", [*TILE_EDGES[1:], 1025])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_length(length, dim, dtype, device):
    check(Pack([length], device, dim=dim, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (14, 2), (16, 2)])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_lengths(heads, kv_heads, dim, dtype, device):
    check(Pack([300, 0, 1, 65, 176, 129, 64, 31], device, heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype))


@pytest.mark.parametrize("dim", DIMS)
def test_more_sequences_than_multiprocessors(dim, device):
    """Items of one tile of queries each; some multiprocessors have several."""
    check(Pack([1 + i % 5 for i in range(140)], device, room=1, dim=dim, heads=1, kv_heads=1))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_more_tiles_of_keys_than_multiprocessors(dim, device):
    """In smaller packs the queries of a tile of keys are shared by several CTAs, and dk and dv are sums in memory."""
    check(Pack([150, 0, 65, 129], device, heads=60, kv_heads=30, dim=dim))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_sums_that_are_held_back(dim, device):
    """So many steps of few tiles of keys that a multiprocessor has more sums of its own than it reports late."""
    check(Pack([257], device, room=0, heads=184, kv_heads=23, dim=dim), ways=ways_of(dim, device)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_pairs_of_tiles(dim, device):
    """So many tiles that the forward's items are pairs of them where there are clusters."""
    check(Pack([520], device, room=0, heads=52, kv_heads=52, dim=dim))


@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [
        (2, 2, 128),
        (4, 1, 64),
        (7, 1, 64),
        (7, 1, 96),
        (4, 1, 256),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 2, 128), (60, 30, 64))),
    ],
)
def test_order_of_the_tiles(heads, kv_heads, dim, device):
    """The same bits in every run, wherever in the pack a sequence lies. With 30 key-value heads a multiprocessor has more
    than one tile of keys; with fewer, two share the rows of one."""
    lengths = [300, 0, 1, 65, 176, 150, 64, 31]
    pack = Pack(lengths, device, room=0, heads=heads, kv_heads=kv_heads, dim=dim)
    q, k, v = pack.on_device()
    dout, dlse = to_device(pack, random_grads(pack))
    out, lse = illada.varlen_attention(q, k, v, pack.lengths["cu_seqlens"].to(device), return_lse=True)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "total_q": len(q)}

    def call(order):
        """By sequence, in the order of `lengths`."""

        def moved(x, axis=0):
            parts = x.split(lengths, axis)
            return torch.cat([parts[s] for s in order], axis).contiguous()

        moved_lengths = [lengths[s] for s in order]
        starts = torch.tensor([0, *moved_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        plan = illada.attention_plan(starts, **sizes)
        grads = torch.ops.illada.varlen_attention_bwd(
            *(moved(dout), moved(dlse, 1), moved(q), moved(k), moved(v), moved(out), moved(lse, 1)),
            *(plan.work, len(lengths), dim**-0.5, True),
        )
        parts = [x.split(moved_lengths) for x in grads]
        return [torch.cat([x[order.index(s)] for s in range(len(lengths))]) for x in parts]

    order = list(range(len(lengths)))
    want = call(order)
    for other in (order, order[::-1], [3, 7, 0, 1, 6, 4, 5, 2]):
        assert all(map(torch.equal, call(other), want))


def test_order_of_lengths_that_overlap(device):
    """They end: a tile that the plan has no room for is not waited for. What comes out is nobody's business."""
    pack = Pack([300], device, room=0, heads=8, kv_heads=2, dim=64)
    starts = torch.tensor([0, 300, 0, 300, 100, 300, 100, 300, 0, 300], dtype=torch.int32).to(device)
    grads = to_device(pack, random_grads(pack))
    for got in gradients(illada.varlen_attention, pack.on_device(), {"cu_seqlens": starts}, grads, deterministic=True):
        assert got.shape[0] == 300


@pytest.mark.parametrize("lengths, recompute", [([256], True), ([257], False), ([500, 0, 1], True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_short_sequences_recompute_the_scores(lengths, recompute, deterministic, device, monkeypatch):
    monkeypatch.undo()
    asked = []

    def backward(*_, deterministic, recompute_scores_for_dq, **__):
        asked.append((deterministic, recompute_scores_for_dq))

    monkeypatch.setattr(raw, "varlen_attention_backward", backward)
    pack = Pack(lengths, device, room=0, dim=64)
    call = (pack.on_device(), pack.on_device_lengths(), to_device(pack, random_grads(pack)))
    gradients(illada.varlen_attention, *call, deterministic=deterministic)
    assert asked == [(deterministic, recompute)]


class RawCall:
    """Arguments of the raw call for one pack, ready to be changed."""

    def __init__(self, pack: Pack, *, way="any order"):
        device, (tokens, heads, dim), (keys, kv_heads, _) = pack.device, pack.q.shape, pack.k.shape
        lengths = pack.on_device_lengths()
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "total_q": tokens}
        plan = illada.attention_plan(**lengths, **sizes, total_k=keys)
        q, k, v = pack.on_device()
        out, lse = illada.varlen_attention(q, k, v, **lengths, return_lse=True)
        dout, dlse = to_device(pack, random_grads(pack))
        shape = (tokens, keys, plan.num_sequences, heads, kv_heads, dim)
        size = raw.varlen_attention_backward_workspace(*shape, *WAYS[way], q.device.index)
        self.inputs = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
        self.plan, self.num_sequences = plan.work, plan.num_sequences
        self.deterministic, self.recompute_scores_for_dq = WAYS[way]
        self.outputs = {
            name: torch.full(shape, torch.nan, dtype=q.dtype).to(device)
            for name, shape in (("dq", q.shape), ("dk", k.shape), ("dv", v.shape))
        }
        self.workspace = torch.empty(size, dtype=torch.uint8).to(device)

    def __call__(self) -> None:
        raw.varlen_attention_backward(
            **self.outputs, **self.inputs, plan=self.plan, num_sequences=self.num_sequences,
            softmax_scale=self.inputs["q"].shape[-1] ** -0.5, workspace=self.workspace,
            deterministic=self.deterministic, recompute_scores_for_dq=self.recompute_scores_for_dq,
        )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_queries_without_keys_whatever_their_lse(way, device):
    """Who spreads the keys over several devices passes the lse of all of them: here may be none of a sequence's."""
    call = RawCall(Pack([70, 3, 9], device, keys=[200, 30, 0], dim=64), way=way)
    call.inputs["lse"][:, 73:] = 1.5
    call()
    assert (call.outputs["dq"][73:] == 0).all() and call.outputs["dq"].isfinite().all()


@pytest.mark.parametrize("dim, way", dims_and_ways(list(WAYS)))
def test_nothing_is_written_beside_the_results(way, dim, device):
    call = RawCall(Pack([70, 3, 9], device, keys=[200, 30, 0], dim=dim), way=way)
    inputs = {name: x.clone() for name, x in call.inputs.items()}
    guarded = {}
    for name, x in [*call.outputs.items(), ("workspace", call.workspace)]:
        room = 256 // x.element_size()
        wide = torch.full((x.numel() + 2 * room,), 7.0).to(x.dtype).to(device)
        guarded[name] = (wide[:room], wide[-room:])
        inner = wide[room:-room].view(x.shape)
        if name == "workspace":
            call.workspace = inner
        else:
            inner.fill_(torch.nan)
            call.outputs[name] = inner
    call()
    for before, behind in guarded.values():
        assert (before == 7).all() and (behind == 7).all()
    for x in call.outputs.values():
        assert x.isfinite().all()  # all of it is written
    for name, x in call.inputs.items():
        assert torch.equal(x.nan_to_num(nan=7), inputs[name].nan_to_num(nan=7))


@pytest.mark.parametrize("dim, way", dims_and_ways(["any order", "in order"]))
def test_calls_share_a_workspace(dim, way, device):
    """What one call has counted and summed up there is nothing to the next one, whose sequences lie elsewhere."""
    packs = [Pack([70, 200, 5], device, keys=[300, 3, 0], dim=dim), Pack([300, 1, 65], device, dim=dim)]
    calls = [RawCall(pack, way=way) for pack in packs]
    workspace = torch.full((max(len(call.workspace) for call in calls),), 255, dtype=torch.uint8).to(device)
    for pack, call in [*zip(packs, calls, strict=True), (packs[0], calls[0])]:
        call.workspace = workspace
        for x in call.outputs.values():
            x.fill_(torch.nan)
        call()
        tensors, grads = (pack.q, pack.k, pack.v), random_grads(pack)
        want = gradients(reference.varlen_attention, [x.double() for x in tensors], pack.lengths, grads)
        baseline = gradients(reference.varlen_attention, tensors, pack.lengths, grads)
        for name, w, b in zip(NAMES, want, baseline, strict=True):
            assert_close_like(call.outputs[name].cpu(), w, b)


def misaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def fails_by_size(call: RawCall) -> None:
    call.workspace = call.workspace[:-16]


def fails_by_rows(call: RawCall) -> None:
    call.plan = call.plan[:5]


def fails_by_overlap(call: RawCall) -> None:
    call.outputs["dq"] = call.inputs["dout"]


def fails_by_outputs(call: RawCall) -> None:
    call.outputs["dk"] = call.outputs["dv"]


def fails_by_alignment(call: RawCall) -> None:
    call.outputs["dk"] = misaligned(call.outputs["dk"])


def fails_by_input(call: RawCall) -> None:
    call.inputs["dout"] = misaligned(call.inputs["dout"])


def fails_by_stride(call: RawCall) -> None:
    call.inputs["dout"] = call.inputs["dout"][:, :1].expand(-1, 4, -1)


ERRORS = [
    (fails_by_size, ValueError, "workspace must have [0-9]+ bytes, got"),
    (fails_by_rows, ValueError, "plan must have at least .* got 5; was it made with total_k?"),
    (fails_by_overlap, ValueError, "dq overlaps dout"),
    (fails_by_outputs, ValueError, "dv overlaps dk|dk overlaps dv"),
    (fails_by_alignment, ValueError, "dq, dk, dv and workspace must be 16-byte aligned"),
    (fails_by_input, NotImplementedError, "dout must have positive strides .* and 16-byte aligned data"),
    (fails_by_stride, NotImplementedError, "dout must have positive strides"),
]


@pytest.mark.parametrize("change, error, message", ERRORS)
def test_errors_of_the_raw_call(change, error, message, device):
    call = RawCall(Pack([6, 2], device))
    change(call)
    with pytest.raises(error, match=message):
        call()


def test_raw_call_refuses_the_host(device):
    call = RawCall(Pack([6], device))
    call.inputs["q"] = call.inputs["q"].cpu()
    with pytest.raises(ValueError, match="varlen_attention_backward: q is on the CPU, but the plan is on cuda"):
        call()


def test_plan_without_keys_has_no_gradients(device):
    pack = Pack([6], device, keys=[9])
    lengths = pack.on_device_lengths()
    sizes = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 128, "total_q": 6}
    plan = illada.attention_plan(**lengths, **sizes)
    with pytest.raises(ValueError, match="was it made with total_k?"):
        gradients(illada.varlen_attention, pack.on_device(), lengths, (None, torch.ones(4, 6).to(device)), plan=plan)


@pytest.mark.parametrize("deterministic", [False, True])
def test_in_a_graph_with_other_lengths(deterministic, device):
    """What depends on the lengths is on the device: replays see what they have become."""
    packs = [
        Pack(lengths, device, keys=keys)
        for lengths, keys in [([9, 5], [300, 30]), ([2, 12], [0, 330]), ([14, 0], [200, 130])]
    ]
    tensors = [x.clone() for x in packs[0].on_device()]
    lengths, grads = packs[0].on_device_lengths(), to_device(packs[0], random_grads(packs[0]))

    def call():
        return gradients(illada.varlen_attention, tensors, lengths, grads, deterministic=deterministic)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for pack in packs:
        for old, new in zip(tensors, pack.on_device(), strict=True):
            old.copy_(new)
        for name, new in pack.on_device_lengths().items():
            lengths[name].copy_(new)
        graph.replay()
        exact = [x.double() for x in (pack.q, pack.k, pack.v)]
        want = gradients(reference.varlen_attention, exact, pack.lengths, random_grads(pack))
        baseline = gradients(reference.varlen_attention, (pack.q, pack.k, pack.v), pack.lengths, random_grads(pack))
        for g, w, b in zip(results, want, baseline, strict=True):
            assert_close_like(g.cpu(), w, b)


@pytest.mark.parametrize("dim", DIMS)
def test_an_infinite_gradient_of_the_last_token_reaches_every_value_in_its_column_alone(dim, device):
    """As inf; in the portable kernels it may be NaN: there the last token's row fills the tile, with probabilities of
    0, and 0 times inf is NaN. Zeros would be worse, since scores of -inf make NaN of them."""
    pack = Pack([5], device, dim=dim, scale=0.1)
    dout, _ = to_device(pack, random_grads(pack, lse=False))
    dout[-1, -1, 3] = torch.inf
    _, _, dv = gradients(illada.varlen_attention, pack.on_device(), pack.on_device_lengths(), (dout, None))
    used = dv[3:8].cpu()  # keys in a slot, with room before and behind
    reached = used[..., 3]
    portable = ways_of(dim, device) == ("recompute",)
    assert ((reached == torch.inf) | (reached.isnan() & portable)).all()
    assert used[..., :3].isfinite().all() and used[..., 4:].isfinite().all()
