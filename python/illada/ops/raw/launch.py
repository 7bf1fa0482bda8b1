"""The launch of a raw call: the field `launch` of the native functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from illada._native import native
from illada.ops._library import stream

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # illada::DType


def launch_of(out: Tensor, tensor: Tensor, *others: Tensor | None) -> Any:
    """Return the launch of a call whose device is that of `tensor`; None for the CPU.

    If all tensors are on the device of `tensor`, the native side does not ask CUDA about their addresses. Otherwise it
    does, and its error names the wrong tensor.

    Args:
        out: An output tensor.
        tensor: The input that decides the device.
        others: All other tensors of the call, the workspace too.

    Raises:
        ValueError: `tensor` is on the CPU and `out` on a GPU. The native side refuses the reverse.
    """
    if not tensor.is_cuda:
        if out.is_cuda:
            raise ValueError(f"the inputs are on the CPU, but the outputs are on {out.device}; they must agree")
        return None
    index = tensor.get_device()
    checked = out.get_device() == index
    for other in others:
        if other is not None and other.get_device() != index:
            checked = False
    return native().launch(device=index, stream=stream(tensor.device), pointers_checked=checked)


def cuda_launch(op: str, tensor: Tensor, *others: Tensor | None) -> Any:
    """Return the launch of a call that exists on CUDA only.

    Raises ValueError for a tensor on another device.
    """
    if not tensor.is_cuda:
        raise ValueError(f"{op}: the raw call takes CUDA tensors, got one on {tensor.device}")
    return launch_of(tensor, tensor, *others)
