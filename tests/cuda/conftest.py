"""The tests of what only CUDA has: on real CUDA tensors, or skipped as a whole with the reason.

What holds on every device is tested in tests/ops, by tests that take `device`.

`make test-cuda` sets ILLADA_REQUIRE_CUDA=1: there a reason to skip is a failure, so that nothing passes by not running.
"""

import os
import shutil
from pathlib import Path

import devices
import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (reason := devices.missing()) is None:
        return
    if devices.REQUIRED:
        pytest.exit(f"tests/cuda cannot run: {reason}", returncode=1)
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]  # items are those of the whole run
    if mine:  # one of them says the reason for all
        mine[0].add_marker(pytest.mark.skip(reason=f"all of tests/cuda: {reason}"))
        config.hook.pytest_deselected(items=mine[1:])
        rest = set(mine[1:])
        items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return devices.cuda()


@pytest.fixture(scope="session")
def nvcc() -> str:
    """For the programs of tests/cpp. CUDACXX that names none is an error, as for a build; no nvcc at all a skip."""
    asked = os.environ.get("CUDACXX")
    found = shutil.which(asked or "nvcc")
    if found is None and asked:
        pytest.fail(f"CUDACXX={asked} is no nvcc")
    return found or pytest.skip("needs nvcc: set CUDACXX or PATH")
