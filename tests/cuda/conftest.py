"""The tests of the CUDA kernels: on real CUDA tensors, or skipped as a whole with the reason.

`make test-cuda` sets ILLADA_REQUIRE_CUDA=1: there a reason to skip is a failure, so that nothing passes by not running.
"""

import os

import pytest
import torch

from illada import _native


def missing() -> str | None:
    """Why no test here can run; None: they can."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build; `make test-cuda` has a CUDA build in an environment of its own"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not _native.has_cuda():
        return "illada was built without CUDA kernels (`illada info`); install it again where there is an nvcc"
    return None


@pytest.fixture(scope="session", autouse=True)
def needs_cuda() -> None:
    if reason := missing():
        if os.environ.get("ILLADA_REQUIRE_CUDA") == "1":
            pytest.exit(f"tests/cuda cannot run: {reason}", returncode=1)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def device(needs_cuda) -> torch.device:
    return torch.device("cuda")
