#!/usr/bin/env python3
"""A check by clang-tidy for products of sizes that 32 bits do not hold.

The checks are those of .clang-tidy.

Host sources are held against both checks: a product must be widened before and not after the multiplication, and a
product in which a number of tokens, rows, heads, ids, tiles or items takes part must have 64 bits. In kernels, where 64
bits cost registers, the second kind may stay in 32 bits if csrc/size_products.toml has its line, beside what bounds it.

CUDA sources need an nvcc, for its headers, and CUTLASS, as ptxas.py finds it; where one is missing, a line says so and
host sources alone are looked at. Of kernels that are built for several head dims, those of D 64 speak for all.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ptxas import cutlass_include  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REVIEWED = ROOT / "csrc" / "size_products.toml"
WIDENING, SIZES = "bugprone-implicit-widening-of-multiplication-result", "custom-size-product"
# The same templates for another head dim or instruction set, or other choices of them.
REPEATED = re.compile(r"(_d(96|128|256)_\w+|_d64_variants_sm90|_sums_d64_sm90)\.cu$|row_kernels_avx\w+\.cpp$")


@dataclass(frozen=True)
class Found:
    """A warning of clang-tidy."""

    check: str
    file: str  # below csrc/
    number: int
    line: str


@dataclass(frozen=True)
class Cuda:
    """The folders of the CUDA headers, and the version of nvcc."""

    home: Path
    version: tuple[int, int]
    cutlass: Path


def find_cuda() -> Cuda | str:
    """Return where CUDA's headers are, or why CUDA sources cannot be looked at."""
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if not nvcc:
        return "no nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", said)
    steps = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    home = re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE)
    if not version or not home:
        return f"{nvcc} does not say where it is installed"
    try:
        return Cuda(Path(home[1].strip()), (int(version[1]), int(version[2])), Path(cutlass_include()))
    except SystemExit as error:
        return str(error)


def flags(source: Path, cuda: Cuda | None, made: Path) -> list[str]:
    """Return clang's flags for a source.

    made: the folder of make_headers.
    """
    common = [
        "-std=c++17",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'include'}",
        "-idirafter",
        str(made),
        '-DILLADA_VERSION=""',
    ]
    if source.parent.name == "bindings":
        import pybind11

        common += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    if cuda is None:
        return common
    common += ["-DILLADA_WITH_CUDA", "-DILLADA_BUILT_SM90A"]
    if source.suffix == ".cpp":
        return [*common, "-isystem", str(cuda.home / "include")]
    major, minor = cuda.version
    return [
        *("-x", "cuda", f"--cuda-path={cuda.home}", "--cuda-host-only", "-nocudalib", "-Wno-unknown-cuda-version"),
        *(*common, "-DNDEBUG", f"-D__CUDACC_VER_MAJOR__={major}", f"-D__CUDACC_VER_MINOR__={minor}"),
        *("-isystem", str(cuda.cutlass), "-isystem", str(cuda.home / "include" / "cccl")),
    ]


def make_headers(folder: Path) -> None:
    """Write csrc/**/*.h.in as CMake does, with empty values, and the header that clang includes in CUDA sources."""
    for template in (ROOT / "csrc").rglob("*.h.in"):
        (folder / template.stem).write_text(re.sub(r"@\w+@", "", template.read_text()))
    (folder / "curand_mtgp32_kernel.h").touch()


def sources(has_cuda: bool) -> list[Path]:
    """Return the sources that a build compiles, those that take longest first."""
    files = [f for f in (ROOT / "csrc").rglob("*.c*") if f.suffix in (".cpp", ".cu") and not REPEATED.search(f.name)]
    host = {"cpu", "bindings"}
    files = [f for f in files if has_cuda or f.parent.name in host or f.name == "build_info.cpp"]
    return sorted(files, key=lambda f: (f.suffix != ".cu", "linear" not in f.name, "sm90" not in f.name, f))


def parse(text: str) -> tuple[set[Found], list[str]]:
    """Return clang-tidy's findings below csrc/, and its errors.

    An error means that it understood a source only in part.
    """
    lines = text.splitlines()
    found, errors = set(), [line for line in lines if ": error: " in line or line.startswith(("Error", "error: "))]
    for at, line in enumerate(lines):
        match = re.match(r"(?:.*/)?csrc/([^:]+):(\d+):\d+: warning: .*\[([\w-]+)\]$", line)
        if match:
            code = lines[at + 1].partition("|")[2].strip() if at + 1 < len(lines) else ""
            found.add(Found(match[3], match[1], int(match[2]), code))
    return found, errors


def judge(found: Iterable[Found], reviewed: set[str], files: set[str]) -> list[str]:
    """Return the faults: products that nobody reviewed, and reviews of lines that are no longer there.

    Lines of `files`, all that were looked at, are reviewed as "file: line of code".
    """
    wrong, seen = [], set()
    for it in sorted(found, key=lambda it: (it.file, it.number)):
        in_kernel = Path(it.file).suffix in (".cu", ".cuh")
        key = f"{it.file}: {it.line}"
        if it.check == SIZES and key in reviewed:
            seen.add(key)
        elif it.check == SIZES:
            wrong.append(
                f"csrc/{it.file}:{it.number}: a product of sizes in 32 bits: {it.line}\n"
                "    multiply in 64 bits, or check what bounds it before the launch and add the line to "
                "csrc/size_products.toml"
            )
        elif not in_kernel:
            wrong.append(f"csrc/{it.file}:{it.number}: multiplied in 32 bits and widened after that: {it.line}")
    for key in sorted(reviewed - seen):
        if key.partition(":")[0] in files:
            wrong.append(f"csrc/size_products.toml has a line without such a product: {key}")
    return wrong


def read_reviewed(path: Path = REVIEWED) -> set[str]:
    """Return the reviewed lines as "file: line of code"."""
    bounds = tomllib.loads(path.read_text())["bound"]
    return {f"{file}: {line}" for bound in bounds for file, lines in bound["lines"].items() for line in lines}


def main() -> int:
    """Run clang-tidy on the sources and print what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pattern", nargs="?", default="", help="only sources with this in their path")
    wanted = parser.parse_args().pattern
    tool = shutil.which("clang-tidy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not tool:
        print("tidy: no clang-tidy; requirements-dev.txt names it", file=sys.stderr)
        return 1
    cuda = find_cuda()
    if isinstance(cuda, str):
        print(f"tidy: {cuda}: CUDA sources are not looked at")
    known = None if isinstance(cuda, str) else cuda
    files = [file for file in sources(known is not None) if wanted in str(file.relative_to(ROOT))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        make_headers(Path(folder))

        def run(source: Path) -> tuple[set[Found], list[str]]:
            command = [
                *(tool, "--quiet", "--experimental-custom-checks", f"--config-file={ROOT / '.clang-tidy'}"),
                *(f"--checks=-{WIDENING}" if source.suffix == ".cu" else "--checks=", "--header-filter=csrc/"),
                *(str(source), "--", *flags(source, known, Path(folder))),
            ]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            found, errors = parse(done.stdout + done.stderr)
            if done.returncode and not errors:
                errors = [f"{source.relative_to(ROOT)}: clang-tidy left with {done.returncode}: {done.stderr[-500:]}"]
            return found, errors

        results = list(pool.map(run, files))
    found = set().union(*(result[0] for result in results))
    wrong = [error for result in results for error in result[1]]
    headers = {str(f.relative_to(ROOT / "csrc")) for f in (ROOT / "csrc").rglob("*") if f.suffix in (".h", ".cuh")}
    looked_at = {str(f.relative_to(ROOT / "csrc")) for f in files}
    if known and not wanted:
        looked_at |= headers
    wrong += judge(found, read_reviewed(), looked_at)
    print(*wrong, f"tidy: {len(files)} sources, {len(wrong)} faults", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
