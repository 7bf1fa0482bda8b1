"""Packs of attention on any device, with NaN wherever no sequence may look, and what their results and gradients are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import illada
from illada.ops import reference
from illada.testing import assert_close_like

ON_CPU, ON_CUDA = pytest.mark.only("cpu"), pytest.mark.only("cuda")
# On CUDA each head dim has its own kernels. On a CPU 96 and 256 are no others than 64 and 128.
DIMS = [64, pytest.param(96, marks=ON_CUDA), 128, pytest.param(256, marks=ON_CUDA)]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, pytest.param(torch.float32, marks=ON_CPU)]
BFLOAT16_OR_CPU_FLOAT32 = [torch.bfloat16, pytest.param(torch.float32, marks=ON_CPU)]
TILE_EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 300]
CASES = [  # lengths, H, G, D: what the row is for
    pytest.param([1], 2, 1, 64, marks=ON_CPU),  # one token, one key
    pytest.param([63, 1, 65], 4, 4, 128, marks=ON_CPU),  # tile edges around 64, no grouping
    pytest.param([0, 130, 0, 7], 8, 2, 64, marks=ON_CPU),  # empty sequences in the pack
    pytest.param([33, 96], 7, 1, 128, marks=ON_CPU),  # group 7 (Dream, Qwen2)
    pytest.param([32] * 4, 8, 8, 64, marks=ON_CPU),  # short sequences of equal length
    pytest.param([16] * 9, 8, 8, 64, marks=ON_CPU),
    (TILE_EDGES[:8], 4, 1, 64),  # tile edges of CUDA's kernels
    *(pytest.param(TILE_EDGES[:8], 4, 1, dim, marks=ON_CUDA) for dim in (96, 128, 256)),
]
GROUPS = [(2, 2), (4, 1), (7, 1), (16, 2), (3, 1), (64, 1)]  # H, G
SLOTS = [  # lengths and keys, with queries without keys and keys without queries
    ([5, 100, 0, 33, 7], [200, 3, 50, 129, 0]),
    pytest.param([3, 0, 5, 2], [9, 4, 0, 3], marks=ON_CPU),
]


class Pack:
    """A pack of random q, k, v of the given lengths; keys in slots with room beside them, which holds NaN."""

    def __init__(
        self, lengths, device, *, keys=None, room=3, heads=4, kv_heads=1, dim=128, dtype=torch.bfloat16, scale=1.0,
        generator=None,
    ):  # fmt: skip
        generator = generator or torch.Generator().manual_seed(0)
        keys = lengths if keys is None else keys
        self.has_slots = keys is not lengths or room
        starts = list(itertools.accumulate([n + room for n in keys], initial=room))
        total_k = starts[-1] if self.has_slots else sum(lengths)

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        # Slices of one projection: strides are those of a fused qkv.
        fused = random(sum(lengths), (heads + 2) * dim)
        self.q = (scale * fused[:, : heads * dim].unflatten(1, (heads, dim))).to(dtype)
        both = torch.full((total_k, 2 * kv_heads * dim), torch.nan, dtype=dtype)
        if not self.has_slots:
            starts = list(itertools.accumulate(lengths, initial=0))
        for start, count in zip(starts, keys, strict=False):
            both[start : start + count] = random(count, 2 * kv_heads * dim)
        self.k, self.v = (x.unflatten(1, (kv_heads, dim)) for x in both.split(kv_heads * dim, dim=1))
        self.lengths = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
        if self.has_slots:
            self.lengths["cu_seqlens_k"] = torch.tensor(starts, dtype=torch.int32)
            self.lengths["seqused_k"] = torch.tensor(keys, dtype=torch.int32)
        self.device, self.fused = torch.device(device), fused

    def on_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v as views with the strides that a model has; `.to` would make them contiguous."""
        heads, dim = self.q.shape[1:]
        wide = self.fused.clone()
        wide[:, heads * dim :] = torch.nan
        wide[:, : heads * dim] = self.q.flatten(1)
        q = wide.to(self.device)[:, : heads * dim].unflatten(1, (heads, dim))
        both = torch.cat([self.k.flatten(1), self.v.flatten(1)], dim=1).to(self.device)
        k, v = (x.unflatten(1, self.k.shape[1:]) for x in both.chunk(2, dim=1))
        return q, k, v

    def on_device_lengths(self) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in self.lengths.items()}

    def expected(self, softmax_scale=None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (out, lse) in float64, and as plain torch computes them at the dtype."""
        keywords = {**self.lengths, "softmax_scale": softmax_scale, "return_lse": True}
        want = reference.varlen_attention(self.q.double(), self.k.double(), self.v.double(), **keywords)
        out, lse = reference.varlen_attention(self.q, self.k, self.v, **keywords)
        return want, (out, lse.float())

    def idle(self) -> tuple[Tensor, Tensor]:
        """Return which queries have no keys, and which keys no queries."""
        queries, keys = torch.ones(len(self.q), dtype=torch.bool), torch.ones(len(self.k), dtype=torch.bool)
        starts = self.lengths["cu_seqlens"].tolist()
        key_starts = self.lengths.get("cu_seqlens_k", self.lengths["cu_seqlens"]).tolist()
        used = self.lengths.get("seqused_k", self.lengths["cu_seqlens"].diff()).tolist()
        for s, count in enumerate(used):
            if starts[s + 1] > starts[s] and count:
                queries[starts[s] : starts[s + 1]] = False
                keys[key_starts[s] : key_starts[s] + count] = False
        return queries, keys

    def check(self, **keywords) -> None:
        """Compare out and lse with float64. Without keys they are 0 and -inf."""
        q, k, v = self.on_device()
        out, lse = illada.varlen_attention(q, k, v, **self.on_device_lengths(), return_lse=True, **keywords)
        assert out.dtype == q.dtype and lse.dtype == torch.float32
        want, baseline = self.expected(keywords.get("softmax_scale"))
        for g, w, b in zip((out, lse), want, baseline, strict=True):
            assert g.shape == w.shape
            assert_close_like(g.cpu(), w, b)
        queries, _ = self.idle()
        assert (out.cpu()[queries] == 0).all() and (lse.cpu()[:, queries] == -torch.inf).all()


# ---------------------------------------------------------------------------------------------------------- gradients

NAMES = ("dq", "dk", "dv")
#: How dq is made on CUDA: by sums in any order or in that of the tiles, or from recomputed scores. The values:
#: deterministic, recompute_scores_for_dq.
WAYS = {"any order": (False, False), "in order": (True, False), "recompute": (True, True)}


def ways_of(dim: int, device: torch.device) -> tuple[str, ...]:
    """Return the ways in which dq can be made there: the portable kernels always recompute scores, CPUs never."""
    if device.type == "cpu":
        return ("in order",)
    return tuple(WAYS) if torch.cuda.get_device_capability() == (9, 0) and dim in (64, 128) else ("recompute",)


def dims_and_ways(ways: Sequence[str]) -> list:
    """Return each of these ways for the dims that have them, and the one way of the other dims; of CPUs, "in order"."""
    of_cuda = [*((dim, way) for dim in (64, 128) for way in ways), (96, "recompute"), (256, "recompute")]
    return [pair if pair == (64, "in order") else pytest.param(*pair, marks=ON_CUDA) for pair in of_cuda]


@pytest.fixture
def sums_in_short_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs this small would all recompute scores."""
    monkeypatch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 0)


@contextmanager
def going(way: str) -> Iterator[bool]:
    """Give the argument `deterministic` for this way."""
    deterministic, recompute = WAYS[way]
    with pytest.MonkeyPatch.context() as patch:
        if recompute:
            patch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 1 << 20)
        yield deterministic


def gradients(attention, tensors, lengths, grads, **keywords) -> tuple[Tensor, ...]:
    """Return those of q, k and v, from those of out and lse, either of which may be None."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = attention(*leaves, **lengths, return_lse=True, **keywords)
    pairs = [(x, grad.to(x.dtype)) for x, grad in zip(results, grads, strict=True) if grad is not None]
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


def random_grads(pack: Pack, *, out=True, lse=True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    tokens, heads, _ = pack.q.shape
    dout = torch.randn(pack.q.shape, generator=generator).to(pack.q.dtype)
    dlse = torch.randn(heads, tokens, generator=generator)
    return [dout if out else None, dlse if lse else None]


def to_device(pack: Pack, grads) -> list[Tensor | None]:
    return [None if grad is None else grad.to(pack.device) for grad in grads]


def check_gradients(pack: Pack, *, out=True, lse=True, ways=None, softmax_scale=None) -> None:
    """Compare dq, dk and dv with float64, made in each way. They are 0 for what has no counterpart."""
    grads = random_grads(pack, out=out, lse=lse)
    tensors, keywords = (pack.q, pack.k, pack.v), {"softmax_scale": softmax_scale}
    exact = [x.double() for x in tensors]
    want = gradients(reference.varlen_attention, exact, pack.lengths, grads, **keywords)
    baseline = gradients(reference.varlen_attention, tensors, pack.lengths, grads, **keywords)
    on_device = (pack.on_device(), pack.on_device_lengths(), to_device(pack, grads))
    queries, keys = pack.idle()
    for way in ways or ways_of(pack.q.shape[-1], pack.device):
        with going(way) as deterministic:
            got = gradients(illada.varlen_attention, *on_device, deterministic=deterministic, **keywords)
        for name, g, w, b, none in zip(NAMES, got, want, baseline, (queries, keys, keys), strict=True):
            assert g.shape == w.shape, name
            try:
                assert_close_like(g.cpu(), w, b)
            except AssertionError as error:
                raise AssertionError(f"{name}, {way}: {error}") from None
            assert (g.cpu()[none] == 0).all(), f"{name} of what has no counterpart"
