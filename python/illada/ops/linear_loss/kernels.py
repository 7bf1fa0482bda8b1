"""The forward and backward of the loss on each device, with the fused kernels of sm_90a."""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.linear_loss.chunks import CHUNK_BYTES_CPU, forward_by_chunks
from illada.ops.linear_loss.scaling import scale_in_place
from illada.ops.loss import kernel_targets, resolve_normalizer, weighted_sum


def forward_sm90(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    rows: Tensor | None,
    normalizer: Tensor | None,
    scale: float,
    chunk_rows: int,
    hidden_grad: bool,
    weight_grad: bool,
    compute_dtype: torch.dtype,
    grad_weight_dtype: torch.dtype,
    filter_eps: float,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Run the fused kernels, which find the rows with nonzero token weight on the device.

    Returns None where the kernels do not apply. With `into`, the head weight's gradient is added to it.
    """
    if compute_dtype != torch.bfloat16 or hidden.shape[1] % 8 or (into is not None and into.data_ptr() % 16):
        return None
    if hidden.stride(0) % 8 or hidden.data_ptr() % 16:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    # Ask with the weight in its own dtype: a 16-bit copy is needed only where there is a kernel.
    wanted = {"hidden_grad": hidden_grad, "weight_grad": weight_grad}
    size = raw.linear_masked_cross_entropy_workspace(
        hidden, weight, rows, chunk_rows=chunk_rows, filter_eps=filter_eps, **wanted
    )
    if size is None:
        return None
    normalizer, scale = resolve_normalizer(normalizer, scale)
    head = lib.cast(weight, torch.bfloat16)
    nll = token_weights.new_zeros(len(hidden))
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else hidden.new_empty(0)
    d_weight = (
        weight.new_empty(weight.shape if weight_grad else (0,), dtype=grad_weight_dtype) if into is None else into
    )
    raw.linear_masked_cross_entropy(
        *(nll, hidden, head, kernel_targets(targets), lib.contiguous(token_weights)),
        None if rows is None else lib.contiguous(rows),
        normalizer=normalizer,
        scale=scale,
        chunk_rows=chunk_rows,
        hidden_grad=d_hidden if hidden_grad else None,
        weight_grad=d_weight if weight_grad else None,
        add_to_weight_grad=into is not None,
        filter_eps=filter_eps,
        workspace=torch.empty(size, dtype=torch.uint8, device=hidden.device),
    )
    return weighted_sum(nll, token_weights, normalizer, scale), nll, d_hidden, d_weight


def forward_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    rows: Tensor | None,
    *arguments: lib.Argument,
    into: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute linear_masked_ce_fwd; with `into`, add the head weight's gradient to it."""
    if into is None:
        results = lib.cpu_calls().linear_masked_cross_entropy(
            hidden, weight, targets, token_weights, rows, *arguments[:-1], CHUNK_BYTES_CPU
        )
        if results is not None:
            loss, nll, d_hidden, d_weight = results
            if d_hidden is None:
                d_hidden = torch.empty(0, dtype=hidden.dtype, device="cpu")
            if d_weight is None:
                d_weight = torch.empty(0, dtype=arguments[-2], device="cpu")
            return loss, nll, d_hidden, d_weight
    all_weighted = rows is None
    if rows is None:  # on a CPU the host may read the weights
        found = token_weights.nonzero()
        rows = found.squeeze(-1) if found.shape[0] < hidden.shape[0] else None
    elif len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < len(hidden)):
        raise ValueError(f"linear_masked_cross_entropy: rows must be in [0, {len(hidden)}), got {rows.tolist()}")
    elif (rows[1:] <= rows[:-1]).any():
        raise ValueError(f"linear_masked_cross_entropy: rows must ascend, each of them once, got {rows.tolist()}")
    return forward_by_chunks(
        hidden, weight, targets, token_weights, rows, *arguments, into=into, all_weighted=all_weighted
    )


def forward_cuda(*arguments: lib.Argument, into: Tensor | None = None) -> tuple[Tensor, ...]:
    """Compute linear_masked_ce_fwd; with `into`, add the head weight's gradient to it."""
    return forward_sm90(*arguments, into=into) or forward_by_chunks(*arguments, into=into)


def forward_into_cpu(*arguments: lib.Argument) -> tuple[Tensor, ...]:
    """Compute linear_masked_ce_fwd_, whose last argument gets the head weight's gradient."""
    results = forward_cpu(*arguments[:-1], into=arguments[-1])[:3]
    lib.written(arguments[-1])
    return results


def forward_into_cuda(*arguments: lib.Argument) -> tuple[Tensor, ...]:
    """Compute linear_masked_ce_fwd_, whose last argument gets the head weight's gradient."""
    results = forward_cuda(*arguments[:-1], into=arguments[-1])[:3]
    lib.written(arguments[-1])
    return results


def backward_cpu(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute linear_masked_ce_bwd: both gradients times dloss."""
    grads = lib.cpu_calls().scaled_gradients(dloss, hidden_grad, weight_grad)
    if grads is not None:
        return grads
    factor = float(dloss)
    return hidden_grad * factor, weight_grad * factor


def backward_cuda(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute linear_masked_ce_bwd: both gradients times dloss."""
    d_hidden, d_weight = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for x in (hidden_grad, weight_grad)
    )
    backward_in_place(dloss, d_hidden, d_weight)
    return d_hidden, d_weight


def backward_in_place(dloss: Tensor, hidden_grad: Tensor, weight_grad: Tensor) -> None:
    """Compute linear_masked_ce_bwd_, on any device: multiply both gradients by dloss in place."""
    scale_in_place(hidden_grad, dloss)
    scale_in_place(weight_grad, dloss)
