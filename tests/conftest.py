"""Fixtures shared by the tests."""

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # what tests of several folders share

# A shell starts what runs in its background without SIGINT, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what transformers copies and imports of a checkpoint's own code in tmp_path, and forget it afterwards."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Another folder of such code, which an earlier test may have added, would be searched first.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "transformers_modules").is_dir()])
    _forget("transformers_modules")
    yield
    _forget("transformers_modules")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def ptxas() -> Iterator[ModuleType]:
    """Return cmake/ptxas.py as a module; it is no part of a package."""
    spec = importlib.util.spec_from_file_location("illada_ptxas", ROOT / "cmake" / "ptxas.py")
    sys.modules["illada_ptxas"] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["illada_ptxas"]


@pytest.fixture
def cutlass_include(ptxas: ModuleType) -> str:
    """The headers of CUTLASS. A named folder without any fails; where none is named and none was fetched, skips."""
    try:
        return ptxas.cutlass_include()
    except SystemExit as error:
        if os.environ.get("ILLADA_CUTLASS_DIR"):
            raise AssertionError(str(error)) from None
        pytest.skip(
            "no headers of CUTLASS: `make test` fetches them where there is an nvcc; ILLADA_CUTLASS_DIR names others"
        )
