"""Public functions of the three op families, which are registered torch ops in the namespace `illada`.

`illada.ops.reference` specifies each op in plain torch.
"""

from illada.ops.attention import attention_plan, varlen_attention
from illada.ops.capabilities import why_not
from illada.ops.labels import masked_cross_entropy_from_labels
from illada.ops.linear_loss import linear_masked_cross_entropy
from illada.ops.loss import masked_cross_entropy
from illada.ops.op_types import AttentionPlan, LogitBias, RemaskStatus, TokenSample
from illada.ops.remask import remask
from illada.ops.sampling import linear_sample_tokens, sample_tokens
from illada.ops.vocab_parallel import (
    linear_masked_cross_entropy_vocab_parallel,
    masked_cross_entropy_shard,
    masked_cross_entropy_shard_grad,
)

__all__ = [
    "AttentionPlan",
    "LogitBias",
    "RemaskStatus",
    "TokenSample",
    "attention_plan",
    "linear_masked_cross_entropy",
    "linear_masked_cross_entropy_vocab_parallel",
    "linear_sample_tokens",
    "masked_cross_entropy",
    "masked_cross_entropy_from_labels",
    "masked_cross_entropy_shard",
    "masked_cross_entropy_shard_grad",
    "remask",
    "sample_tokens",
    "varlen_attention",
    "why_not",
]
