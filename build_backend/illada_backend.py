"""The build backend: setuptools, and requirements that depend on the machine.

CMake 3.22 and ninja are asked for where none that works is in PATH. CUDA kernels need the headers of CUTLASS. Where a
machine has none, cmake/IlladaCutlass.cmake fetches the wheel nvidia-cutlass without its dependencies (scipy and more),
which a requirement cannot leave out. So the requirement is pip, where neither pip nor uv is there to fetch it.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

from illada_nvcc import find_nvcc
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_CMAKE = (3, 22)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Return setuptools' requirements and ours (PEP 517)."""
    return build_meta.get_requires_for_build_wheel(config_settings) + requires()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """Return setuptools' requirements and ours for an editable installation (PEP 660)."""
    return build_meta.get_requires_for_build_editable(config_settings) + requires()


def requires() -> list[str]:
    """Return what a build here needs beside pyproject.toml's list."""
    cmake = [] if version("cmake") >= OLDEST_CMAKE else ["cmake>=" + ".".join(map(str, OLDEST_CMAKE))]
    ninja = [] if os.environ.get("CMAKE_GENERATOR") or version("ninja") else ["ninja"]
    return cmake + ninja + headers_need()


def version(program: str) -> tuple[int, ...]:
    """Return the version of a program in PATH, such as (3, 25, 1).

    It is empty without one that works: what pyenv puts there may not.
    """
    if not shutil.which(program):
        return ()
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else ()


def headers_need() -> list[str]:
    """Return what fetching the headers of CUTLASS needs, where they must be fetched."""
    if option("ILLADA_CUDA").lower() == "off" or not has_nvcc():
        return []
    if option("ILLADA_CUTLASS_DOWNLOAD").lower() in ("off", "0", "no", "false"):
        return []
    if option("ILLADA_CUTLASS_DIR") or importlib.util.find_spec("cutlass_library"):
        return []
    return [] if can_fetch() else ["pip"]


def option(name: str) -> str:
    """Return an option of the CMake configure.

    It stands in CMAKE_ARGS, which has the last word, else in the environment.
    """
    arguments = "\n".join(shlex.split(os.environ.get("CMAKE_ARGS", "")))  # quoted as in a shell, as setup.py has it
    given = re.findall(rf"^-D\s*{name}(?::\w+)?=(.*)", arguments, re.MULTILINE)
    return given[-1] if given else os.environ.get(name, "")


def has_nvcc() -> bool:
    """Return whether the build would find an nvcc."""
    nvcc = option("CMAKE_CUDA_COMPILER").strip() or find_nvcc(os.environ)
    return any(shutil.which(name) for name in (nvcc, *nvcc.split()[:1]))  # CUDACXX may hold options


def can_fetch() -> bool:
    """Return whether headers can be fetched, by pip or uv.

    The pip is in this environment or around pip's isolated one; the uv is the one that made this environment.
    """
    pips = [[sys.executable, *isolation, "-m", "pip", "--version"] for isolation in (["-I"], [])]
    return "UV" in os.environ or any(subprocess.run(pip, capture_output=True).returncode == 0 for pip in pips)
