"""Types and constants that the ops and their reference share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Confidence measures of a sampled token.
MEASURES = ("probability", "margin", "entropy", "random")

#: Commit rules of `remask` (illada::remask::Rule).
RULES = ("quota", "threshold", "factor", "entropy_bound")

#: Logit bias (ids int32, values float32), both [N, K] or [K]: `values` are added to the logits of `ids`; -1 is no id.
LogitBias = tuple[Tensor, Tensor]


class TokenSample(NamedTuple):
    """Result of `sample_tokens` for N rows.

    token: int64 [N], the sampled id.
    confidence: float32 [N], the chosen measure; larger is more confident. It is -inf where the row's softmax has no
        value (NaN or +inf among the logits, or only -inf); such a row is never committed.
    logprob: float32 [N], log p(token), in nats, under the softmax without noise, temperature and filters.
    entropy: float32 [N], in nats, or None unless requested.
    margin: float32 [N], p of the most likely id minus p of the next, or None unless requested.

    With `confidence_at_temperature`, all fields except `token` refer to the softmax at the temperature, over the ids
    that the filters keep.
    """

    token: Tensor
    confidence: Tensor
    logprob: Tensor
    entropy: Tensor | None = None
    margin: Tensor | None = None


class RemaskStatus(NamedTuple):
    """Result of `remask` for S sequences, on the device.

    committed: int32 [S], number of tokens that were written.
    remaining: int32 [S], number of the sequence's rows that still hold the mask.
    finished: bool [S], remaining == 0.
    ended: bool [S], whether this call committed one of `end_ids`.
    """

    committed: Tensor
    remaining: Tensor
    finished: Tensor
    ended: Tensor


class AttentionPlan(NamedTuple):
    """Plan of one pack of sequences: `attention_plan` makes it once for every layer and direction.

    work: int32 [rows, 4] on the pack's device. On a CPU a row is a sequence, (query start, query end, key start, key
        end), longest first. On CUDA the rows are internal to the kernels (csrc/attention/plan.h).
    num_heads, num_kv_heads, head_dim, total_q, num_sequences: sizes that the plan was made for.
    """

    work: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    total_q: int
    num_sequences: int
