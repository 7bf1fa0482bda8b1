"""A dry run: the stages of `run_on_gpu.sh` on a simulator, small enough for two cores.

It tests the script alone.

ILLADA_DRY_RUN=1 says that this process is part of one; the script sets it.
"""

from __future__ import annotations

import os
from typing import Any

#: Whether this is a dry run: shapes are small and calls are few.
ACTIVE = os.environ.get("ILLADA_DRY_RUN") == "1"
#: The libraries of `prepare`, kept because a library that is collected takes its kernels with it.
KEPT: list[Any] = []


def prepare() -> None:
    """Enable the simulator, if this is a dry run.

    Every process must call this before its first CUDA tensor.
    """
    if ACTIVE:
        import torch
        import torch_on_cusim  # of the simulator, whose folder the script puts on PYTHONPATH

        torch_on_cusim.enable()
        if hasattr(torch.ops.aten.mm, "dtype") and not KEPT:
            # The simulator computes torch's operators by their CPU kernels, and of this one there is none.
            KEPT.append(torch.library.Library("aten", "IMPL"))
            KEPT[0].impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
