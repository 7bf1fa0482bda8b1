"""`illada.why_not` on a GPU agrees with the ops."""

import re

import pytest
import torch

import illada


@pytest.mark.parametrize(
    "dtype, heads, kv_heads, head_dim, reason",
    [
        (torch.bfloat16, 4, 2, 64, None),
        (torch.float16, 2, 2, 128, None),
        (torch.float32, 2, 2, 64, "takes bfloat16 or float16, got float32"),
        (torch.bfloat16, 4, 2, 32, "head dims 64, 96, 128 and 256 .* got head dim 32 and 2 heads on"),
        (torch.bfloat16, 65, 1, 64, "up to 64 query heads of a key-value head; got head dim 64 and 65 heads on"),
    ],
)
def test_attention(dtype, heads, kv_heads, head_dim, reason, device):
    q = torch.zeros(3, heads, head_dim, dtype=dtype, device=device)
    k = torch.zeros(3, kv_heads, head_dim, dtype=dtype, device=device)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32, device=device)
    sizes = {"head_dim": head_dim, "num_heads": heads, "num_kv_heads": kv_heads}
    why = illada.why_not("varlen_attention", device, dtype, **sizes)
    if reason is None:
        assert why is None
        illada.varlen_attention(q, k, k, cu_seqlens)
        return
    assert re.search(reason, why)
    with pytest.raises(NotImplementedError):
        illada.varlen_attention(q, k, k, cu_seqlens)
