"""Commands of a user who builds or installs, for the tests of both."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_nvcc = pytest.mark.skipif(  # a CUDACXX that names none is no reason: the test then fails
    not os.environ.get("CUDACXX") and shutil.which("nvcc") is None, reason="needs nvcc: set CUDACXX or PATH"
)
CHOICES = ("PYTHONPATH", "CMAKE_ARGS", "CMAKE_GENERATOR", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "UV")


def environment(**more) -> dict[str, str]:
    """Return variables without a checkout on the path or choices of a build; tools beside this Python come first."""
    clean = {k: v for k, v in os.environ.items() if k not in CHOICES and not k.startswith("ILLADA_")}
    return {**clean, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def attempt(*command, cwd=None, **env) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], cwd=cwd, env=environment(**env), capture_output=True, text=True)


def run(*command, cwd=None, **env) -> str:
    """Run a command that must succeed and return its output."""
    done = attempt(*command, cwd=cwd, **env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def one_line(done: subprocess.CompletedProcess) -> str:
    """Return all that was said in one line, because CMake breaks its sentences into lines."""
    return " ".join((done.stdout + done.stderr).split())


def broken_nvcc(folder: Path) -> dict[str, str]:
    """Return a PATH with an nvcc that is found and does not work."""
    folder.mkdir(exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\necho 'nvcc fatal: Unsupported compiler \"g++\"' >&2; exit 1\n")
    (folder / "nvcc").chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{environment()['PATH']}"}
