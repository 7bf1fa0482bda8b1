"""The options --device and --dtype of the commands that take a checkpoint."""

from __future__ import annotations

import torch

from illada.devices import find_device


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype of --dtype; None stays None."""
    dtypes = {text: getattr(torch, text) for text in ("bfloat16", "float16", "float32")}
    if name not in (None, *dtypes):
        raise ValueError(f"--dtype must be {', '.join(dtypes)}, got {name!r}")
    return None if name is None else dtypes[name]


def parse_device(name: str | None) -> torch.device:
    """Return the torch device of --device, by default the CPU.

    ValueError: no such kind, or a GPU that is not here.
    """
    device = find_device(name or "cpu", "--device")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda (cuda:0, ...), got {name!r}")
    return device
