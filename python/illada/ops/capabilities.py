"""A query for the devices, dtypes and sizes that the kernels of this build serve."""

from __future__ import annotations

import torch
from torch import Tensor

from illada._native import has_cuda, native

#: Kind of device -> dtypes of logits, or of the hidden states they are made of. On a CPU these are all dtypes of the
#: native kernels (`has_kernels` in csrc/cpu/dtypes.h); in attention, torch serves the others.
LOGITS_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

#: Op -> kind of device -> dtypes of q, of the logits, or of the hidden states.
DTYPES: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "varlen_attention": {
        "cpu": (torch.float32, torch.bfloat16, torch.float16),
        "cuda": (torch.bfloat16, torch.float16),
    },
    "masked_cross_entropy": LOGITS_DTYPES,
    "linear_masked_cross_entropy": LOGITS_DTYPES,
    "sample_tokens": LOGITS_DTYPES,
    "linear_sample_tokens": LOGITS_DTYPES,
}


def logits_dtypes(tensor: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes of logits that the kernels of this tensor's device take."""
    return LOGITS_DTYPES["cuda" if tensor.is_cuda else "cpu"]


def why_not(
    op: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    head_dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
) -> str | None:
    """Return why no kernel of this build serves an op, or None if one does.

    It asks neither about strides and alignment nor about the number of tokens.

    Args:
        op: "varlen_attention", "masked_cross_entropy", "linear_masked_cross_entropy", "sample_tokens" or
            "linear_sample_tokens".
        device: A CPU or CUDA device; "cuda" is the current one.
        dtype: Dtype of q, of the logits, or of the hidden states; None: any.
        head_dim: D, for attention; None: any.
        num_heads: H, for attention with a head_dim; None: as many as `num_kv_heads`.
        num_kv_heads: G, for attention with a head_dim; None: as many as `num_heads`.

    Returns:
        The reason, without a capital letter and a full stop, or None.

    Raises:
        ValueError: There is no such op, or the device is neither a CPU nor a CUDA device.
    """
    if op not in DTYPES:
        raise ValueError(f"op must be one of {', '.join(DTYPES)}, got {op!r}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    on_cuda = device.type == "cuda"
    if on_cuda:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if not has_cuda():
            return "illada was built without CUDA kernels (`illada info`)"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"the kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    dtypes = DTYPES[op][device.type]
    if dtype is not None and dtype not in dtypes:
        return f"{op} on {device.type} takes {_listed(dtypes)}, got {_name(dtype)}"
    if on_cuda and head_dim is not None and op == "varlen_attention":
        kv_heads = 1 if num_kv_heads is None else num_kv_heads
        return _attention_refusal(kv_heads if num_heads is None else num_heads, kv_heads, head_dim, device)
    return None


def _attention_refusal(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> str | None:
    """Return what the native side says against these sizes on a CUDA device, or None."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        native().attention_forward_tiling(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, launch=native().launch(device=index)
        )
    except NotImplementedError as error:
        return str(error).removeprefix("varlen_attention: ")
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *others, last = map(_name, dtypes)
    return f"{', '.join(others)} or {last}"
