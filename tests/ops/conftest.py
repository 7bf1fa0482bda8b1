"""The fixture `device`: a test that takes it runs on a CPU and, where CUDA is here, on that too.

`make test` runs the tests of this folder on the CPU. `make test-cuda` runs those that take `device`, on CUDA. A case for one
of both, because it is slow on a simulator or tests what one of them has, is marked: `only("cpu")` or `only("cuda")`.
"""

import re
from pathlib import Path

import devices
import pytest
import torch

KINDS = ["cuda"] if devices.REQUIRED else ["cpu", "cuda"] if devices.missing() is None else ["cpu"]
TAKES_DEVICE = re.compile(r"^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)


@pytest.fixture(scope="session", params=KINDS)
def device(request: pytest.FixtureRequest) -> torch.device:
    return devices.cuda() if request.param == "cuda" else torch.device("cpu")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without tests for CUDA a file is not imported: it may need more packages than `make test-cuda` installs."""
    if devices.REQUIRED and collection_path.suffix == ".py" and not TAKES_DEVICE.search(collection_path.read_text()):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent  # items are those of the whole run
    out = {item for item in items if here in item.path.parents and not belongs(item)}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


def belongs(item: pytest.Item) -> bool:
    kind = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    if kind is None:
        return not devices.REQUIRED
    return all(mark.args == (kind,) for mark in item.iter_markers("only"))
