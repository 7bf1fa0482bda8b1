"""Names of modules: none may hide a module of the standard library from a script that runs in its folder."""

import sys
from pathlib import Path

import pytest

import illada

FOLDER = Path(illada.__file__).parent


@pytest.mark.parametrize(
    "folder", [FOLDER, FOLDER / "checkpoints", Path(__file__).parents[1] / "helpers"], ids=lambda p: p.name
)
def test_no_module_hides_one_of_the_standard_library(folder):
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert len(names) > 3 and not names & set(sys.stdlib_module_names) - {"__main__"}
    assert "open" not in names
