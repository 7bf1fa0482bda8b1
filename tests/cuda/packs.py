"""Packs that the tests of attention on CUDA tensors share: random numbers, and NaN wherever no sequence may look."""

import itertools

import torch
from torch import Tensor

import illada
from illada.ops import reference
from illada.testing import assert_close_like

TILE_EDGES = [0, 1, 63, 64, 65, 127, 128, 129, 175, 176, 177, 300]


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
        self.device, self.fused = device, fused

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

    def expected(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (out, lse) in float64, and as plain torch computes them at the dtype."""
        want = reference.varlen_attention(
            self.q.double(), self.k.double(), self.v.double(), **self.lengths, return_lse=True
        )
        out, lse = reference.varlen_attention(self.q, self.k, self.v, **self.lengths, return_lse=True)
        return want, (out, lse.float())

    def check(self, **keywords):
        q, k, v = self.on_device()
        got = illada.varlen_attention(q, k, v, **self.on_device_lengths(), return_lse=True, **keywords)
        want, baseline = self.expected()
        for g, w, b in zip(got, want, baseline, strict=True):
            assert_close_like(g.cpu(), w, b)
        return got
