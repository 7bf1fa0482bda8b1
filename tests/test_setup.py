"""What setup.py says before it builds anything."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")

# As much of setuptools as setup.py imports; `setup` says that it was reached.
FAKE = {
    "setuptools/__init__.py": "__version__ = {version!r}\nclass Extension:\n    def __init__(self, *_, **__): ...\n"
    "def setup(**_):\n    print('setup was called')\n",
    "setuptools/command/__init__.py": "",
    "setuptools/command/build_ext.py": "class build_ext: ...\n",
}


def run_setup(folder: Path, version: str) -> subprocess.CompletedProcess:
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.format(version=version))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["59.6.0", "68.1.2", "75.3.0.post0", "76.1.0"])
def test_old_setuptools_is_refused(version, tmp_path):
    """Python's own `ensurepip` and many distributions have one; it would fail over pyproject.toml's license."""
    done = run_setup(tmp_path, version)
    assert done.returncode == 1 and "setup was called" not in done.stdout
    first, second = done.stderr.splitlines()
    assert first == f"illada: setuptools {version} was found in {tmp_path}; 77 or newer is needed."
    assert second.startswith(f"Run `{sys.executable} -m pip install 'setuptools>=77'`")


@pytest.mark.parametrize("version", ["77.0.0", "80.9.0", "100.1.0"])
def test_new_setuptools_is_used(version, tmp_path):
    done = run_setup(tmp_path, version)
    assert (done.returncode, done.stdout, done.stderr) == (0, "setup was called\n", "")


def test_pyproject_asks_for_the_same():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert "setuptools>=77" in required
