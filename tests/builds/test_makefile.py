"""`make install`: whether CUDA kernels are built, and what is installed, with stand-ins for the environment's Python, pip and nvcc."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Of the environment: torch sees a GPU or not, pip fetches and builds at once and says what it was told.
PYTHON = """#!/bin/sh
case "$*" in
  *"import sys, torch"*) exit $NO_GPU;;
  *--requirement*) echo "$6" >>requirements;;
  *--target*) mkdir -p "$8"; echo "fetched" >>log;;
  *--force-reinstall*) echo "built $ILLADA_CUDA" >>log;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def install(tmp_path):
    """Runs `make install` in a checkout: what pip did, in a list, and what make said."""
    folder = tmp_path / "a checkout"
    (folder / "venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements-run.txt", "requirements-dev.txt", "requirements-common.txt", "CMakeLists.txt",
                 "CMakePresets.json", "setup.py", "pyproject.toml"):  # fmt: skip
        shutil.copy(ROOT / name, folder)
    nvcc, python = tmp_path / "nvcc", folder / "venv/bin/python"
    for program, text in ((nvcc, "#!/bin/sh\n"), (python, PYTHON)):
        program.write_text(text)
        program.chmod(0o755)

    def run(*arguments, gpu=False, target="install", **environment):
        names = ("ILLADA_CUDA", "ILLADA_CUDA_ARCHS", "ILLADA_CUTLASS_DIR", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        clean = {name: value for name, value in os.environ.items() if name not in names}
        environment = {"CUDACXX": str(nvcc), "NO_GPU": str(int(not gpu)), "VENV": "venv", **environment}
        command = ["make", target, *arguments]
        done = subprocess.run(command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        log = folder / "log"
        told = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return told, done.stdout

    return run


def test_cuda_kernels_are_built_where_torch_has_a_gpu_or_the_user_asks(install):
    told, said = install("--dry-run")
    assert told == []
    told, said = install()
    assert told == ["built off"] and "no CUDA kernels (ILLADA_CUDA=on builds them)" in said and "under a minute" in said
    assert install()[0] == install(ILLADA_CUDA="")[0] == []
    told, said = install(ILLADA_CUDA="on")
    assert told == ["fetched", "built on"] and "one to five minutes" in said and "ILLADA_CUDA=off" in said
    assert install()[0] == install(ILLADA_CUDA="on")[0] == []  # what was asked for stays
    assert install("ILLADA_CUDA=off")[0] == ["built off"]


def test_cuda_kernels_are_built_for_a_gpu(install):
    assert install(gpu=True)[0] == ["fetched", "built auto"]


def test_a_machine_without_nvcc_hears_nothing_of_cuda(install):
    told, said = install(CUDACXX="/no/nvcc")
    assert told == ["built off"] and "nvcc" not in said


def test_what_tests_and_lints_is_installed_for_these_alone(install, tmp_path):
    requirements = tmp_path / "a checkout/requirements"
    install()
    assert requirements.read_text().split() == ["requirements-run.txt"]
    install(target="test")
    assert requirements.read_text().split() == ["requirements-run.txt", "requirements-dev.txt"]


def test_what_is_shipped_beside_the_package_is_built_again_when_it_changes(install, tmp_path):
    folder = tmp_path / "a checkout"
    for name in ("benchmarks/runner.py", "benchmarks/predicted.json", "configs/demo.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    install()
    for name in ("benchmarks/runner.py", "benchmarks/predicted.json", "configs/demo.toml"):
        assert install()[0] == []
        later = (folder / ".cache/installed").stat().st_mtime + 1
        os.utime(folder / name, (later, later))
        assert install()[0] == ["built off"], name
        os.utime(folder / name, (0, 0))


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
#: Targets that another target calls.
INNER = {"test-gpu", "test-simulator"}


def test_help_is_the_default_and_lists_every_target():
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.findall(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, flags=re.MULTILINE)
    targets = set(" ".join(phony).replace("\\\n", " ").split())
    assert set(re.findall(r"^  make ([a-z-]+) +\w", said, flags=re.MULTILINE)) == targets - INNER
    for variable in ("ILLADA_CUDA", "VENV", "ARGS", "CUSIM"):
        assert f"  {variable}=" in said
    assert max(map(len, said.splitlines())) <= 120


def test_pre_commit_runs_the_tools_of_make_lint():
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    tools = set(re.findall(r'"\$\(BIN\)/(?:python" (\S+)|([\w-]+)")', recipe))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    found = set(re.findall(r'"\$\{VENV:-\.venv\}/bin/(?:python" ([^\s\']+)|([\w-]+)")', hooks))
    assert len(tools) >= 4 and tools == found
