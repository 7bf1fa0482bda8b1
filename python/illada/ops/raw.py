"""Out-parameter calls without the dispatcher: the kernels as they are, for benchmarks and for graphs that own their
buffers.

Nothing is allocated or moved. No shape is checked but that of `lse_parts` in the backward of the cross-entropy. Tensors
are contiguous (logits, hidden and weight: in their last dimension), of the dtypes that `illada.ops` documents, and on
one device; the native side refuses null and host pointers, wrong devices and overlapping outputs. What is written to
gets a new version, so that autograd knows. CUDA calls go to the current stream and are safe in graph capture after one
call outside of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from illada._native import native
from illada.ops._library import add_product, address, check_dtype, check_shape, stream, written
from illada.ops.types import RemaskStatus, TokenSample

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # illada::DType
_CPU = (-1, 0, False, 0, 0)  # LaunchArguments of csrc/bindings


def _launch(out: Tensor, tensor: Tensor, *others: Tensor | None, workspace: Tensor | None = None) -> tuple:
    """Where a call on `tensor` goes. ValueError: on a CPU, but to write to a GPU (the reverse is refused natively).

    `out`, `others` and `workspace` are all other tensors of the call. If they are on the device of `tensor`, the native
    side does not ask CUDA about their addresses; else it does, and its error names the wrong one.
    """
    if not tensor.is_cuda:
        if out.is_cuda:
            raise ValueError(f"the inputs are on the CPU, but the outputs are on {out.device}; they must agree")
        return _CPU
    index, checked = tensor.get_device(), True
    for other in (out, workspace, *others):
        if other is not None and other.get_device() != index:
            checked = False
    size = 0 if workspace is None else workspace.numel() * workspace.element_size()
    return index, stream(tensor.device), checked, address(workspace), size


def _cuda_launch(op: str, tensor: Tensor, *others: Tensor | None, workspace: Tensor | None = None) -> tuple:
    if not tensor.is_cuda:
        raise ValueError(f"{op}: the raw call takes CUDA tensors, got one on {tensor.device}")
    return _launch(tensor, tensor, *others, workspace=workspace)


def _sample_arguments(
    out: TokenSample, temperature: float, seed: int, step: int, temperatures: Tensor | None, seeds: Tensor | None,
    steps: Tensor | None, row_ids: Tensor | None, bias_ids: Tensor | None, bias_values: Tensor | None, measure: int,
    top_k: int = 0, top_p: float = 1.0, top_ks: Tensor | None = None, top_ps: Tensor | None = None,
    confidence_at_temperature: bool = False,
) -> tuple:  # fmt: skip
    """SampleArguments of csrc/bindings."""
    count, stride = 0, 0
    if bias_ids is not None:
        count = bias_ids.shape[-1]
        stride = count if bias_ids.dim() == 2 else 0
    return (
        *(temperature, seed, step, address(temperatures), address(seeds), address(steps), address(row_ids)),
        *(address(bias_ids), address(bias_values), count, stride, measure),
        *(address(out.token), address(out.confidence), address(out.logprob), address(out.entropy), address(out.margin)),
        *(top_k, top_p, address(top_ks), address(top_ps), confidence_at_temperature),
    )


def sample_tokens_workspace(rows: int, vocab_size: int, device: torch.device, filtered: bool = False) -> int:
    """Bytes of workspace that `sample_tokens` needs on `device`; 0 on a CPU.

    filtered: with top_k, top_p, top_ks, top_ps or confidence_at_temperature.
    """
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return native().sample_tokens_workspace(rows, vocab_size, index, filtered)


def sample_tokens(
    out: TokenSample,
    logits: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    row_ids: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    measure: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
    confidence_at_temperature: bool = False,
    *,
    workspace: Tensor | None = None,
) -> None:
    """`illada.ops.sample_tokens` into `out`, whose entropy and margin may be None or empty.

    temperatures, seeds, steps, top_ks, top_ps: one for each row, in place of the number; measure: index into
    `types.MEASURES`; workspace: uint8, of the size that `sample_tokens_workspace` says.
    """
    arguments = _sample_arguments(
        out, temperature, seed, step, temperatures, seeds, steps, row_ids, bias_ids, bias_values, measure,
        top_k, top_p, top_ks, top_ps, confidence_at_temperature,
    )  # fmt: skip
    launch = _launch(
        out.token, logits, *out[1:], temperatures, seeds, steps, row_ids, bias_ids, bias_values, top_ks, top_ps,
        workspace=workspace,
    )  # fmt: skip
    native().sample_tokens(
        *(address(logits), logits.stride(0), *logits.shape, DTYPES[logits.dtype]),
        *(arguments, torch.get_num_threads(), launch),
    )
    written(*out)


def _linear_arguments(hidden: Tensor, weight: Tensor, rows: Tensor | None) -> tuple:
    count = hidden.shape[0] if rows is None else rows.shape[0]
    return (
        *(address(hidden), hidden.stride(0), hidden.shape[0], address(rows), address(weight), weight.stride(0)),
        *(hidden.shape[1], count, weight.shape[0], DTYPES[hidden.dtype]),
    )


def linear_sample_tokens_workspace(hidden: Tensor, weight: Tensor, rows: Tensor | None) -> int | None:
    """Bytes of workspace that `linear_sample_tokens` needs; None where it has no kernel for these tensors.

    It has one on sm_90a for 16-bit elements and 16-byte aligned rows.
    """
    if not hidden.is_cuda:
        return None
    size = native().linear_sample_tokens_workspace(*_linear_arguments(hidden, weight, rows), hidden.device.index)
    return None if size < 0 else size


def head_plan(rows: int, vocab_size: int, sm_count: int) -> tuple[int, int, int, list[tuple[int, int, int, int, int]]]:
    """How `linear_sample_tokens` shares out its work on sm_90a, for tests: what each CTA takes, in its order.

    Returns (CTAs of a cluster, ranges of the vocabulary, chunks of 32 ids in a range, tasks). A task is (CTA, row tile,
    range, tiles of 128 rows x 256 ids, tiles of its cluster): the CTA waits while its neighbour has more of them.
    """
    return native().head_plan(rows, vocab_size, sm_count)


def linear_sample_tokens(
    out: TokenSample,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    row_ids: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    measure: int = 0,
    *,
    workspace: Tensor,
) -> None:
    """The fused kernel of `illada.ops.linear_sample_tokens` into `out`; arguments as in `sample_tokens` of this module.

    There are no filters: they need a row's logits more than once.

    workspace: uint8, of the size that `linear_sample_tokens_workspace` says.
    """
    arguments = _sample_arguments(
        out, temperature, seed, step, temperatures, seeds, steps, row_ids, bias_ids, bias_values, measure
    )
    launch = _launch(
        out.token, hidden, *out[1:], weight, rows, temperatures, seeds, steps, row_ids, bias_ids, bias_values,
        workspace=workspace,
    )  # fmt: skip
    native().linear_sample_tokens(*_linear_arguments(hidden, weight, rows), arguments, launch)
    written(*out)


def _cross_entropy_arguments(
    logits: Tensor, targets: Tensor, token_weights: Tensor, rows: Tensor | None, normalizer: Tensor | None,
    scale: float, vocab_start: int,
) -> tuple:  # fmt: skip
    """CrossEntropyArguments of csrc/bindings."""
    count, vocab_size = logits.shape
    return (
        logits, logits.stride(0), count, vocab_size, DTYPES[logits.dtype], rows, targets, targets.dtype == torch.int64,
        token_weights, token_weights.shape[0], vocab_start, scale, normalizer,
    )  # fmt: skip


def masked_cross_entropy_workspace(rows: int, vocab_size: int, device: torch.device) -> int:
    """Bytes of workspace that `masked_cross_entropy` needs for so many rows; 0 on a CPU."""
    return native().masked_cross_entropy_workspace(rows, vocab_size) if device.type == "cuda" else 0


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    rows: Tensor | None = None,
    nll: Tensor | None = None,
    lse: Tensor | None = None,
    lse_parts: Tensor | None = None,
    target_logit: Tensor | None = None,
    grad: Tensor | None = None,
    normalizer: Tensor | None = None,
    scale: float = 1.0,
    vocab_start: int = 0,
    workspace: Tensor | None = None,
) -> None:
    """What `csrc/include/illada/loss.h` defines of each row of logits, into those of the outputs that are given.

    logits [N, V]; targets int64 (or, on CUDA, int32) [T], token_weights float32 [T] and rows int32 [N] (None: row n is
    token n); nll, lse, target_logit: float32 [N]; lse_parts: float32 [N, 2], the largest logit and lse less that, which
    `grad` needs on CUDA for rows of more than 163,840 ids; grad [N, V], which may be the logits: of the loss, scale /
    normalizer being what the sum is multiplied by, normalizer a float32 scalar; workspace: uint8, as
    `masked_cross_entropy_workspace` says.
    """
    outputs = [out for out in (nll, lse, lse_parts, target_logit, grad) if out is not None]
    first, *others = outputs or [logits]
    native().masked_cross_entropy(
        _cross_entropy_arguments(logits, targets, token_weights, rows, normalizer, scale, vocab_start),
        nll, lse, lse_parts, target_logit, grad, 0 if grad is None else grad.stride(0), torch.get_num_threads(),
        _launch(first, logits, *others, targets, token_weights, rows, normalizer, workspace=workspace),
    )  # fmt: skip
    increment_version(outputs)


def masked_cross_entropy_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    lse_parts: Tensor,
    *,
    rows: Tensor | None = None,
    dloss: Tensor | None = None,
    dlse: Tensor | None = None,
    normalizer: Tensor | None = None,
    scale: float = 1.0,
    vocab_start: int = 0,
) -> None:
    """The gradient of the logits into `grad` [N, V], which may be the logits, from the lse_parts of an earlier call.

    lse_parts: float32 [N, 2], not the lse [N]; dloss: float32 scalar that multiplies, or None: 1; dlse: float32 [N], or
    None: 0. Others as in `masked_cross_entropy` of this module. Another shape or dtype of lse_parts is an error.
    """
    op = "raw.masked_cross_entropy_backward"
    check_shape(op, "lse_parts", lse_parts, (logits.shape[0], 2))  # an lse [N] would be read beyond its end
    check_dtype(op, "lse_parts", lse_parts, (torch.float32,))
    native().masked_cross_entropy_backward(
        _cross_entropy_arguments(logits, targets, token_weights, rows, normalizer, scale, vocab_start),
        lse_parts, dlse, dloss, grad, grad.stride(0), torch.get_num_threads(),
        _launch(grad, logits, targets, token_weights, lse_parts, rows, dloss, dlse, normalizer),
    )  # fmt: skip
    increment_version(grad)


def weighted_sum(
    loss: Tensor, nll: Tensor, token_weights: Tensor, *, normalizer: Tensor | None = None, scale: float = 1.0
) -> None:
    """scale / normalizer * sum_i token_weights[i] nll[i] into `loss`, float32 []; the others float32 [T]."""
    launch = _launch(loss, nll, token_weights, normalizer)
    if launch is _CPU:
        scale = scale if normalizer is None else scale / float(normalizer)
        native().weighted_sum_cpu(nll, token_weights, nll.shape[0], scale, loss)
    else:
        native().weighted_sum(nll, token_weights, nll.shape[0], scale, normalizer, loss, *launch[:3])
    increment_version(loss)


def scale(data: Tensor, factor: Tensor) -> None:
    """data *= factor, a float32 scalar; nothing is read or written where that is 1. data: contiguous. CUDA only."""
    launch = _cuda_launch("scale", data, factor)
    native().scale(address(data), data.numel(), DTYPES[data.dtype], address(factor), *launch[:3])
    written(data)


def _linear_loss_arguments(
    nll: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, rows: Tensor | None,
    normalizer: Tensor | None, scale: float, chunk_rows: int, hidden_grad: Tensor | None, weight_grad: Tensor | None,
    add_to_weight_grad: bool, filter_eps: float,
) -> tuple:  # fmt: skip
    """LinearLossArguments of csrc/bindings."""
    grad_dtype = torch.float32 if weight_grad is None else weight_grad.dtype
    return (
        *(address(hidden), DTYPES[hidden.dtype], hidden.stride(0), hidden.shape[0]),
        *(address(weight), weight.stride(0), weight.shape[0], weight.shape[1]),
        *(address(targets), targets.dtype == torch.int64, address(token_weights)),
        *(address(rows), -1 if rows is None else rows.shape[0], scale, address(normalizer), chunk_rows),
        *(address(nll), address(hidden_grad), address(weight_grad), DTYPES[grad_dtype], add_to_weight_grad, filter_eps),
    )


def linear_masked_cross_entropy_workspace(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    *,
    chunk_rows: int = 0,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    filter_eps: float = 0.0,
) -> int | None:
    """Bytes of workspace that `linear_masked_cross_entropy` needs; None where it has no kernel for these tensors.

    It has one on sm_90a for bfloat16 or float32 hidden and 16-byte aligned rows. The weight may have another dtype
    here, if the call gets it in bfloat16 and contiguous.
    """
    if not hidden.is_cuda or hidden.dtype not in DTYPES:
        return None
    is_bfloat16 = weight.dtype == torch.bfloat16
    arguments = (
        *(address(hidden), DTYPES[hidden.dtype], hidden.stride(0), hidden.shape[0]),
        *((address(weight), weight.stride(0)) if is_bfloat16 else (0, weight.shape[1])),
        *(weight.shape[0], weight.shape[1]),
        # Gradients are only looked at for being there: any address.
        *(0, True, 0, 0, -1 if rows is None else rows.shape[0], 1.0, 0, chunk_rows),
        *(0, int(hidden_grad), int(weight_grad), 0, False, filter_eps),
    )
    size = native().linear_masked_cross_entropy_workspace(arguments, hidden.device.index)
    return None if size < 0 else size


def linear_masked_cross_entropy(
    nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    rows: Tensor | None = None,
    *,
    normalizer: Tensor | None = None,
    scale: float = 1.0,
    chunk_rows: int = 0,
    hidden_grad: Tensor | None = None,
    weight_grad: Tensor | None = None,
    add_to_weight_grad: bool = False,
    filter_eps: float = 0.0,
    workspace: Tensor,
) -> None:
    """The kernels of `illada.ops.linear_masked_cross_entropy` on sm_90a: nll float32 [T] and the gradients of
    sum_i w_i nll_i * scale / normalizer, each of tokens with a weight (of `rows`) alone.

    Other tokens' nll and hidden_grad are left as they are. hidden_grad: [T, C], of hidden's dtype; weight_grad: [V, C],
    float32 or bfloat16, added to if asked for; both contiguous. normalizer: float32 scalar on the device. filter_eps:
    as in `illada.ops.linear_masked_cross_entropy`. workspace: uint8, of the size that
    `linear_masked_cross_entropy_workspace` says.

    Where the choice loss_gradients is "mm", torch.mm makes the gradients, of all rows of a chunk, used or not, and
    exactly, whatever filter_eps is; it may allocate.
    """
    arguments = _linear_loss_arguments(
        nll, hidden, weight, targets, token_weights, rows, normalizer, scale, chunk_rows, hidden_grad, weight_grad,
        add_to_weight_grad, filter_eps,
    )  # fmt: skip
    launch = _cuda_launch(
        "linear_masked_cross_entropy", hidden, nll, weight, targets, token_weights, rows, normalizer, hidden_grad,
        weight_grad, workspace=workspace,
    )  # fmt: skip
    if (hidden_grad is None and weight_grad is None) or not native().linear_loss_by_mm():
        native().linear_masked_cross_entropy(arguments, launch)
    else:
        _linear_loss_by_mm(arguments, launch, weight, hidden_grad, weight_grad, add_to_weight_grad, workspace)
    written(nll, hidden_grad, weight_grad)


@torch.no_grad()
def _linear_loss_by_mm(
    arguments: tuple, launch: tuple, weight: Tensor, hidden_grad: Tensor | None, weight_grad: Tensor | None,
    add_to_weight_grad: bool, workspace: Tensor,
) -> None:  # fmt: skip
    """`linear_masked_cross_entropy`, but for the products of the gradients, which are torch.mm's."""
    chunks, rows, stride, weight_first, *offsets = native().linear_loss_layout(arguments, launch[0])

    def place(offset: int, columns: int, dtype: torch.dtype) -> Tensor:
        return workspace.view(-1)[offset : offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    if chunks == 0 and weight_grad is not None and not add_to_weight_grad:
        weight_grad.zero_()
    probabilities = place(offsets[0], stride, torch.bfloat16)[:, : weight.shape[0]] if chunks else workspace

    def make_weight_grad(weight_grad: Tensor, chunk: int) -> None:
        selected = place(offsets[1], weight.shape[1], torch.bfloat16)
        add_product(weight_grad, probabilities.t(), selected, first=chunk == 0 and not add_to_weight_grad)

    for chunk in range(chunks):
        native().linear_loss_probabilities(arguments, chunk, launch)
        if weight_grad is not None and weight_first:
            make_weight_grad(weight_grad, chunk)
        if hidden_grad is not None:
            product = place(offsets[2], weight.shape[1], torch.float32)
            add_product(product, probabilities, weight, first=True)
            native().linear_loss_scatter(arguments, chunk, launch)
        if weight_grad is not None and not weight_first:
            make_weight_grad(weight_grad, chunk)


def attention_plan_rows(
    total_q: int, total_k: int | None, num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Rows of a plan on CUDA, int32 [rows, 4]; total_k None: without a work list for the backward."""
    return native().attention_plan_rows(
        (total_q, -1 if total_k is None else total_k, num_sequences, num_heads, num_kv_heads, head_dim)
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
    """`illada.ops.attention_plan` into `out`, int32 of the rows that `attention_plan_rows` says. CUDA only."""
    launch = _cuda_launch("attention_plan", cu_seqlens, cu_seqlens_k, seqused_k, out)
    sequences = cu_seqlens.shape[0] - 1
    pack = (total_q, -1 if total_k is None else total_k, sequences, num_heads, num_kv_heads, head_dim)
    if out.shape[0] != native().attention_plan_rows(pack):
        raise ValueError(f"attention_plan: out must have {native().attention_plan_rows(pack)} rows, got {len(out)}")
    native().attention_plan(
        *(pack, address(cu_seqlens), address(cu_seqlens_k), address(seqused_k), address(out)), *launch[:3]
    )
    written(out)


def varlen_attention_workspace(
    total_q: int, num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> int:
    """Bytes of workspace that `varlen_attention` needs: 0 but for small packs, whose keys may be split."""
    return native().varlen_attention_workspace((total_q, 0, num_sequences, num_heads, num_kv_heads, head_dim))


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
    """`illada.ops.varlen_attention` into `out` [T, H, D] and `lse` float32 [H, T], both contiguous.

    plan: of `attention_plan` with the same numbers; on a CPU rows (query start, query end, key start, key end), and
    sequences that it leaves out are not touched. workspace: uint8, as `varlen_attention_workspace` says.
    """
    if plan.is_cuda and not q.is_cuda:  # which the host would read
        raise ValueError(f"varlen_attention: q is on the CPU, but the plan is on {plan.device}; they must agree")
    total_q, heads, dim = q.shape
    native().varlen_attention(
        (total_q, k.shape[0], num_sequences, heads, k.shape[1], dim), DTYPES[q.dtype],
        (q, *q.stride()[:2]), (k, *k.stride()[:2]), (v, *v.stride()[:2]),
        softmax_scale, plan, plan.shape[0], out, lse, torch.get_num_threads(),
        _launch(out, q, k, v, plan, lse, workspace=workspace),
    )  # fmt: skip
    increment_version((out, lse))


def varlen_attention_backward_workspace(
    total_q: int, total_k: int, num_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int,
    deterministic: bool, multiplies_twice: bool, device: int,
) -> int:  # fmt: skip
    """Bytes of workspace that `varlen_attention_backward` needs on the CUDA device of this index."""
    pack = (total_q, total_k, num_sequences, num_heads, num_kv_heads, head_dim)
    return native().varlen_attention_backward_workspace(pack, deterministic, multiplies_twice, device)


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
    multiplies_twice: bool = False,
) -> None:
    """The gradients of `illada.ops.varlen_attention` into `dq` [T, H, D], `dk` and `dv` [Tk, G, D].

    dq, dk, dv, out and lse (float32 [H, T]) are contiguous, as is dlse, float32 [H, T] (None: 0); dout may be strided.
    plan: as of `varlen_attention`, and on CUDA with total_k known; gradients of what it leaves out are 0.

    For CUDA alone: workspace, uint8, as `varlen_attention_backward_workspace` says. deterministic: the same bits in
    every run, as always on a CPU. multiplies_twice: dq by a kernel of its own, faster where sequences are short
    and deterministic as well; before sm_90 always.
    """
    if plan.is_cuda and not q.is_cuda:  # which the host would read
        raise ValueError(f"varlen_attention: q is on the CPU, but the plan is on {plan.device}; they must agree")
    launch = _launch(dq, q, dk, dv, dout, dlse, k, v, out, lse, plan, workspace=workspace)
    total_q, heads, dim = q.shape
    native().varlen_attention_backward(
        (total_q, k.shape[0], num_sequences, heads, k.shape[1], dim), DTYPES[q.dtype],
        (dout, *dout.stride()[:2]), (q, *q.stride()[:2]), (k, *k.stride()[:2]), (v, *v.stride()[:2]),
        out, lse, dlse, softmax_scale, plan, plan.shape[0], deterministic, multiplies_twice, dq, dk, dv,
        torch.get_num_threads(), launch,
    )  # fmt: skip
    increment_version((dq, dk, dv))


def remask(
    out: RemaskStatus,
    tokens: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    token: Tensor,
    confidence: Tensor,
    entropy: Tensor | None,
    rule: int,
    limit: float,
    limits: Tensor | None,
    mask_id: int,
    min_commit: int,
    end_ids: Tensor | None,
) -> None:
    """`illada.ops.remask` into `tokens` and `out`; rule: index into `types.RULES`."""
    native().remask(
        *(address(tokens), tokens.dtype == torch.int64, tokens.shape[0], address(rows), address(cu_rows)),
        *(rows.shape[0], cu_rows.shape[0] - 1, address(token), address(confidence), address(entropy)),
        *(rule, limit, address(limits), mask_id, min_commit),
        *(address(end_ids), 0 if end_ids is None else end_ids.shape[0]),
        *(address(out.committed), address(out.remaining), address(out.finished), address(out.ended)),
        *_launch(out.committed, tokens, *out[1:], rows, cu_rows, token, confidence, entropy, limits, end_ids)[:3],
    )
    written(tokens, *out)
