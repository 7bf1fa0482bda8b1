"""Types and constants that the ops and their reference share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: Philox stream tags of the token sampler (counter word 3); the forward process uses tags below 16.
SAMPLE_STREAM = 16
SAMPLE_STREAM_LOW_BITS = 17
SAMPLE_STREAM_RANDOM_MEASURE = 18

#: What a sampled token's confidence can be measured by.
MEASURES = ("probability", "margin", "entropy", "random")

#: By what rule `remask` commits (illada::remask::Rule).
RULES = ("quota", "threshold", "factor", "entropy_bound")

#: (ids int32, values float32), both [N, K] or [K]: `values` are added to the logits of `ids`; -1 is no id.
LogitBias = tuple[Tensor, Tensor]


class TokenSample(NamedTuple):
    """What `sample_tokens` says of each of N rows.

    token: int64 [N], the sampled id.
    confidence: float32 [N], the chosen measure; larger is surer; -inf where the row's softmax has no value
        (NaN or +inf among the logits, or nothing but -inf), such a row is never committed.
    logprob: float32 [N], log p(token) under the softmax without noise and temperature, in nats.
    entropy: float32 [N], in nats, or None unless asked for.
    margin: float32 [N], p of the most likely id minus p of the next, or None unless asked for.
    """

    token: Tensor
    confidence: Tensor
    logprob: Tensor
    entropy: Tensor | None = None
    margin: Tensor | None = None


class RemaskStatus(NamedTuple):
    """What `remask` did to each of S sequences, left on the device.

    committed: int32 [S], how many tokens were written.
    remaining: int32 [S], how many of the sequence's rows still hold the mask.
    finished: bool [S], remaining == 0.
    ended: bool [S], was one of `end_ids` committed by this call?
    """

    committed: Tensor
    remaining: Tensor
    finished: Tensor
    ended: Tensor


class AttentionPlan(NamedTuple):
    """Work list of one pack of sequences, made once by `attention_plan`, used by every layer and direction.

    work: int32 [rows, 4] on the pack's device. On a CPU a row is a sequence, (query start, query end, key start, key
        end), longest first; what it is on CUDA is the kernels' business (csrc/attention/plan.h).
    num_heads, num_kv_heads, head_dim, total_q, num_sequences: what the plan was made for.
    """

    work: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    total_q: int
    num_sequences: int
