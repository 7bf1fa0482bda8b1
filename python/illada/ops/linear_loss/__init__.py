"""Masked cross-entropy of the logits hidden @ weight^T, without holding all logits in memory.

    loss = sum_i w_i (logsumexp_v(x_i) - x_i[y_i]) / normalizer        x_i = hidden_i @ weight^T

The head weight multiplies only rows with w_i != 0, one row chunk at a time. The gradients are computed while the
chunk's logits exist. This takes three GEMMs instead of four, and never an [N, V] tensor.

| device          | dtypes                     | kernel                                                            |
|-----------------|----------------------------|-------------------------------------------------------------------|
| CPU             | float32, bfloat16          | torch.mm on chunks of rows, native row loop (csrc/cpu) in between |
| sm_80 and newer | float32, bfloat16, float16 | the same, one fused kernel (csrc/loss) in between                 |
| sm_90a          | bfloat16                   | own GEMM kernels with fused softmax terms (csrc/loss)             |

- `op`: the op's schemas, autograd and FLOP counts, and the public function.
- `kernels`: forward and backward on each device, with the fused kernels.
- `chunks`: the forward by torch.mm, one row chunk at a time.
- `scaling`: when and how gradients are multiplied by scale / normalizer.
"""

from illada.ops.linear_loss.op import compute_dtype_of, linear_masked_cross_entropy
from illada.ops.linear_loss.scaling import deferred_factor, defers_scaling

__all__ = ["compute_dtype_of", "deferred_factor", "defers_scaling", "linear_masked_cross_entropy"]
