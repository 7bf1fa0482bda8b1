"""The tests of the CUDA kernels: on real CUDA tensors, or skipped as a whole with the reason.

`make test-cuda` sets ILLADA_REQUIRE_CUDA=1: there a reason to skip is a failure, so that nothing passes by not running.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (reason := missing()) is None:
        return
    if os.environ.get("ILLADA_REQUIRE_CUDA") == "1":
        pytest.exit(f"tests/cuda cannot run: {reason}", returncode=1)
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]  # items are those of the whole run
    if mine:  # one of them says the reason for all
        mine[0].add_marker(pytest.mark.skip(reason=f"all of tests/cuda: {reason}"))
        config.hook.pytest_deselected(items=mine[1:])
        rest = set(mine[1:])
        items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    if _get_current_dispatch_mode() is None or not hasattr(torch.ops.aten.mm, "dtype"):
        yield torch.device("cuda")
        return
    # A mode computes torch's operators by their CPU kernels (a simulator), and of this one there is none.
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    yield torch.device("cuda")


@pytest.fixture(scope="session")
def nvcc() -> str:
    """For the programs of tests/cpp. CUDACXX that names none is an error, as for a build; no nvcc at all a skip."""
    asked = os.environ.get("CUDACXX")
    found = shutil.which(asked or "nvcc")
    if found is None and asked:
        pytest.fail(f"CUDACXX={asked} is no nvcc")
    return found or pytest.skip("needs nvcc: set CUDACXX or PATH")
