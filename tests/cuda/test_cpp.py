"""Programs of tests/cpp, which call parts of the library that Python does not reach. Needs an nvcc and the sources."""

import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def run(nvcc: str, name: str, arch: str, include: str, folder: Path) -> list[str]:
    """Return the lines that tests/cpp/`name`.cu prints."""
    program, csrc = folder / name, ROOT / "csrc"
    subprocess.run(
        # PTX and a shared runtime, as in the preset "sim": a GPU takes them as well.
        [nvcc, "-std=c++17", "-O2", "-DNDEBUG", "--expt-relaxed-constexpr",
         "-gencode", f"arch=compute_{arch},code=compute_{arch}", "--no-compress",
         "-cudart", "shared", "-Xlinker", f"-rpath={Path(nvcc).resolve().parent.parent / 'lib64'}",
         f"-I{csrc}", f"-I{csrc / 'include'}", "-isystem", include, ROOT / "tests" / "cpp" / f"{name}.cu",
         *(csrc / "common" / f"{part}.cpp" for part in ("device", "driver_calls", "tensor_map", "variants")), "-o", program],
        check=True,
    )  # fmt: skip
    # A kernel that hangs ends with its process, and not with the tests.
    said = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    return said.stdout.splitlines()


def test_a_late_warp_holds_the_stages_back(device, nvcc, cutlass_include, tmp_path):
    """A warp that only skips a tile must not miss two phases of a barrier: it would wait for a third one."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the GEMM needs compute capability 9.0")
    assert run(nvcc, "head_gemm_skip", "90a", cutlass_include, tmp_path) == ["512"] * 3


def test_static_shared_memory_counts(device, nvcc, cutlass_include, tmp_path):
    """A kernel is allowed what it has of both kinds together: without, 48 KB and a few bytes are refused.

    And a launch that CUDA refuses is told with its shape, and once.
    """
    dynamic = 48 * 1024 - 136
    assert run(nvcc, "static_shared_memory", "80", cutlass_include, tmp_path) == [
        f"272 static, {dynamic} dynamic, at most {dynamic}; 62",
        "test: launching 1 x 1 x 1 CTAs (clusters of 1) of 2048 x 1 x 1 threads with 0 bytes of shared memory: "
        "cudaErrorInvalidConfiguration (invalid configuration argument); then cudaSuccess",
    ]
