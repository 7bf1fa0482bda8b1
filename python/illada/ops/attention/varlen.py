"""The op `varlen_attention`: its schemas, fakes, autograd and FLOP counts, and the public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from illada.devices import autocast_dtype
from illada.ops import _library as lib
from illada.ops.attention import cpu, cuda
from illada.ops.attention.plan import attention_plan
from illada.ops.capabilities import DTYPES
from illada.ops.op_types import AttentionPlan

lib.LIBRARY.define(
    "varlen_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor plan, SymInt num_sequences, float softmax_scale, "
    "bool deterministic) -> (Tensor, Tensor)",
    tags=lib.TAGS,
)
lib.LIBRARY.define(
    "varlen_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor plan, SymInt num_sequences, float softmax_scale, bool deterministic) -> (Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)


def _fwd_fake(q: Tensor, *arguments: lib.Argument) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *arguments: lib.Argument
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Context(lib.Context):
    num_sequences: int
    softmax_scale: float
    deterministic: bool


def _setup_context(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, plan, ctx.num_sequences, ctx.softmax_scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.set_materialize_grads(False)


def _keep(ctx: _Context, inputs: tuple[lib.Argument, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    _setup_context(ctx, inputs, output)
    return output[:1]


def _backward(ctx: _Context, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return None, None, None, None, None, None, None
    q, k, v, out, lse, plan = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = _call_bwd(dout, dlse, q, k, v, out, lse, plan, ctx.num_sequences, ctx.softmax_scale, ctx.deterministic)
    return *grads, None, None, None, None


lib.implement("varlen_attention_fwd", _fwd_fake, cpu=cpu.forward, cuda=cuda.forward)
lib.implement("varlen_attention_bwd", _bwd_fake, cpu=cpu.backward, cuda=cuda.backward)
lib.register_autograd("varlen_attention_fwd", _backward, _setup_context)
lib.raise_on_double_backward("varlen_attention_bwd")
_attend_directly = lib.direct("varlen_attention_fwd", 3, _keep, lambda ctx, dout: _backward(ctx, dout, None)[:3])
_call_fwd, _call_bwd = lib.caller("varlen_attention_fwd"), lib.caller("varlen_attention_bwd")


def _pairs(q: Tensor, k: Tensor, plan: Tensor, num_sequences: int) -> int:
    """Return the query-key pairs of the pack: exact where the host may read the plan, else for equal lengths."""
    if lib.may_read(plan):
        rows = plan.tolist()
        if plan.is_cuda:  # the last rows are the sequences, whose number is in the header
            rows = rows[len(rows) - rows[0][2] :]
        return sum((q_end - q_start) * (k_end - k_start) for q_start, q_end, k_start, k_end in rows)
    return q.shape[0] * k.shape[0] // max(1, num_sequences)


@lib.counts_flops("varlen_attention_fwd")
def _fwd_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_sequences: int,
    *args: lib.Argument,
    out_val: object = None,
    **kwargs: object,
) -> int:
    return 4 * q.shape[1] * q.shape[2] * _pairs(q, k, plan, num_sequences)  # two GEMMs


@lib.counts_flops("varlen_attention_bwd")
def _bwd_flops(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    num_sequences: int,
    *args: lib.Argument,
    out_val: object = None,
    **kwargs: object,
) -> int:
    return 10 * q.shape[1] * q.shape[2] * _pairs(q, k, plan, num_sequences)  # five GEMMs


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    plan: AttentionPlan | None = None,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each packed sequence to itself, or to its slot of a key-value cache, bidirectionally.

    Under autocast q, k and v are cast to its dtype. A second derivative raises.

    Args:
        q: [T, H, D], float32, bfloat16 or float16. Any row and head stride, last dimension contiguous: slices of a
            fused projection are used in place.
        k: [Tk, G, D], H a multiple of G, of q's dtype and device; strides as for q.
        v: Like `k`.
        cu_seqlens: int32 [S + 1] on the device. Sequence s has the queries cu_seqlens[s] .. cu_seqlens[s + 1] - 1. Rows
            from cu_seqlens[S] on belong to no sequence.
        cu_seqlens_k: int32 [S + 1], the key slots; default: the keys of s are its own tokens.
        seqused_k: int32 [S], how many keys of each slot are in use; default: all.
        plan: From `attention_plan` with the same lengths; default: made in this call.
        softmax_scale: Factor of the scores, finite and > 0; default 1 / sqrt(D).
        deterministic: Make gradients bitwise repeatable. On CUDA this costs some speed where sequences are long. On a
            CPU, before compute capability 9.0 and in packs of short sequences they always are.
        return_lse: Also return lse float32 [H, T], the natural log of the softmax's sum; differentiable.

    Returns:
        out [T, H, D] in q's dtype, contiguous; with `return_lse` (out, lse). Queries without keys have out 0, lse -inf
        and gradient 0; this includes queries of no sequence. Keys of no sequence also have gradient 0.

    Raises:
        TypeError, ValueError: A wrong argument; the message names it, with what was given and what is allowed.
        NotImplementedError: No kernel was built for this device, dtype, head dim, group or layout (on CUDA: strides of
            multiples of 8 elements, 16-byte aligned data).
    """
    op = "varlen_attention"
    if (
        (plan is not None and cu_seqlens_k is None and not return_lse)
        and lib.plain_call(q)
        and lib.cpu_calls().attention_fits(q, k, v, cu_seqlens, plan)
    ):
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
        if 0 < scale < math.inf:
            return _attend_directly(q, k, v, plan.work, plan.num_sequences, scale, deterministic)
    if (dtype := autocast_dtype(q.device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    lib.check_dtype(op, "q", q, DTYPES[op]["cpu"])  # the CUDA kernels refuse float32
    lib.check_dtype(op, "k", k, (q.dtype,))
    lib.check_dtype(op, "v", v, (q.dtype,))
    if q.dim() != 3 or k.dim() != 3 or q.shape[2] != k.shape[2] or v.shape != k.shape:
        lib.check_shape(op, "q", q, ("T", "H", "D"))
        lib.check_shape(op, "k", k, ("Tk", "G", q.shape[2]))
        lib.check_shape(op, "v", v, tuple(k.shape))
    (total_q, heads, dim), (total_k, kv_heads, _) = q.shape, k.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_contiguous():
            lib.check_last_contiguous(op, name, tensor)
    lib.check_same_device(op, ("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_seqlens))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: q has {heads} heads, which must be a multiple of k's {kv_heads}")
    if cu_seqlens_k is None and total_k != total_q:
        raise ValueError(f"{op}: k has {total_k} tokens and q has {total_q}; without cu_seqlens_k they must agree")
    scale = dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"{op}: softmax_scale must be finite and > 0, got {scale}")
    if plan is None:
        plan = attention_plan(
            cu_seqlens, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, num_heads=heads, num_kv_heads=kv_heads,
            head_dim=dim, total_q=total_q, total_k=total_k,
        )  # fmt: skip
    else:
        lib.check_same_device(op, ("q", q), ("plan", plan.work))
        sizes = (heads, kv_heads, dim, total_q, cu_seqlens.shape[0] - 1)
        # not plan[1:], which torch 2.6 cannot compile
        if (plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.total_q, plan.num_sequences) != sizes:
            for name, size in zip(AttentionPlan._fields[1:], sizes, strict=True):
                if getattr(plan, name) != size:
                    raise ValueError(f"{op}: plan was made for {name} {getattr(plan, name)}, this call has {size}")
    if cu_seqlens_k is not None and lib.may_read(cu_seqlens_k) and int(cu_seqlens_k[-1]) > total_k:
        raise ValueError(f"{op}: cu_seqlens_k ends at {int(cu_seqlens_k[-1])}, but k has {total_k} tokens")
    out, lse = _call_fwd(q, k, v, plan.work, plan.num_sequences, scale, deterministic)
    return (out, lse) if return_lse else out
