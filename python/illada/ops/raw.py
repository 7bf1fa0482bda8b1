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

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from illada._native import native
from illada.ops._library import add_product, address, check_dtype, check_shape, stream, written
from illada.ops.types import RemaskStatus, TokenSample

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # illada::DType
_CPU = (-1, 0, False, 0, 0)  # LaunchArguments of csrc/bindings


def _launch(out: Tensor, tensor: Tensor, *others: Tensor | None, workspace: Tensor | None = None) -> tuple:
    """Launch arguments of a call whose device is that of `tensor`.

    If `out`, `others` and `workspace` are all on the device of `tensor`, the native side does not ask CUDA about their
    addresses. Otherwise it does, and its error names the wrong tensor.

    Args:
        out: An output tensor.
        tensor: The input that decides the device.
        others: All other tensors of the call.
        workspace: uint8 scratch memory, or None.

    Returns:
        (device index, stream address, devices are checked, workspace address, workspace bytes); device -1 is the CPU.

    Raises:
        ValueError: `tensor` is on the CPU and `out` on a GPU. The native side refuses the reverse.
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
    """Return the tuple that csrc/bindings reads as SampleArguments."""
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
    """Return the bytes of workspace that `sample_tokens` needs.

    Args:
        rows: N, the rows of logits.
        vocab_size: V.
        device: The device of the call; a CUDA device without an index is the current one.
        filtered: Whether the call uses top_k, top_p, top_ks, top_ps or confidence_at_temperature.

    Returns:
        Bytes; 0 on a CPU.
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
    """Sample one token of each row of logits into `out`, as `illada.ops.sample_tokens` does.

    Args:
        out: The outputs, each [N]: token int64; confidence, logprob, entropy and margin float32. Entropy and margin may
            be None or empty.
        logits: [N, V], float32, bfloat16 or (on CUDA) float16, any row stride.
        temperature, seed, step: Numbers for all rows.
        temperatures, seeds, steps: float32, int64 and int32 [N], one value per row in place of the number.
        row_ids: int64 [N] in [0, 2^32); default 0 .. N - 1.
        bias_ids: int32 [N, K] or [K]; -1 is an unused slot.
        bias_values: float32, the shape of `bias_ids`.
        measure: The confidence measure, an index into `types.MEASURES`.
        top_k, top_p: Filters for all rows; 0 and 1.0 keep all ids.
        top_ks, top_ps: int32 and float32 [N], one value per row in place of the number.
        confidence_at_temperature: Compute all outputs but `token` from the distribution that is sampled.
        workspace: uint8, at least as large as `sample_tokens_workspace` says.
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
    """Return the bytes of workspace that `linear_sample_tokens` needs.

    Args:
        hidden: [T, C].
        weight: [V, C], the head weight.
        rows: int32 [N], or None for all T rows.

    Returns:
        Bytes, or None where no fused kernel takes these tensors. One exists on sm_90a for 16-bit elements and 16-byte
        aligned rows.
    """
    if not hidden.is_cuda:
        return None
    size = native().linear_sample_tokens_workspace(*_linear_arguments(hidden, weight, rows), hidden.device.index)
    return None if size < 0 else size


def head_plan(rows: int, vocab_size: int, sm_count: int) -> tuple[int, int, int, list[tuple[int, int, int, int, int]]]:
    """Return how `linear_sample_tokens` divides its work among CTAs on sm_90a; for tests.

    Args:
        rows: N, the rows that are sampled.
        vocab_size: V.
        sm_count: Number of streaming multiprocessors.

    Returns:
        (CTAs per cluster, vocab ranges, slices of 32 ids per range, tasks). A task is (CTA, row tile, range, tiles
        of 128 rows x 256 ids, tiles of its cluster). Each CTA's tasks are in the order of their execution. A CTA waits
        while its neighbour in the cluster has more tiles.
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
    """Run the fused kernel of `illada.ops.linear_sample_tokens` and write to `out`.

    This call has no filters, because filters need a row's logits more than once.

    Args:
        out: The outputs, each [N], as in `sample_tokens` of this module.
        hidden: [T, C], float16 or bfloat16.
        weight: [V, C], the head weight, of hidden's dtype.
        rows: int32 [N], the rows of hidden to sample; None: all T.
        temperature, seed, step, temperatures, seeds, steps, row_ids, bias_ids, bias_values, measure: As in
            `sample_tokens` of this module.
        workspace: uint8, at least as large as `linear_sample_tokens_workspace` says.
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
    """Return the tuple that csrc/bindings reads as CrossEntropyArguments."""
    count, vocab_size = logits.shape
    return (
        logits, logits.stride(0), count, vocab_size, DTYPES[logits.dtype], rows, targets, targets.dtype == torch.int64,
        token_weights, token_weights.shape[0], vocab_start, scale, normalizer,
    )  # fmt: skip


def masked_cross_entropy_workspace(rows: int, vocab_size: int, device: torch.device) -> int:
    """Return the bytes of workspace that `masked_cross_entropy` needs.

    Args:
        rows: N, the rows of logits.
        vocab_size: V.
        device: The device of the call.

    Returns:
        Bytes; 0 on a CPU.
    """
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
    """Compute the masked cross-entropy of each row of logits and write the outputs that are given.

    `csrc/include/illada/loss.h` defines the formulas. All outputs are 0 in rows with token weight 0.

    Args:
        logits: [N, V], float32, bfloat16 or (on CUDA) float16.
        targets: int64 or (on CUDA) int32 [T].
        token_weights: float32 [T].
        rows: int32 [N], the token of each row of logits; None: row n is token n.
        nll: Output, float32 [N], nats.
        lse: Output, float32 [N], log sum exp of each row.
        lse_parts: Output, float32 [N, 2]: the largest logit, and lse minus that. `grad` needs it on CUDA for rows of
            more than 163,840 ids (20,480 before sm_90).
        target_logit: Output, float32 [N].
        grad: Output, [N, V] in the dtype of logits, the gradient of the loss. It may be the logits tensor.
        normalizer: float32 scalar that divides the loss; None: 1.
        scale: Factor that multiplies the loss, beside 1 / normalizer.
        vocab_start: The id of the first column of logits.
        workspace: uint8, at least as large as `masked_cross_entropy_workspace` says.
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
    """Compute the gradient of the logits into `grad` from the lse_parts of an earlier call.

    Args:
        grad: Output, [N, V] in the dtype of logits. It may be the logits tensor.
        lse_parts: float32 [N, 2] from `masked_cross_entropy` of this module, not the lse [N].
        dloss: float32 scalar, the gradient of the loss; None: 1.
        dlse: float32 [N], the gradient of the lse; None: 0.
        logits, targets, token_weights, rows, normalizer, scale, vocab_start: As in `masked_cross_entropy` of this
            module.

    Raises:
        ValueError: lse_parts has another shape.
        TypeError: lse_parts has another dtype.
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
    """Write scale / normalizer * sum_i token_weights[i] nll[i] to `loss`.

    Args:
        loss: Output, float32 scalar.
        nll: float32 [T].
        token_weights: float32 [T].
        normalizer: float32 scalar that divides the sum; None: 1.
        scale: Factor that multiplies the sum.
    """
    launch = _launch(loss, nll, token_weights, normalizer)
    if launch is _CPU:
        scale = scale if normalizer is None else scale / float(normalizer)
        native().weighted_sum_cpu(nll, token_weights, nll.shape[0], scale, loss)
    else:
        native().weighted_sum(nll, token_weights, nll.shape[0], scale, normalizer, loss, *launch[:3])
    increment_version(loss)


def scale(data: Tensor, factor: Tensor) -> None:
    """Multiply `data` by `factor` in place, on CUDA only. A factor of 1 reads and writes no data.

    Args:
        data: Any shape, contiguous; float32, bfloat16 or float16.
        factor: float32 scalar on the device.

    Raises:
        ValueError: `data` is not on CUDA.
    """
    launch = _cuda_launch("scale", data, factor)
    native().scale(address(data), data.numel(), DTYPES[data.dtype], address(factor), *launch[:3])
    written(data)


def _linear_loss_arguments(
    nll: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, rows: Tensor | None,
    normalizer: Tensor | None, scale: float, chunk_rows: int, hidden_grad: Tensor | None, weight_grad: Tensor | None,
    add_to_weight_grad: bool, filter_eps: float,
) -> tuple:  # fmt: skip
    """Return the tuple that csrc/bindings reads as LinearLossArguments."""
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
    """Return the bytes of workspace that `linear_masked_cross_entropy` needs.

    Args:
        hidden: [T, C].
        weight: [V, C], the head weight. It may have another dtype here, if the later call gets it in bfloat16 and
            contiguous.
        rows: int32 [N], or None.
        chunk_rows: As in the later call.
        hidden_grad: Whether the later call computes the gradient of hidden.
        weight_grad: Whether the later call computes the gradient of the weight.
        filter_eps: As in the later call.

    Returns:
        Bytes, or None where no kernel takes these tensors. One exists on sm_90a for bfloat16 or float32 hidden and
        16-byte aligned rows.
    """
    if not hidden.is_cuda or hidden.dtype not in DTYPES:
        return None
    is_bfloat16 = weight.dtype == torch.bfloat16
    arguments = (
        *(address(hidden), DTYPES[hidden.dtype], hidden.stride(0), hidden.shape[0]),
        *((address(weight), weight.stride(0)) if is_bfloat16 else (0, weight.shape[1])),
        *(weight.shape[0], weight.shape[1]),
        # The size depends on whether gradients are computed, not on their addresses: pass any nonzero address.
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
    """Run the sm_90a kernels of `illada.ops.linear_masked_cross_entropy`: nll and gradients.

    The gradients are those of sum_i w_i nll_i * scale / normalizer. Only tokens with nonzero token weight count, and
    only those in `rows` where it is given. The call leaves the nll and hidden_grad of other tokens unchanged.

    Where the variant loss_gradients is "mm", torch.mm computes the gradients, of all rows of a chunk, used or not. It
    computes them exactly, whatever filter_eps is, and it may allocate.

    Args:
        nll: Output, float32 [T], nats.
        hidden: [T, C], bfloat16 or float32 (rounded to bfloat16), 16-byte aligned rows.
        weight: [V, C], the head weight, bfloat16, 16-byte aligned rows.
        targets: int64 or int32 [T].
        token_weights: float32 [T].
        rows: int32 [N], distinct; None: the tokens with nonzero weight, found on the device.
        normalizer: float32 scalar on the device; None: 1.
        scale: Factor that multiplies the loss.
        chunk_rows: Tokens whose probabilities exist at a time; 0: as many as the default buffer holds.
        hidden_grad: Output, [T, C] in hidden's dtype, contiguous; or None.
        weight_grad: Output, [V, C], float32 or bfloat16, contiguous; or None.
        add_to_weight_grad: Add to the contents of weight_grad instead of overwriting them.
        filter_eps: As in `illada.ops.linear_masked_cross_entropy`.
        workspace: uint8, at least as large as `linear_masked_cross_entropy_workspace` says.

    Raises:
        ValueError: hidden is not on CUDA.
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
    """Run `linear_masked_cross_entropy` with torch.mm for the matrix products of the gradients."""
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
    """Return the number of rows of an attention plan on CUDA, which is int32 [rows, 4].

    Args:
        total_q: T, the packed queries.
        total_k: Tk, the rows of k and v; None: the plan has no work items for the backward.
        num_sequences: S.
        num_heads, num_kv_heads, head_dim: H, G and D.
    """
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
    """Write the plan of `illada.ops.attention_plan` to `out`, on CUDA only.

    Args:
        out: Output, int32 [rows, 4], with rows from `attention_plan_rows`.
        cu_seqlens: int32 [S + 1].
        cu_seqlens_k: int32 [S + 1], or None: the same as cu_seqlens.
        seqused_k: int32 [S], or None: all keys of each slot.
        total_q: T, the packed queries.
        total_k: Tk, the rows of k and v; None: no work items for the backward.
        num_heads, num_kv_heads, head_dim: H, G and D.

    Raises:
        ValueError: `out` has another number of rows, or cu_seqlens is not on CUDA.
    """
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
    """Return the bytes of workspace that `varlen_attention` needs on CUDA.

    They are 0 except for small packs, whose keys may be split.

    Args:
        total_q: T, the packed queries.
        num_sequences: S.
        num_heads, num_kv_heads, head_dim: H, G and D.
    """
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
    """Compute `illada.ops.varlen_attention` into `out` and `lse`.

    Args:
        out: Output, [T, H, D] in q's dtype, contiguous.
        lse: Output, float32 [H, T], contiguous.
        q: [T, H, D], last dimension contiguous.
        k, v: [Tk, G, D], last dimension contiguous.
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
    deterministic: bool, recompute_scores_for_dq: bool, device: int,
) -> int:  # fmt: skip
    """Return the bytes of workspace that `varlen_attention_backward` needs on CUDA.

    Args:
        total_q, total_k: T and Tk, the packed queries and the rows of k and v.
        num_sequences: S.
        num_heads, num_kv_heads, head_dim: H, G and D.
        deterministic, recompute_scores_for_dq: As in the later call.
        device: Index of the CUDA device.
    """
    pack = (total_q, total_k, num_sequences, num_heads, num_kv_heads, head_dim)
    return native().varlen_attention_backward_workspace(pack, deterministic, recompute_scores_for_dq, device)


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
        dk, dv: Outputs, [Tk, G, D], contiguous.
        dout: [T, H, D], the gradient of out; it may be strided.
        dlse: float32 [H, T], contiguous, the gradient of lse; None: 0.
        q, k, v: As in `varlen_attention` of this module.
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
    launch = _launch(dq, q, dk, dv, dout, dlse, k, v, out, lse, plan, workspace=workspace)
    total_q, heads, dim = q.shape
    native().varlen_attention_backward(
        (total_q, k.shape[0], num_sequences, heads, k.shape[1], dim), DTYPES[q.dtype],
        (dout, *dout.stride()[:2]), (q, *q.stride()[:2]), (k, *k.stride()[:2]), (v, *v.stride()[:2]),
        out, lse, dlse, softmax_scale, plan, plan.shape[0], deterministic, recompute_scores_for_dq, dq, dk, dv,
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
    """Commit candidates to `tokens` in place and write the counts to `out`, as `illada.ops.remask` does.

    Args:
        out: The outputs, each [S]: committed and remaining int32, finished and ended bool.
        tokens: int64 or int32 [T], the packed canvas.
        rows: int32 [N], the positions in `tokens` that were sampled.
        cu_rows: int32 [S + 1], where each sequence's rows start.
        token: int64 [N], the candidates.
        confidence: float32 [N].
        entropy: float32 [N], nats, or None; the rule entropy_bound needs it.
        rule: The commit rule, an index into `types.RULES`.
        limit: The rule's number for all sequences.
        limits: [S], int32 for quota and float32 for other rules, in place of `limit`; or None.
        mask_id: The id of the mask token.
        min_commit: Fewest candidates to commit, for rules other than quota.
        end_ids: int64 [E], the tokens that end a sequence; or None.
    """
    native().remask(
        *(address(tokens), tokens.dtype == torch.int64, tokens.shape[0], address(rows), address(cu_rows)),
        *(rows.shape[0], cu_rows.shape[0] - 1, address(token), address(confidence), address(entropy)),
        *(rule, limit, address(limits), mask_id, min_commit),
        *(address(end_ids), 0 if end_ids is None else end_ids.shape[0]),
        *(address(out.committed), address(out.remaining), address(out.finished), address(out.ended)),
        *_launch(out.committed, tokens, *out[1:], rows, cu_rows, token, confidence, entropy, limits, end_ids)[:3],
    )
    written(tokens, *out)
