"""The devices on which a test of an op runs: a CPU, and CUDA where it is here (a GPU, or a simulator of one)."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from illada import _native

#: `make test-cuda`: without CUDA nothing may pass by not running, and what needs no CUDA has run in `make test`.
REQUIRED = os.environ.get("ILLADA_REQUIRE_CUDA") == "1"


def missing() -> str | None:
    """Why no test on CUDA can run here; None: they can."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build; `make test-cuda` has a CUDA build in an environment of its own"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not _native.has_cuda():
        return "illada was built without CUDA kernels (`illada info`); install it again where there is an nvcc"
    return None


@functools.cache
def cuda() -> torch.device:
    """The CUDA device, ready for the tests."""
    if _get_current_dispatch_mode() is not None and hasattr(torch.ops.aten.mm, "dtype"):
        # A mode computes torch's operators by their CPU kernels (a simulator), and of this one there is none.
        _libraries.append(torch.library.Library("aten", "IMPL"))
        _libraries[-1].impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    return torch.device("cuda")


def tracing() -> None:
    """Skip a test of traced graphs where a simulator of the device computes torch's operators."""
    if _get_current_dispatch_mode() is not None:
        pytest.skip(
            "aten operators of a traced graph need their own CUDA kernels; a torch dispatch mode stands in for them"
        )


_libraries: list[torch.library.Library] = []  # what they register ends with them
