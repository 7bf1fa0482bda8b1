#!/usr/bin/env python3
"""A check of the registers, shared memory and spills of every CUDA kernel.

The budget is csrc/ptxas_budget.json.

Each csrc/**/*.cu is compiled to machine code with `nvcc -Xptxas -v` for each GPU it is built for; no GPU is needed.
Fails when a kernel spills or uses a stack (both are local memory, which is slow), when it takes more registers or
static shared memory than the budget allows, when ptxas says that it serialized a kernel's wgmma, and when a kernel or a
budget entry has no counterpart. With a PATTERN, entries of other files are not looked at. The budget names the CUDA
that wrote it; with another one, more registers are a fault only where they leave fewer CTAs on a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "csrc" / "ptxas_budget.json"
DEFAULT_ARCHS = ("80", "90a", "100", "120")  # as in IlladaArchs.cmake
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr")  # as CMake gives in a Release build
BYTES_A_JOB = 3 << 30  # of memory, as in setup.py


@dataclass
class Kernel:
    """The figures that ptxas gives for one function on one arch.

    Functions that are not kernels have no registers of their own.
    """

    name: str  # mangled as ptxas prints it; short after compile_file
    registers: int | None = None
    smem: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    threads: int = 0  # of a CTA, by its launch bounds; 0: not said
    warpgroup_registers: list[int] = field(default_factory=list)  # what setmaxnreg asks for: less, then more


@dataclass
class Compiled:
    """The result of the compilation of one file for one arch."""

    file: str
    arch: str
    seconds: float
    kernels: list[Kernel]
    remarks: list[str] = field(default_factory=list)  # what ptxas says it had to do to the code


def parse(text: str) -> tuple[list[Kernel], list[str]]:
    """Return the functions in the output of `nvcc -Xptxas -v`, and its remarks on lost performance."""
    found: dict[str, Kernel] = {}
    entry = function = ""
    remarks = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            entry = function = match[1]
            found.setdefault(entry, Kernel(entry))
        elif match := re.search(r"Function properties for '?([^'\s]+)", line):
            function = match[1]
            found.setdefault(function, Kernel(function))
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if function:
                kernel = found[function]
                kernel.stack, kernel.spill_stores, kernel.spill_loads = (int(number) for number in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            kernel = found[entry]
            kernel.registers = int(match[1])
            if smem := re.search(r"(\d+) bytes smem", line):
                kernel.smem = int(smem[1])
        elif "Potential Performance Loss" in line or "setmaxnreg ignored" in line:
            remarks.append(line.partition(":")[2].strip())
    return list(found.values()), remarks


def launch_bounds(ptx: str) -> dict[str, tuple[int, list[int]]]:
    """Return each kernel's launch bounds and what its setmaxnreg asks for, read from PTX.

    Kernel -> (threads of a CTA, 0 where not said; registers by dec, then by inc).
    """
    found: dict[str, tuple[int, list[int]]] = {}
    for entry in re.split(r"^\s*(?:\.visible )?\.entry\s+", ptx, flags=re.MULTILINE)[1:]:
        asked = [(match[1], int(match[2])) for match in re.finditer(r"setmaxnreg\.(dec|inc)\.\S+\s+(\d+)", entry)]
        threads = re.search(r"\.maxntid\s+(\d+)", entry)
        name = re.split(r"[\s(]", entry, maxsplit=1)[0]
        found[name] = (int(threads[1]) if threads else 0, [number for _, number in sorted(set(asked))])
    return found


def split_fault(kernel: Kernel) -> str | None:
    """Return why the CTA's warpgroups cannot have what setmaxnreg asks for: one producer (dec), the others inc.

    A CTA owns the registers it was launched with, and setmaxnreg.inc waits for ever for more (PTX ISA, setmaxnreg).
    """
    if not kernel.warpgroup_registers:
        return None
    if len(kernel.warpgroup_registers) != 2 or not kernel.threads or kernel.threads % 128 or kernel.registers is None:
        return (
            f"setmaxnreg asks for {kernel.warpgroup_registers} in a CTA of {kernel.threads} threads; "
            "one producer warpgroup gives registers up, the others take them, and launch bounds say how many there are"
        )
    less, more = kernel.warpgroup_registers
    warpgroups = kernel.threads // 128
    asked, owned = less + (warpgroups - 1) * more, kernel.registers * warpgroups
    if asked <= owned:
        return None
    return (
        f"setmaxnreg asks for {less} + {warpgroups - 1} x {more} = {asked} registers a lane, but the CTA is launched "
        f"with {warpgroups} x {kernel.registers} = {owned}: it would wait for ever"
    )


def short_name(demangled: str) -> str:
    """Return a kernel's name without namespaces, return type and parameters.

    `void illada::sampling::(anonymous namespace)::k<illada::Half, (int)4>(illada::P)` -> `k<Half,4>`.
    """
    name = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\([A-Za-z][\w: ]*\)(?=-?[\d'])", "", name)  # the type of a template argument: (int)4
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        if letter == "(" and depth == 0:
            end = i  # the parameters begin
            break
        depth += (letter == "<") - (letter == ">")
    name = name[:end]
    depth, begin = 0, 0
    for i, letter in enumerate(name):
        if letter == " " and depth == 0:
            begin = i + 1  # after the return type, which templates have
        depth += (letter == "<") - (letter == ">")
    return re.sub(r"\s*,\s*", ",", re.sub(r"\b[A-Za-z_]\w*::", "", name[begin:]))


def demangle(names: list[str]) -> list[str]:
    """Return the C++ names of mangled names."""
    if not names:
        return []
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise SystemExit("ptxas.py: c++filt was not found; it is part of binutils, which comes with g++") from None
    return done.stdout.splitlines()


def archs_of(file: str, archs: list[str]) -> list[str]:
    """Return the archs that a file is built for.

    Files of wgmma and TMA kernels are built for sm_90a alone, see illada_add_cuda.
    """
    return [arch for arch in archs if arch == "90a" or not file.endswith("_sm90.cu")]


def cutlass_include() -> str:
    """Return the folder of CUTLASS's headers.

    It is that of ILLADA_CUTLASS_DIR, as IlladaCutlass.cmake takes it, else what `make` fetched.
    """
    found = (ROOT / ".cache").glob("cutlass-*[0-9]")
    fetched = max(found, default="", key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    named = os.environ.get("ILLADA_CUTLASS_DIR") or str(fetched)
    folder = Path(named).expanduser()
    for candidate in (folder / "include", folder, folder / "cutlass_library" / "source" / "include"):
        if named and (candidate / "cutlass" / "version.h").exists():
            return str(candidate)
    raise SystemExit(
        f"there are no headers of CUTLASS in {named or '.cache'}; `make ptxas` fetches them, "
        "and ILLADA_CUTLASS_DIR=/path/to/cutlass names others"
    )


def compile_file(nvcc: str, file: str, arch: str, flags: list[str]) -> Compiled:
    """Compile one file for one arch, and return what ptxas says of its kernels."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", *FLAGS, *flags]
        command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "include"), "-isystem", cutlass_include()]
        command += ["--keep", "--keep-dir", folder, "-o", str(Path(folder) / "out.cubin"), str(ROOT / file)]
        done = subprocess.run(command, capture_output=True, text=True)
        splits = launch_bounds("".join(path.read_text() for path in Path(folder).glob("*.ptx")))
    if done.returncode != 0:
        raise SystemExit(f"ptxas.py: {file} does not compile for sm_{arch}:\n{done.stdout}{done.stderr}")
    return compiled(file, arch, time.monotonic() - began, done.stdout + done.stderr, splits)


def compiled(file: str, arch: str, seconds: float, output: str, splits: dict[str, tuple[int, list[int]]]) -> Compiled:
    """Return a compilation's result from the compiler's output and the PTX's launch bounds.

    Kernels get their short names.
    """
    kernels, remarks = parse(output)
    for kernel in kernels:
        kernel.threads, kernel.warpgroup_registers = splits.get(kernel.name, (0, []))
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        kernel.name = short_name(name)
    return Compiled(file, arch, seconds, kernels, remarks)


def recorded(folder: Path) -> list[Compiled]:
    """Return the compilations of a build that ptxas_record.py recorded, one for each file and arch."""
    found = []
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise SystemExit(f"ptxas.py: there are no records in {folder}; ptxas_record.py says how a build leaves them")
    for path in paths:
        record = json.loads(path.read_text())
        source = Path(record["source"]).resolve()
        if not source.is_relative_to(ROOT):
            raise SystemExit(f"ptxas.py: {path} is of another checkout: {source}")
        file = str(source.relative_to(ROOT))
        targets = [re.search(r"^\.target\s+sm_(\w+)", ptx, flags=re.MULTILINE) for ptx in record["ptx"]]
        splits = {target[1]: launch_bounds(ptx) for target, ptx in zip(targets, record["ptx"], strict=True) if target}
        # One ptxas after the other; each begins by counting global memory.
        runs = re.split(r"^(?=ptxas info\s*: \d+ bytes gmem)", record["output"], flags=re.MULTILINE)
        for run in runs:
            if arch := re.search(r"Compiling entry function '[^']+' for 'sm_(\w+)'", run):
                found.append(compiled(file, arch[1], record["seconds"] / (len(runs) - 1), run, splits.get(arch[1], {})))
    return found


def faults(results: list[Compiled]) -> list[str]:
    """Return the faults that no budget excuses."""
    said = []
    owner: dict[tuple[str, str], str] = {}
    for result in results:
        for kernel in result.kernels:
            where = f"{kernel.name} on sm_{result.arch}"
            if kernel.stack or kernel.spill_stores or kernel.spill_loads:
                said.append(
                    f"{where}: {kernel.stack} bytes of stack, {kernel.spill_stores} of spill stores, "
                    f"{kernel.spill_loads} of spill loads; none is allowed ({result.file})"
                )
            if kernel.registers is None:
                continue
            if wrong := split_fault(kernel):
                said.append(f"{where}: {wrong} ({result.file})")
            if (kernel.name, result.arch) in owner:
                first = owner[kernel.name, result.arch]
                said.append(
                    f"{where}: two kernels have this name ({first}, {result.file}); profiles and budget need one"
                )
            owner[kernel.name, result.arch] = result.file
        said += [f"{result.file} on sm_{result.arch}: ptxas says: {remark}" for remark in result.remarks]
    return said


def measured(results: list[Compiled]) -> dict[str, dict[str, dict[str, int]]]:
    """Return registers and smem by kernel and arch, as the budget file has them."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for result in results:
        for kernel in result.kernels:
            if kernel.registers is not None:
                entry = {"registers": kernel.registers, "smem": kernel.smem}
                table.setdefault(kernel.name, {})[f"sm_{result.arch}"] = entry
    return table


def resident(registers: int, threads: int) -> int:
    """Return how many CTAs the registers of a multiprocessor suffice for.

    There are 65536, given out to a thread by eights.
    """
    return 65536 // ((registers + 7) // 8 * 8 * threads)


def over_budget(
    results: list[Compiled], budget: dict, archs: list[str], complete: bool = True, same_cuda: bool = True
) -> list[str]:
    """Return where kernels and budget disagree.

    `archs` are those compiled for: a budget for others is not stale. Nor is one for other files where not all of them
    were compiled (`complete`). Register counts differ a little between compilers: by another CUDA than the budget's
    they count only where fewer CTAs fit.
    """
    said = []
    table = measured(results)
    threads = {kernel.name: kernel.threads for result in results for kernel in result.kernels}
    for name in sorted(table):
        for arch, used in table[name].items():
            allowed = budget.get(name, {}).get(arch)
            if allowed is None:
                said.append(f"{name} on {arch}: not in the budget; `make ptxas UPDATE=1` adds it")
                continue
            for what in ("registers", "smem"):
                over = used[what] > allowed[what]
                if over and what == "registers" and not same_cuda and threads[name]:
                    over = resident(used[what], threads[name]) < resident(allowed[what], threads[name])
                if over:
                    said.append(
                        f"{name} on {arch}: {what} {used[what]}, over the budget of {allowed[what]}; "
                        "where it is worth it, `make ptxas UPDATE=1` raises the budget"
                    )
    for name in sorted(budget) if complete else ():
        for arch in budget[name]:
            if arch.removeprefix("sm_") in archs and arch not in table.get(name, {}):
                said.append(f"{name} on {arch}: in the budget, but no kernel is; `make ptxas UPDATE=1` removes it")
    return said


def budget_text(table: dict, old: dict, archs: list[str], version: str) -> str:
    """Return the text of the budget file, sorted, with a line for each kernel and arch.

    Entries of archs that were not compiled now are kept.
    """
    kept = {
        name: {arch: entry for arch, entry in entries.items() if arch.removeprefix("sm_") not in archs}
        for name, entries in old.items()
    }
    kernels = {name: {**kept.get(name, {}), **table.get(name, {})} for name in sorted({*kept, *table})}
    kernels = {name: entries for name, entries in kernels.items() if entries}
    blocks = []
    for name, entries in kernels.items():
        by_number = sorted(entries, key=lambda arch: (int(re.sub(r"\D", "", arch)), arch))
        lines = [f"      {json.dumps(arch)}: {json.dumps(entries[arch])}" for arch in by_number]
        blocks.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }")
    return f'{{\n  "nvcc": {json.dumps(version)},\n  "kernels": {{\n' + ",\n".join(blocks) + "\n  }\n}\n"


def table_text(results: list[Compiled]) -> str:
    """Return a table with a line for each kernel."""
    rows: list[tuple[str, ...]] = [("kernel", "arch", "registers", "smem", "stack", "spill st", "spill ld")]
    for result in results:
        for kernel in sorted(result.kernels, key=lambda kernel: kernel.name):
            registers = "function" if kernel.registers is None else kernel.registers
            numbers = (registers, kernel.smem, kernel.stack, kernel.spill_stores, kernel.spill_loads)
            rows.append((kernel.name, f"sm_{result.arch}", *(str(number) for number in numbers)))
    rows[1:] = sorted(rows[1:], key=lambda row: row[0])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def job_count() -> int:
    """Return how many compilers the machine's cores and memory allow at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // BYTES_A_JOB))


def toolkit(nvcc: str) -> tuple[str, set[str]]:
    """Return the version of nvcc, and the archs that it knows."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"ptxas.py: {nvcc} could not be run ({error}).\n"
            "Set CUDACXX=/path/to/nvcc of CUDA 12.3 or newer; docs/install.md says where to get one without a GPU."
        ) from None
    version = re.search(r"release (\d+\.\d+)", said)
    # nvcc lists sm_90 and knows sm_90a without listing it, see illada_known_archs; other code is not built by default.
    codes = set(re.findall(r"sm_(\d+[af]?)", known))
    return version[1] if version else "unknown", codes | {
        code + "a" for code in codes if code.isdigit() and int(code) >= 90
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="ptxas.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  make ptxas                                      all files, all archs\n"
        "  make ptxas UPDATE=1                             and write what they use into the budget\n"
        "  python3 cmake/ptxas.py sampling --arch 90a      while working on a kernel: csrc/sampling on one arch\n"
        "  python3 cmake/ptxas.py _d192_ --update          new files: write their kernels into the budget\n"
        "  python3 cmake/ptxas.py sampling --arch 80 -- -DX  with a flag of nvcc",
    )
    parser.add_argument("pattern", nargs="?", default="", help="only files whose path contains this")
    parser.add_argument(
        "--arch",
        action="append",
        metavar="N",
        help=f"80, 90a, ...; may be repeated (default: {', '.join(DEFAULT_ARCHS)})",
    )
    parser.add_argument("--update", action="store_true", help="write the budget file from what is measured")
    parser.add_argument("--budget", type=Path, default=BUDGET, help="the budget file (default: %(default)s)")
    parser.add_argument("--nvcc", default=os.environ.get("CUDACXX") or "nvcc", help="default: CUDACXX, else nvcc")
    parser.add_argument("--recorded", type=Path, metavar="DIR", help="of a build with ptxas_record.py; compile nothing")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one a core, 3 GB of memory each)")
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    args = parser.parse_args(arguments[: len(arguments) - len(flags) - 1] if "--" in arguments else arguments)

    version, known = toolkit(args.nvcc)
    archs = args.arch or [arch for arch in DEFAULT_ARCHS if arch in known]
    if unknown := [arch for arch in archs if arch not in known]:
        parser.error(f"CUDA {version} does not know sm_{', sm_'.join(unknown)}")
    left_out = [arch for arch in DEFAULT_ARCHS if arch not in known and not args.arch]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cu"))
    if args.recorded and (args.pattern or args.arch or flags):
        parser.error("--recorded is of a whole build: no pattern, arch or flags")
    jobs = [(file, arch) for file in files if args.pattern in file for arch in archs_of(file, archs)]
    if not jobs:
        parser.error(f"no file under csrc/ matches {args.pattern!r} for sm_{', sm_'.join(archs)}")

    old: dict[str, Any] = (
        json.loads(args.budget.read_text()) if args.budget.exists() else {"nvcc": version, "kernels": {}}
    )
    if args.update and args.pattern and old["nvcc"] != version:
        parser.error(f"the budget was written by CUDA {old['nvcc']}, this is {version}: --update without a pattern")

    began = time.monotonic()
    if args.recorded:
        results = recorded(args.recorded)
        if missing := sorted({*jobs} - {(result.file, result.arch) for result in results}):
            raise SystemExit(f"ptxas.py: {args.recorded} has no record of {missing}")
    else:
        with ThreadPoolExecutor(args.jobs or job_count()) as pool:
            results = list(pool.map(lambda job: compile_file(args.nvcc, job[0], job[1], flags), jobs))
    print(table_text(results))
    print("\ncompile seconds:")
    for file in dict.fromkeys(result.file for result in results):
        mine = [result for result in results if result.file == file]
        each = "  ".join(f"sm_{result.arch} {result.seconds:5.1f}" for result in mine)
        print(f"  {file:44} {sum(result.seconds for result in mine):6.1f}   {each}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    spent = sum(result.seconds for result in results)
    print(f"  CUDA {version}: {spent:.1f} s in all, {time.monotonic() - began:.1f} s of waiting; ", end="")
    print("recorded" if args.recorded else f"the largest compiler process took {peak:.0f} MiB")
    for arch in left_out:
        print(f"  sm_{arch} left out: CUDA {version} does not know it")

    said = faults(results)
    if args.update:
        # With a pattern, entries of other files stay; one that no kernel has any more goes in a whole update alone.
        args.budget.write_text(budget_text(measured(results), old["kernels"], [] if args.pattern else archs, version))
        print(f"\nwrote {args.budget}")
    else:
        said += over_budget(results, old["kernels"], archs, complete=not args.pattern, same_cuda=old["nvcc"] == version)
    if not said:
        print(f"\n{sum(map(len, measured(results).values()))} kernels: no spills, all within the budget")
        return 0
    print(f"\nptxas.py: {len(said)} faults", file=sys.stderr)
    for line in said:
        print(f"  {line}", file=sys.stderr)
    if old["nvcc"] != version:
        print(f"  The budget was written by CUDA {old['nvcc']}, this is {version}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
