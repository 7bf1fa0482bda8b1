"""What a forward pass takes over from earlier ones: cached keys and values, and the first layer's projections.

Generation and scoring pass them to `MaskedDiffusionModel`, which fills them. Training needs neither.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CachedKeys(NamedTuple):
    """Key-value cache: keys and values of earlier forward passes, and the rows for those of this pass.

    k, v: [layers, R, G, D], R rows that are divided into one slot per sequence; written in place.
    rows: int64 [T], the row for each packed token's key and value.
    cu_seqlens_k: int32 [S + 1], where each sequence's slot starts.
    seqused_k: int32 [S], rows in use in each slot, including the new ones.
    """

    k: Tensor
    v: Tensor
    rows: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor

    def layer(self, i: int) -> CachedKeys:
        """Return the cache of layer `i`, with k and v [R, G, D]."""
        return self._replace(k=self.k[i], v=self.v[i])

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values of one layer, each [T, G, D], to `rows`; return those of all slots [R, G, D].

        `self` is the cache of one layer, from `layer`.
        """
        return self.k.index_copy_(0, self.rows, k), self.v.index_copy_(0, self.rows, v)


class FirstProjection(NamedTuple):
    """Embeddings and projections of the first layer, which depend only on each token's id and position.

    x: [T, C], embeddings.
    cos, sin: [T, 1, D], tables of RoPE, for all layers.
    q: [T, H, D], queries of the first layer, rotated.
    k, v: [T, G, D], keys (rotated) and values of the first layer.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def take(self, index: Tensor) -> FirstProjection:
        """Return a copy for the tokens `index`, int64 [n]."""
        return FirstProjection(*(tensor.index_select(0, index) for tensor in self))

    def put(self, index: Tensor, tokens: FirstProjection) -> None:
        """Replace the tokens `index`, int64 [n], by `tokens`, in place."""
        for tensor, new in zip(self, tokens, strict=True):
            tensor.index_copy_(0, index, new)
