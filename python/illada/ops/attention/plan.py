"""The plan of attention: what of the work depends only on the lengths of a pack."""

from __future__ import annotations

from torch import Tensor

from illada._native import native
from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.op_types import AttentionPlan

lib.LIBRARY.define(
    "attention_plan(Tensor cu_seqlens, Tensor? cu_seqlens_k, Tensor? seqused_k, SymInt total_q, SymInt? total_k, "
    "int num_heads, int num_kv_heads, int head_dim) -> Tensor",
    tags=lib.TAGS,
)


def _check_lengths(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int) -> None:
    """Raise ValueError for lengths that do not fit, where the host may read them."""
    if not lib.may_read(cu_seqlens):
        return
    lib.check_cumulative("attention_plan", "cu_seqlens", cu_seqlens, total_q, may_end_before=True)
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens_k is not None:
        lib.check_cumulative("attention_plan", "cu_seqlens_k", cu_seqlens_k, None)
    if seqused_k is not None:
        room = starts_k[1:] - starts_k[:-1]
        if bool(((seqused_k < 0) | (seqused_k > room)).any()):
            raise ValueError(
                f"attention_plan: seqused_k must be within the key slots {room.tolist()}, got {seqused_k.tolist()}"
            )


def _plan_cpu(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int, total_k: int | None,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    sequences = cu_seqlens.shape[0] - 1
    plan = cu_seqlens.new_empty(sequences + 1, 4)
    if not native().attention_plan_cpu(
        total_q=total_q,
        num_sequences=sequences,
        cu_seqlens=lib.contiguous(cu_seqlens),
        cu_seqlens_k=None if cu_seqlens_k is None else lib.contiguous(cu_seqlens_k),
        seqused_k=None if seqused_k is None else lib.contiguous(seqused_k),
        plan=plan,
    ):
        _check_lengths(cu_seqlens, cu_seqlens_k, seqused_k, total_q)
        # _check_lengths has a better message for most cases.
        raise ValueError("attention_plan: the lengths do not ascend from 0, or do not fit")
    return plan


_BLOCK_ROWS, _MIN_BLOCKS, _SPLIT_SLOTS, _BACKWARD_KEYS = 64, 2, 320, 128  # as in csrc/attention/plan.h


def plan_rows(total_q: int, total_k: int | None, num_sequences: int, num_heads: int, num_kv_heads: int) -> int:
    """Return the number of rows of a plan on CUDA, also for symbolic shapes.

    C++ defines it: `plan_rows` in csrc/attention/launch.cpp, which takes no symbols. tests/cuda/test_attention_plan.py
    compares both over a grid of shapes.
    """
    block_tokens = max(_BLOCK_ROWS // (num_heads // num_kv_heads), 1)
    tiles = num_kv_heads * (total_q // (_MIN_BLOCKS * block_tokens) + num_sequences)
    forward = tiles + num_kv_heads + _SPLIT_SLOTS
    backward = 0 if total_k is None else num_kv_heads * (total_k // _BACKWARD_KEYS + num_sequences)
    return 1 + 2 * forward + 2 * backward + num_sequences


def _plan_cuda(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, total_q: int, total_k: int | None,
    num_heads: int, num_kv_heads: int, head_dim: int,
) -> Tensor:  # fmt: skip
    _check_lengths(cu_seqlens, cu_seqlens_k, seqused_k, total_q)
    cu_seqlens = cu_seqlens.contiguous()
    cu_seqlens_k = None if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    seqused_k = None if seqused_k is None else seqused_k.contiguous()
    sizes = (num_heads, num_kv_heads, head_dim)
    rows = raw.attention_plan_rows(total_q, total_k, cu_seqlens.shape[0] - 1, *sizes)
    plan = cu_seqlens.new_empty(rows, 4)
    raw.attention_plan(plan, cu_seqlens, cu_seqlens_k, seqused_k, total_q, total_k, *sizes)
    return plan


def _plan_fake(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    total_q: int,
    total_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    sequences = cu_seqlens.shape[0] - 1
    if cu_seqlens.device.type == "cuda":
        return cu_seqlens.new_empty(plan_rows(total_q, total_k, sequences, num_heads, num_kv_heads), 4)
    return cu_seqlens.new_empty(sequences + 1, 4)


lib.implement("attention_plan", _plan_fake, cpu=_plan_cpu, cuda=_plan_cuda)
_call_plan = lib.caller("attention_plan")


def attention_plan(
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    total_q: int,
    total_k: int | None = None,
) -> AttentionPlan:
    """Make the plan of a pack on its device without a host sync; all layers and both directions reuse it.

    Args:
        cu_seqlens: int32 [S + 1], where each sequence of queries starts in the pack, and where the last one ends. The
            values ascend from 0 to at most `total_q`. Queries after the last sequence have no keys. All three tensors
            of lengths may be int64, which is copied.
        cu_seqlens_k: int32 [S + 1], where each sequence's slot of keys starts (anywhere, ascending), and where the last
            one ends; default: the same as the queries.
        seqused_k: int32 [S], how many keys of each slot are in use; default: all.
        num_heads: H of the attention calls, a multiple of G.
        num_kv_heads: G of the attention calls.
        head_dim: D of the attention calls.
        total_q: T, the number of packed queries.
        total_k: Tk, the number of rows of k and v. Default: T without cu_seqlens_k, otherwise unknown. A plan for
            gradients on CUDA needs it.

    Returns:
        AttentionPlan, whose work is int32 [rows, 4].

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device, or values that do not ascend or fit. Values are checked
            on a CPU, and on CUDA under ILLADA_DEBUG=1, because reading them there costs a sync; otherwise values on
            CUDA are clamped to what fits.
        NotImplementedError: No kernel was built for this device or these sizes.
    """
    op = "attention_plan"
    for name, tensor in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k), ("seqused_k", seqused_k)):
        if tensor is not None:
            lib.check_index(op, name, tensor)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
    sequences = cu_seqlens.shape[0] - 1  # len() would be a constant under torch.export
    if cu_seqlens_k is not None:
        lib.check_shape(op, "cu_seqlens_k", cu_seqlens_k, (sequences + 1,))
    if seqused_k is not None:
        lib.check_shape(op, "seqused_k", seqused_k, (sequences,))
    lib.check_same_device(op, ("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k), ("seqused_k", seqused_k))
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{op}: num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
    if total_k is None and cu_seqlens_k is None:
        total_k = total_q
    lengths = (lib.as_int32(tensor) for tensor in (cu_seqlens, cu_seqlens_k, seqused_k))
    work = _call_plan(*lengths, total_q, total_k, num_heads, num_kv_heads, head_dim)
    return AttentionPlan(work, num_heads, num_kv_heads, head_dim, total_q, sequences)
