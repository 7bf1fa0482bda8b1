"""Raw calls of the losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from illada._native import native
from illada.ops._library import add_product, check_dtype, check_shape, written
from illada.ops.raw.launch import DTYPES, cuda_launch, launch_of


def masked_cross_entropy_workspace(rows: int, vocab_size: int, device: torch.device) -> int:
    """Return the bytes of workspace that `masked_cross_entropy` needs.

    Args:
        rows: N, the rows of logits.
        vocab_size: V.
        device: The device of the call.

    Returns:
        Bytes; 0 on a CPU.
    """
    return native().masked_cross_entropy_workspace(num_rows=rows, vocab_size=vocab_size) if device.type == "cuda" else 0


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
    first = outputs[0] if outputs else logits
    num_rows, vocab_size = logits.shape
    native().masked_cross_entropy(
        logits=logits,
        logits_row_stride=logits.stride(0),
        num_rows=num_rows,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
        dtype=DTYPES[logits.dtype],
        rows=rows,
        targets=targets,
        targets_are_int64=targets.dtype == torch.int64,
        token_weights=token_weights,
        num_tokens=token_weights.shape[0],
        scale=scale,
        normalizer=normalizer,
        nll=nll,
        lse=lse,
        lse_parts=lse_parts,
        target_logit=target_logit,
        grad=grad,
        grad_row_stride=0 if grad is None else grad.stride(0),
        num_threads=torch.get_num_threads(),
        launch=launch_of(first, logits, *outputs, targets, token_weights, rows, normalizer, workspace),
        workspace=workspace,
    )
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
        logits: As in `masked_cross_entropy` of this module.
        targets: As in `masked_cross_entropy` of this module.
        token_weights: As in `masked_cross_entropy` of this module.
        rows: As in `masked_cross_entropy` of this module.
        normalizer: As in `masked_cross_entropy` of this module.
        scale: As in `masked_cross_entropy` of this module.
        vocab_start: As in `masked_cross_entropy` of this module.

    Raises:
        ValueError: lse_parts has another shape.
        TypeError: lse_parts has another dtype.
    """
    op = "raw.masked_cross_entropy_backward"
    check_shape(op, "lse_parts", lse_parts, (logits.shape[0], 2))  # an lse [N] would be read beyond its end
    check_dtype(op, "lse_parts", lse_parts, (torch.float32,))
    num_rows, vocab_size = logits.shape
    native().masked_cross_entropy_backward(
        logits=logits,
        logits_row_stride=logits.stride(0),
        num_rows=num_rows,
        vocab_size=vocab_size,
        vocab_start=vocab_start,
        dtype=DTYPES[logits.dtype],
        rows=rows,
        targets=targets,
        targets_are_int64=targets.dtype == torch.int64,
        token_weights=token_weights,
        num_tokens=token_weights.shape[0],
        scale=scale,
        normalizer=normalizer,
        lse_parts=lse_parts,
        dlse=dlse,
        dloss=dloss,
        grad=grad,
        grad_row_stride=grad.stride(0),
        num_threads=torch.get_num_threads(),
        launch=launch_of(grad, logits, targets, token_weights, lse_parts, rows, dloss, dlse, normalizer),
    )
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
    launch = launch_of(loss, nll, token_weights, normalizer)
    write = native().weighted_sum_cpu if launch is None else native().weighted_sum
    write(
        nll=nll,
        token_weights=token_weights,
        num_rows=nll.shape[0],
        scale=scale,
        normalizer=normalizer,
        loss=loss,
        launch=launch,
    )
    increment_version(loss)


def scale(data: Tensor, factor: Tensor) -> None:
    """Multiply `data` by `factor` in place, on CUDA only.

    A factor of 1 reads and writes no data.

    Args:
        data: Any shape, contiguous; float32, bfloat16 or float16.
        factor: float32 scalar on the device.

    Raises:
        ValueError: `data` is not on CUDA.
    """
    launch = cuda_launch("scale", data, factor)
    native().scale(data=data, count=data.numel(), dtype=DTYPES[data.dtype], factor=factor, launch=launch)
    increment_version(data)


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
    vocab_size, width = weight.shape
    size = native().linear_masked_cross_entropy_workspace(
        hidden=hidden,
        hidden_dtype=DTYPES[hidden.dtype],
        hidden_row_stride=hidden.stride(0),
        num_tokens=hidden.shape[0],
        head_weight=weight if is_bfloat16 else None,
        head_weight_row_stride=weight.stride(0) if is_bfloat16 else width,
        vocab_size=vocab_size,
        width=width,
        num_rows=-1 if rows is None else rows.shape[0],
        chunk_rows=chunk_rows,
        filter_eps=filter_eps,
        # The size depends on whether gradients are computed, not on their addresses: pass any nonzero address.
        hidden_grad=1 if hidden_grad else None,
        weight_grad=1 if weight_grad else None,
        launch=native().launch(device=hidden.get_device()),
    )
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
    tensors = (nll, weight, targets, token_weights, rows, normalizer, hidden_grad, weight_grad, workspace)
    vocab_size, width = weight.shape
    fields = {  # of illada::loss::LinearMaskedCrossEntropyParams
        "hidden": hidden,
        "hidden_dtype": DTYPES[hidden.dtype],
        "hidden_row_stride": hidden.stride(0),
        "num_tokens": hidden.shape[0],
        "head_weight": weight,
        "head_weight_row_stride": weight.stride(0),
        "vocab_size": vocab_size,
        "width": width,
        "targets": targets,
        "targets_are_int64": targets.dtype == torch.int64,
        "token_weights": token_weights,
        "rows": rows,
        "num_rows": -1 if rows is None else rows.shape[0],
        "scale": scale,
        "normalizer": normalizer,
        "chunk_rows": chunk_rows,
        "nll": nll,
        "hidden_grad": hidden_grad,
        "weight_grad": weight_grad,
        "weight_grad_dtype": DTYPES[torch.float32 if weight_grad is None else weight_grad.dtype],
        "add_to_weight_grad": add_to_weight_grad,
        "filter_eps": filter_eps,
        "launch": cuda_launch("linear_masked_cross_entropy", hidden, *tensors),
        "workspace": workspace,
    }
    if (hidden_grad is None and weight_grad is None) or not native().linear_loss_by_mm():
        native().linear_masked_cross_entropy(**fields)
    else:
        _linear_loss_by_mm(fields)
    written(nll, hidden_grad, weight_grad)


@torch.no_grad()
def _linear_loss_by_mm(fields: dict[str, Any]) -> None:
    """Run `linear_masked_cross_entropy` with torch.mm for the matrix products of the gradients."""
    weight, hidden_grad, weight_grad = fields["head_weight"], fields["hidden_grad"], fields["weight_grad"]
    adds, memory = fields["add_to_weight_grad"], fields["workspace"].view(-1)
    layout = native().linear_loss_layout(**fields)
    chunks, rows = layout["row_chunks"], layout["chunk_rows"]

    def buffer(name: str, columns: int, dtype: torch.dtype) -> Tensor:
        start, size = layout[name], rows * columns * dtype.itemsize
        return memory[start : start + size].view(dtype).view(rows, columns)

    if chunks == 0 and weight_grad is not None and not adds:
        weight_grad.zero_()
    if chunks == 0:
        return
    vocab_size, width = weight.shape
    probabilities = buffer("probabilities", layout["probabilities_row_stride"], torch.bfloat16)[:, :vocab_size]

    def make_weight_grad(chunk: int) -> None:
        selected = buffer("hidden", width, torch.bfloat16)
        add_product(weight_grad, probabilities.t(), selected, first=chunk == 0 and not adds)

    for chunk in range(chunks):
        native().linear_loss_probabilities(**fields, chunk=chunk)
        if weight_grad is not None and layout["weight_first"]:
            make_weight_grad(chunk)
        if hidden_grad is not None:
            add_product(buffer("product", width, torch.float32), probabilities, weight, first=True)
            native().linear_loss_scatter(**fields, chunk=chunk)
        if weight_grad is not None and not layout["weight_first"]:
            make_weight_grad(chunk)
