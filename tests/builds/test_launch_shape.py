"""Every launch goes through one function, and that refuses an empty grid: compiled on its own, no GPU needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from building import needs_nvcc

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")


@needs_nvcc
def test_an_empty_grid_is_an_internal_error(tmp_path):
    program, common = tmp_path / "launch_shape", ROOT / "csrc" / "common"
    sources = [ROOT / "tests" / "cpp" / "launch_shape.cu"]
    sources += [common / name for name in ("device.cpp", "driver_calls.cpp", "variants.cpp")]
    folders = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
    subprocess.run([NVCC, "-std=c++17", "-O0", *folders, *sources, "-o", program], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    for line, shape in zip(said[:4], ("0 x 1 x 1", "4 x 0 x 1", "4 x 1 x 0", "4 x 1 x 1"), strict=True):
        assert line.startswith(f"logic_error: some_op: internal error: a launch of {shape} CTAs of "), line
        assert line.endswith(" threads; please report it"), line
    assert said[4].startswith(
        ("CudaError: some_op: loading a kernel: cudaError", "Error: some_op: no kernel was built")
    )
    assert "internal error" not in said[4]  # a shape that is right is left to CUDA, which finds no kernel here


def test_nothing_is_launched_in_another_way():
    """Neither <<<>>> nor a launch function of the runtime but in launch_kernel."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "csrc").rglob("*"))
        if path.suffix in (".cu", ".cuh", ".cpp", ".h")
        for line in path.read_text().splitlines()
        if re.search(r"<<<\s*\w|\bcu(da)?Launch\w*\(", line.split("//")[0])
    ]
    assert len(found) == 1 and found[0].startswith(
        "csrc/common/device.h: const cudaError_t status = cudaLaunchKernelEx("
    )
