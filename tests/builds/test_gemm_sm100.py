"""tests/cpp/weight_grad_sm100.cu: the arguments of our GEMMs' builder make a kernel for sm_100a."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from building import needs_nvcc

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")


@pytest.mark.slow  # half a minute of compilation
@needs_nvcc
def test_the_weights_gradient_compiles_for_sm_100a(cutlass_include, tmp_path):
    """To machine code, with the tensor cores' instruction of two CTAs and without local memory."""
    archs = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if "sm_100" not in archs:
        pytest.skip("this nvcc does not know sm_100a")
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode", "arch=compute_100a,code=sm_100a",
         f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", "-isystem", cutlass_include, "-Xptxas", "-v", "-cubin",
         "--keep", "--keep-dir", tmp_path, ROOT / "tests" / "cpp" / "weight_grad_sm100.cu", "-o", tmp_path / "cubin"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    frames = [line.strip() for line in done.stderr.splitlines() if "bytes stack frame" in line]
    assert frames and {*frames} == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    assert "tcgen05.mma.cta_group::2.kind::f16" in (tmp_path / "weight_grad_sm100.ptx").read_text(encoding="utf-8")
