"""The loader of the compiled module `illada._C`, which loads it once, when an op first needs it.

It says how to build the module where that is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType


@functools.cache
def native() -> ModuleType:
    """Return the compiled module.

    ImportError: it is not built, or was built from another version of this package.
    """
    try:
        module = importlib.import_module("illada._C")
    except ImportError as error:
        raise ImportError(
            f"illada: the native module illada._C could not be loaded ({error}).\n"
            "Build it with `pip install .` in a checkout (needs a C++17 compiler; CUDA is optional)."
        ) from error
    version = package_version()
    if module.__version__ != version:
        raise ImportError(
            f"illada: the native module was built from version {module.__version__}, the Python package is "
            f"{version}; run `pip install .` again."
        )
    return module


def package_version() -> str:
    """Return the version of the installed distribution, or the native module's where it runs from a plain checkout."""
    try:
        return importlib.metadata.version("illada")
    except importlib.metadata.PackageNotFoundError:
        try:
            return importlib.import_module("illada._C").__version__
        except ImportError:
            return "0+unknown"


def build_info() -> dict[str, object]:
    """Return what was built and what it chose.

    Its keys are version, compiler, openmp, cpu_isa, cuda_version, cuda_archs, cutlass_version and no_cuda (why there
    are no CUDA kernels).
    """
    return native().build_info()


@functools.cache
def has_cuda() -> bool:
    """Return whether CUDA kernels were built."""
    return bool(build_info()["cuda_archs"])


def require_cuda_build(op: str) -> None:
    """Raise NotImplementedError for an op called with CUDA tensors on a build that has no CUDA kernels."""
    if not has_cuda():
        raise NotImplementedError(
            f"{op}: this build has no CUDA kernels ({build_info()['no_cuda']}); supported here: CPU tensors. "
            "Install again where there is an nvcc (`illada info` says what was built)"
        )
