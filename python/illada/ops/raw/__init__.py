"""Direct calls of the native kernels with output arguments, without torch's dispatcher.

Benchmarks use them, and programs that own their buffers, such as captured CUDA graphs.

The calls allocate nothing and move nothing, except where a docstring says so. The caller must keep these conditions:

- Shapes are as documented. Only `lse_parts` in the backward of the cross-entropy and the plan's rows are checked.
- Tensors are contiguous. Logits, hidden and weight need this in their last dimension only.
- Dtypes are those that `illada.ops` documents.
- All tensors are on one device.

The native side refuses null pointers, host pointers, wrong devices and overlapping outputs. Each call gives the tensors
that it writes a new version, so autograd detects later use of stale values. CUDA calls run on the current stream. They
are safe in graph capture after one call outside of the capture.

Symbols in shapes: T tokens, N rows, V vocabulary size, C hidden width, S sequences, H query heads, G key-value heads,
D head dim, Tk key rows, K bias slots. Results are written to the output arguments, and functions that write return
None. What the native side refuses raises ValueError, and a device without a kernel NotImplementedError.
"""

from __future__ import annotations

from illada.ops.raw.attention import (
    attention_plan,
    attention_plan_rows,
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_backward_workspace,
    varlen_attention_workspace,
)
from illada.ops.raw.launch import DTYPES
from illada.ops.raw.loss import (
    linear_masked_cross_entropy,
    linear_masked_cross_entropy_workspace,
    masked_cross_entropy,
    masked_cross_entropy_backward,
    masked_cross_entropy_workspace,
    scale,
    weighted_sum,
)
from illada.ops.raw.sampling import (
    head_plan,
    linear_sample_tokens,
    linear_sample_tokens_workspace,
    remask,
    sample_tokens,
    sample_tokens_workspace,
)

__all__ = [
    "DTYPES",
    "attention_plan",
    "attention_plan_rows",
    "head_plan",
    "linear_masked_cross_entropy",
    "linear_masked_cross_entropy_workspace",
    "linear_sample_tokens",
    "linear_sample_tokens_workspace",
    "masked_cross_entropy",
    "masked_cross_entropy_backward",
    "masked_cross_entropy_workspace",
    "remask",
    "sample_tokens",
    "sample_tokens_workspace",
    "scale",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_backward_workspace",
    "varlen_attention_workspace",
    "weighted_sum",
]
