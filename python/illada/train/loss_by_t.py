"""The training loss by masking probability, which says where a model learns.

The loss of Eq. 1 mixes easy tokens (few are masked) and hard ones (nearly all are), each weighted by 1/p.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUCKETS = 8


class LossByT:
    """Sums of the cross-entropies of masked tokens, by masking probability p in equal buckets of [0, 1].

    Args:
        device: Where the sums are kept. Adding to them needs no host sync.
    """

    def __init__(self, device: torch.device | str) -> None:
        # float64: a bucket may get tens of millions of tokens between two lines of the log.
        self._sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, nll: Tensor, token_weights: Tensor) -> None:
        """Add the tokens of one micro-batch.

        Args:
            nll: float32 [T], negative log-likelihoods in nats.
            token_weights: float32 [T], 1 / p where masked, 0 elsewhere.
        """
        masked = token_weights > 0
        p = torch.where(masked, token_weights.clamp(min=1).reciprocal(), torch.zeros_like(token_weights))
        bucket = (p * BUCKETS).long().clamp(max=BUCKETS - 1)
        values = torch.stack([torch.where(masked, nll, torch.zeros_like(nll)), masked.to(nll.dtype)])
        self._sums.index_add_(1, bucket, values.to(self._sums.dtype))

    def take(self) -> list[float | None]:
        """Return the mean cross-entropy of each bucket, in nats per masked token, and begin anew.

        None: no token of that bucket was masked.
        """
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
