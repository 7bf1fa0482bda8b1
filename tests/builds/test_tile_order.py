"""tests/cpp/tile_order.cpp: the tiles of the loss's GEMMs come in the order that loss_raster says.

That an order changes no result is tested in tests/cuda/test_linear_loss_sm90.py.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which(os.environ.get("CXX") or "c++")
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler: set CXX or PATH")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("tile_order") / "tile_order"
    sources = (ROOT / "tests" / "cpp" / "tile_order.cpp", ROOT / "csrc" / "common" / "variants.cpp")
    folders = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
    subprocess.run([CXX, "-std=c++17", *folders, *sources, "-o", built], check=True)
    return built


@pytest.mark.parametrize(("raster", "group"), [("all", 1000), ("8", 8), ("4", 4)])
@pytest.mark.parametrize("across", [3, 8, 18])  # less than a group, whole groups, a smaller last one
def test_groups_of_tiles_pass_one_after_the_other(raster, group, across, program):
    """A group of tiles across passes along the whole vocabulary before the next group; each tile comes once."""
    along = 5
    want = [
        f"{tile} {stretch}"
        for first in range(0, across, group)
        for stretch in range(along)
        for tile in range(first, min(first + group, across))
    ]
    environment = {**os.environ, "ILLADA_VARIANT_LOSS_RASTER": raster}
    done = subprocess.run(
        [program, str(across), str(along)], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == want
