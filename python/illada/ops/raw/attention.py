"""Raw calls of attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from illada._native import native
from illada.ops.raw.launch import DTYPES, cuda_launch, launch_of


def attention_plan_rows(
    total_q: int, total_k: int | None, num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Return the number of rows of an attention plan on CUDA, which is int32 [rows, 4].

    Args:
        total_q: T, the packed queries.
        total_k: Tk, the rows of k and v; None: the plan has no work items for the backward.
        num_sequences: S.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
    """
    return native().attention_plan_rows(
        total_q=total_q,
        total_k=-1 if total_k is None else total_k,
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )


def attention_plan(
    out: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    total_q: int,
    total_k: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Write the plan of `illada.ops.attention_plan` to `out`, on CUDA only.

    Args:
        out: Output, int32 [rows, 4], with rows from `attention_plan_rows`.
        cu_seqlens: int32 [S + 1].
        cu_seqlens_k: int32 [S + 1], or None: the same as cu_seqlens.
        seqused_k: int32 [S], or None: all keys of each slot.
        total_q: T, the packed queries.
        total_k: Tk, the rows of k and v; None: no work items for the backward.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.

    Raises:
        ValueError: `out` has another number of rows, or cu_seqlens is not on CUDA.
    """
    launch = cuda_launch("attention_plan", cu_seqlens, cu_seqlens_k, seqused_k, out)
    num_sequences = cu_seqlens.shape[0] - 1
    rows = attention_plan_rows(total_q, total_k, num_sequences, num_heads, num_kv_heads, head_dim)
    if out.shape[0] != rows:
        raise ValueError(f"attention_plan: out must have {rows} rows, got {len(out)}")
    native().attention_plan(
        total_q=total_q,
        total_k=-1 if total_k is None else total_k,
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        plan=out,
        launch=launch,
    )
    increment_version(out)


def varlen_attention_workspace(
    total_q: int, num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Return the bytes of workspace that `varlen_attention` needs on CUDA.

    They are 0 except for small packs, whose keys may be split.

    Args:
        total_q: T, the packed queries.
        num_sequences: S.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
    """
    return native().varlen_attention_workspace(
        total_q=total_q, num_sequences=num_sequences, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )


def varlen_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_sequences: int,
    softmax_scale: float,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Compute `illada.ops.varlen_attention` into `out` and `lse`.

    Args:
        out: Output, [T, H, D] in q's dtype, contiguous.
        lse: Output, float32 [H, T], contiguous.
        q: [T, H, D], last dimension contiguous.
        k: [Tk, G, D], last dimension contiguous.
        v: Like `k`.
        plan: int32 [rows, 4] from `attention_plan` with the same sizes. On a CPU its rows are (query start, query end,
            key start, key end). The CPU kernel does not touch sequences that the plan leaves out.
        num_sequences: S.
        softmax_scale: Factor of the scores.
        workspace: uint8, at least as large as `varlen_attention_workspace` says.

    Raises:
        ValueError: q and plan are on different devices.
    """
    if plan.is_cuda and not q.is_cuda:  # the host would read device memory
        raise ValueError(f"varlen_attention: q is on the CPU, but the plan is on {plan.device}; they must agree")
    total_q, num_heads, head_dim = q.shape
    total_k, num_kv_heads, _ = k.shape
    native().varlen_attention(
        total_q=total_q,
        total_k=total_k,
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=DTYPES[q.dtype],
        q=q,
        k=k,
        v=v,
        softmax_scale=softmax_scale,
        plan=plan,
        plan_rows=plan.shape[0],
        out=out,
        lse=lse,
        num_threads=torch.get_num_threads(),
        launch=launch_of(out, q, k, v, plan, lse, workspace),
        workspace=workspace,
    )
    increment_version((out, lse))


def varlen_attention_backward_workspace(
    total_q: int,
    total_k: int,
    num_sequences: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    deterministic: bool,
    recompute_scores_for_dq: bool,
    device: int,
) -> int:
    """Return the bytes of workspace that `varlen_attention_backward` needs on CUDA.

    Args:
        total_q: T, the packed queries.
        total_k: Tk, the rows of k and v.
        num_sequences: S.
        num_heads: H.
        num_kv_heads: G.
        head_dim: D.
        deterministic: As in the later call.
        recompute_scores_for_dq: As in the later call.
        device: Index of the CUDA device.
    """
    return native().varlen_attention_backward_workspace(
        total_q=total_q,
        total_k=total_k,
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        deterministic=deterministic,
        recompute_scores_for_dq=recompute_scores_for_dq,
        launch=native().launch(device=device),
    )


def varlen_attention_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    num_sequences: int,
    softmax_scale: float,
    *,
    workspace: Tensor | None = None,
    deterministic: bool = False,
    recompute_scores_for_dq: bool = False,
) -> None:
    """Compute the gradients of `illada.ops.varlen_attention` into `dq`, `dk` and `dv`.

    Args:
        dq: Output, [T, H, D], contiguous.
        dk: Output, [Tk, G, D], contiguous.
        dv: Like `dk`.
        dout: [T, H, D], the gradient of out; it may be strided.
        dlse: float32 [H, T], contiguous, the gradient of lse; None: 0.
        q: As in `varlen_attention` of this module.
        k: As in `varlen_attention` of this module.
        v: As in `varlen_attention` of this module.
        out: [T, H, D], contiguous, from the forward.
        lse: float32 [H, T], contiguous, from the forward.
        plan: As in `varlen_attention` of this module, and on CUDA made with total_k. Gradients of tokens that it leaves
            out are 0.
        num_sequences: S.
        softmax_scale: Factor of the scores.
        workspace: CUDA only; uint8, at least as large as `varlen_attention_backward_workspace` says.
        deterministic: CUDA only; give the same bits in every run, as the CPU kernel always does.
        recompute_scores_for_dq: CUDA only; recompute the scores in a separate kernel for dq. It is faster where
            sequences are short, and deterministic. Devices before sm_90 always do this.

    Raises:
        ValueError: q and plan are on different devices.
    """
    if plan.is_cuda and not q.is_cuda:  # the host would read device memory
        raise ValueError(
            f"varlen_attention_backward: q is on the CPU, but the plan is on {plan.device}; they must agree"
        )
    total_q, num_heads, head_dim = q.shape
    total_k, num_kv_heads, _ = k.shape
    native().varlen_attention_backward(
        total_q=total_q,
        total_k=total_k,
        num_sequences=num_sequences,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=DTYPES[q.dtype],
        dout=dout,
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        dlse=dlse,
        softmax_scale=softmax_scale,
        plan=plan,
        plan_rows=plan.shape[0],
        deterministic=deterministic,
        recompute_scores_for_dq=recompute_scores_for_dq,
        dq=dq,
        dk=dk,
        dv=dv,
        num_threads=torch.get_num_threads(),
        launch=launch_of(dq, q, dk, dv, dout, dlse, k, v, out, lse, plan, workspace),
        workspace=workspace,
    )
    increment_version((dq, dk, dv))
