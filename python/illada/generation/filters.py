"""Dream's way of sampling: a token and its confidence, from what temperature, top-p and top-k leave."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from illada.ops import sample_tokens
from illada.ops.types import LogitBias, TokenSample

#: Rows whose logits are made, sorted and sampled at a time: some 25 bytes a logit, 250 MB for a vocabulary of 155,136.
_ROWS = 64


class Filters(NamedTuple):
    """top_p: float32 [N], 1 keeps all. top_k: int64 [N], 0 keeps all."""

    top_p: Tensor
    top_k: Tensor


def filtered_sample_tokens(
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None,
    temperature: Tensor,
    filters: Filters,
    logit_bias: LogitBias | None,
    **per_row: Any,
) -> TokenSample:
    """As `illada.linear_sample_tokens`, but `confidence` and all else is of the distribution that is sampled.

    Args:
        temperature: float32 [N]. filters: what is left of each row. logit_bias: [N, K], added before both.
        per_row: the other arguments of `illada.sample_tokens`; tensors are [N].
    """
    samples = []
    for start in range(0, len(temperature), _ROWS):
        part = slice(start, start + _ROWS)
        chosen = hidden[part] if rows is None else hidden[rows[part]]
        logits = (chosen @ weight.T).float()
        if logit_bias is not None:
            ids, values = (tensor[part] for tensor in logit_bias)
            logits.scatter_add_(1, ids.clamp_min(0).long(), torch.where(ids < 0, 0.0, values))
        keywords: dict[str, Any] = {k: v[part] if isinstance(v, Tensor) else v for k, v in per_row.items()}
        samples.append(
            sample_tokens(
                filtered(logits, temperature[part], Filters(*(tensor[part] for tensor in filters))),
                temperature=(temperature[part] > 0).float(),
                **keywords,
            )
        )
    fields: Any = (None if parts[0] is None else torch.cat(parts) for parts in zip(*samples, strict=True))
    return TokenSample(*fields)


def filtered(logits: Tensor, temperature: Tensor, filters: Filters) -> Tensor:
    """Logits [N, V] of what is sampled: divided by the temperature (0 leaves them), -inf where a filter says so.

    top-p keeps the most likely tokens until their sum exceeds it, the one with which it does so included; of equal ones
    those of lower ids. top-k keeps the k most likely and all that equal the last of them.
    """
    # Less the maximum, so that no temperature makes one infinite.
    logits = (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0)[:, None]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    sums = ordered.softmax(-1).cumsum(-1)
    beyond = torch.zeros_like(ids, dtype=torch.bool)
    beyond[:, 1:] = (sums[:, :-1] > filters.top_p[:, None]) & (filters.top_p < 1)[:, None]
    last = ordered.gather(-1, (filters.top_k.clamp(1, logits.shape[-1]) - 1)[:, None])
    dropped = torch.zeros_like(beyond).scatter_(-1, ids, beyond)
    dropped |= (logits < last) & (filters.top_k > 0)[:, None]
    return logits.masked_fill(dropped, -torch.inf)
