"""Packed, bidirectional, grouped-query attention over sequences of any lengths.

    out[i, h] = sum_j softmax_j(softmax_scale * q[i, h] . k[j, g]) v[j, g],   g = h // (H / G)

The index j runs over all keys of token i's own sequence. There is no causal mask, no dropout, no padding and no
`max_seqlen`. `AttentionPlan` holds what depends only on the lengths. A model computes it once per batch for all layers.

| device | dtypes                     | head dim | kernel                                                     |
|--------|----------------------------|----------|------------------------------------------------------------|
| CPU    | float32, bfloat16          | to 256   | csrc/cpu, all sequences at once (bfloat16: up to 64 keys   |
|        |                            |          | where the processor multiplies in it)                      |
|        | float32, bfloat16, float16 | any      | torch's CPU flash attention, one call per sequence         |
| CUDA   | bfloat16, float16          | 64, 96,  | sm_80 and newer (mma.sync); sm_90a (wgmma, TMA) has its    |
|        |                            | 128, 256 | own for 64 and 128; H / G up to 64                         |

On CUDA a pack of few queries and many keys (a block against its cache) is split over keys. Its results then depend in
the last bits on what else is in the pack. Results of larger packs do not.

Queries are independent of each other, so the kernels treat the H / G query heads of a key-value head as additional
queries of that head. Keys and values are never repeated, and their gradients are already summed over the group.

- `plan`: the plan of a pack, `attention_plan`.
- `varlen`: `varlen_attention`, its schemas, autograd and FLOP counts.
- `cpu`, `cuda`: forward and backward on each device.
"""

from illada.ops.attention.cuda import recompute_scores_for_dq
from illada.ops.attention.plan import attention_plan, plan_rows
from illada.ops.attention.varlen import varlen_attention

__all__ = ["attention_plan", "plan_rows", "recompute_scores_for_dq", "varlen_attention"]
