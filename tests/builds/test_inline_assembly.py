"""PTX stands in one file, where each wrapper says what CuTe and CUTLASS lack; the kernels call their atoms."""

import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Beside it the CPU's control register, and a barrier that keeps the compiler from fusing a product with a sum.
WHERE = {"common/ptx.cuh", "cpu/denormals.cpp", "cpu/vec.h"}


def test_assembly_stands_in_ptx_cuh() -> None:
    files = [path for path in CSRC.rglob("*") if path.suffix in {".cu", ".cuh", ".h", ".cpp"}]
    found = {
        str(path.relative_to(CSRC)) for path in files if re.search(r"\b_*asm_*\b", path.read_text(encoding="utf-8"))
    }
    assert found == WHERE
