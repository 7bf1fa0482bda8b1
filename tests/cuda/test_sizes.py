"""Kernels count rows, tiles and splits in 32 bits: larger sizes are refused before a launch, by an error with the
argument, the size and what is allowed. Expanded tensors, of stride 0, have such sizes and fit."""

import pytest
import torch

from illada._native import native
from illada.ops import raw
from illada.ops.op_types import RemaskStatus, TokenSample

MOST_ROWS = 2**31 - 2**25
SHAPE = ("total_q", "total_k", "num_sequences", "num_heads", "num_kv_heads", "head_dim")
SIZES = {  # a shape: its message
    (2**27, 8, 1, 16, 4, 64): f"total_q x num_heads must be at most {MOST_ROWS}, got {2**27} x 16",
    (8, 2**27, 1, 16, 16, 128): f"total_k x num_kv_heads must be at most {MOST_ROWS}, got {2**27} x 16",
    (1, 1, 1, 2**17, 2**17, 64): f"num_heads must be at most {2**16}, got {2**17}",
    (1, 1, 2**20, 512, 512, 64): f"{2**20} sequences x 512 heads of 1 queries and 1 keys need",
    (2**15, 2**15, 2**31 - 1, 2**31 - 1, 2**31 - 1, 128): "num_heads must be at most",
}


def packs(device, total_q, total_k, heads, kv_heads, dim):
    one = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)
    return one.expand(total_q, heads, dim), *(one.expand(total_k, kv_heads, dim) for _ in range(2))


@pytest.mark.parametrize("pack", SIZES)
def test_attention(pack, device):
    plan, sequences = torch.zeros(1, 4, dtype=torch.int32, device=device), pack[2]
    shape = dict(zip(SHAPE, pack, strict=True))
    q, k, v = packs(device, *pack[:2], *pack[3:])
    calls = {
        "tiling": lambda: native().attention_forward_tiling(**shape, launch=native().launch(device=0)),
        "plan": lambda: native().attention_plan(**shape, launch=native().launch(device=0)),
        "forward": lambda: raw.varlen_attention(q, plan, q, k, v, plan, sequences, 1.0),
        "backward": lambda: raw.varlen_attention_backward(
            q, k, v, q, None, q, k, v, q, plan, plan, sequences, 1.0, workspace=plan
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=SIZES[pack]):
            call()
            pytest.fail(f"{name} took {pack}")


def test_attention_at_the_limit(device):
    for heads in (16, 512):
        pack = (MOST_ROWS // heads, MOST_ROWS // heads, 1, heads, heads, 64)
        shape = dict(zip(SHAPE, pack, strict=True))
        assert native().attention_forward_tiling(**shape, launch=native().launch(device=0))["tile_tokens"] > 0
        assert raw.varlen_attention_backward_workspace(*pack, False, False, 0) == 8 * MOST_ROWS  # (offset, c) of a row


def test_sums_of_dq_end_where_their_places_do(device):
    """On sm_90 they are fp32 [T, H, D] and 128 rows more, with places of 32 bits; beyond, dq has a kernel of its own."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("before and after sm_90 dq always has a kernel of its own")
    last = (2**31 - 1) // (16 * 64) - 128 // 16
    for tokens, bytes_of_a_row in ((last, 8 + 4 * 64), (last + 1, 8)):
        size = raw.varlen_attention_backward_workspace(tokens, tokens, 1, 16, 16, 64, False, False, 0)
        assert 0 <= size - tokens * 16 * bytes_of_a_row < tokens * 16 * 8


@pytest.fixture
def head(device):
    """Return hidden and weight of 16 ids, and a function that gives any number of row numbers, of stride 0."""
    hidden = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    return hidden, hidden.repeat(16, 1), lambda count: torch.zeros(1, dtype=torch.int32, device=device).expand(count)


def test_linear_loss(head, device):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused head is for sm_90")
    hidden, weight, rows = head
    number, target = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"chunk_rows must be at most {2**27}, got {2**28}"):
        raw.linear_masked_cross_entropy(
            number, hidden, weight, target, number, rows(2**28), chunk_rows=2**28, workspace=number
        )
    size = 2**20  # such a weight has 2 TB
    sizes = ("hidden_row_stride", "head_weight_row_stride", "vocab_size", "width", "num_rows", "chunk_rows")
    tensors = ("hidden", "head_weight", "targets", "token_weights", "rows", "nll", "workspace")
    with pytest.raises(ValueError, match=f"chunk_rows x width x vocab_size is too large: {size} x {size} x {size}"):
        native().linear_masked_cross_entropy(
            **dict.fromkeys(sizes, size), **dict.fromkeys(tensors, number), num_tokens=1,
            launch=native().launch(device=0, pointers_checked=True),
        )  # fmt: skip


def test_sampling(head, device):
    hidden, weight, rows = head
    fields = torch.zeros(1, dtype=torch.int64, device=device), *torch.zeros(4, 1, device=device)
    out = TokenSample(*fields)
    with pytest.raises(ValueError, match=f"logits of 16 ids may have {2**31 - 1} rows, got {2**31}"):
        raw.sample_tokens(out, hidden[:, :1].expand(2**31, 16))
    with pytest.raises(ValueError, match=f"num_rows must be at most {2**30}, got {2**30 + 1}"):
        raw.linear_sample_tokens(out, hidden, weight, rows(2**30 + 1), workspace=fields[0])


def test_loss(head, device):
    count = (2**31 - 1) // 9 + 1
    number, target = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"logits of 16 ids may have {count - 1} rows, got {count}"):
        raw.masked_cross_entropy(number.expand(count, 16), target.expand(count), number.expand(count))


def test_remask(head, device):
    _, _, rows = head
    count, ids, number = 2**31 - 1024, torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    status = RemaskStatus(rows(1), rows(1), ids.bool(), ids.bool())
    with pytest.raises(ValueError, match=f"rows may have {count - 1} elements, got {count}"):
        raw.remask(status, ids, rows(count), rows(2), ids, number, None, 0, 1.0, None, 5, 1, None)
