"""The search for nvcc, at the places of cmake/IlladaNvcc.cmake and in NVIDIA's wheels."""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

USUAL = "/usr/local/cuda"
# What compiling and linking takes beside nvcc, and which of NVIDIA's wheels has it.
PARTS = {
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "lib/libcudart_static.a",
    "nvidia-cuda-cccl": "include/cccl/cuda/std/utility",
}


def find_nvcc(environ: Mapping[str, str]) -> str:
    """Return the path of nvcc, or an empty string.

    The places are CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda and NVIDIA's wheels, in this order.
    """
    if named := environ.get("CUDACXX", "").strip():
        return named
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    folders = [*(os.path.join(home, "bin") for home in homes if home), environ.get("PATH"), os.path.join(USUAL, "bin")]
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, folders))) or wheel_nvcc(environ)


def wheel_nvcc(environ: Mapping[str, str]) -> str:
    """Return the newest nvcc that pip installed with all that it needs.

    A message says where a part is missing.
    """
    found = {nvcc for folder in site_packages(environ) for nvcc in folder.glob("nvidia/cu[0-9]*/bin/nvcc")}
    for nvcc in sorted(found, key=lambda nvcc: int(re.sub(r"\D", "", nvcc.parents[1].name) or 0), reverse=True):
        missing = [wheel for wheel, part in PARTS.items() if not (nvcc.parents[1] / part).exists()]
        if not missing:
            return str(nvcc)
        print(f"illada: {nvcc} is not used: its toolkit is not complete; `pip install {' '.join(missing)}`")
    return ""


def site_packages(environ: Mapping[str, str]) -> list[Path]:
    """Return the site-packages of the environment that asked for the build, as far as it can be known.

    pip's isolation leaves sys.prefix as it is. `python -m build` and uv make an environment of their own: there PATH
    names the one around it, if it was activated, and sys.base_prefix the Python that both were made from.
    """
    around = [environ.get("VIRTUAL_ENV", ""), *(os.path.dirname(p) for p in environ.get("PATH", "").split(os.pathsep))]
    prefixes = dict.fromkeys(Path(prefix) for prefix in (sys.prefix, *around, sys.base_prefix) if prefix)
    return [folder for prefix in prefixes for folder in prefix.glob("lib/python3*/site-packages")]
