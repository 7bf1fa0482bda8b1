"""Which nvcc a build takes, and what becomes of one that does not work: cmake/IlladaNvcc.cmake with scripts in its place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "cmake" / "IlladaNvcc.cmake"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")

SCRIPT = """
cmake_minimum_required(VERSION 3.22)
set(ILLADA_NVCC_PLACES "${PLACE}")
include("${MODULE}")
illada_choose_nvcc(nvcc reason "${WANTED}")
message(STATUS "nvcc: ${nvcc}")
message(STATUS "reason: ${reason}")
"""
BROKEN = 'echo "In file included from x;"; echo "x.h:9: error: #error -- unsupported GNU version; see \\"x\\""; exit 2'


class Machine:
    """A PATH with cmake alone; `add` puts an nvcc somewhere."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, where: str, body: str = "exit 0") -> Path:
        nvcc = self.folder / where / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(f"#!/bin/sh\n{body}\n")
        nvcc.chmod(0o755)
        return nvcc

    def choose(self, wanted: str = "auto", last: Path | str = "", **environment: str) -> "Machine":
        (self.folder / "script.cmake").write_text(SCRIPT)
        ours = ("CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH")
        clean = {name: value for name, value in os.environ.items() if name not in ours}
        options = {"MODULE": MODULE, "WANTED": wanted, "PLACE": self.folder / "usual", "ILLADA_NVCC_LAST": last}
        done = subprocess.run(
            [CMAKE, *(f"-D{name}={value}" for name, value in options.items()), "-P", "script.cmake"],
            cwd=self.folder, env={**clean, "PATH": f"{self.folder / 'path'}:/nowhere", **environment},
            capture_output=True, text=True,
        )  # fmt: skip
        self.works, self.said = done.returncode == 0, " ".join(done.stderr.split())
        lines = dict(line[3:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("-- "))
        self.nvcc, self.reason = lines.get("nvcc"), lines.get("reason")
        return self


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_the_named_come_first_then_path_then_the_usual_places(machine):
    usual, path, home, named = (machine.add(x) for x in ("usual", "path", "home/bin", "a folder"))
    home = str(home.parent.parent)
    order = [{"CUDACXX": str(named), "CUDA_HOME": home}, {"CUDA_HOME": home}, {"CUDA_PATH": home}, {}]
    taken = [machine.choose(**environment).nvcc for environment in order]
    assert taken == [str(named), f"{home}/bin/nvcc", f"{home}/bin/nvcc", str(path)]
    path.unlink()
    assert machine.choose(CUDA_HOME="/nowhere").nvcc == str(usual) and machine.said == ""


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_without_an_nvcc(machine, wanted):
    machine.choose(wanted)
    assert machine.works == (wanted == "auto")
    assert "no nvcc was found (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, " in (machine.reason or machine.said)
    if wanted == "on":
        assert "illada: ILLADA_CUDA=on, but no nvcc" in machine.said and "ILLADA_CUDA=off for a CPU" in machine.said


@pytest.mark.parametrize("where", ["path", "usual"])
def test_one_that_was_found_and_fails_is_a_warning_with_its_words(machine, where):
    nvcc = machine.add(where, BROKEN)
    machine.choose()
    assert machine.works and machine.nvcc == ""
    assert (
        machine.reason
        == f'{nvcc} was found and does not work: x.h:9: error: #error -- unsupported GNU version; see "x"'
    )
    for part in ("no CUDA kernels are built", f"{nvcc} does not", "In file included from x;", "ILLADA_CUDA=off"):
        assert part in machine.said.replace("does not work", "does not")


@pytest.mark.parametrize("named", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "ILLADA_CUDA=on"])
def test_one_that_was_named_and_fails_is_an_error_with_its_words(machine, named):
    nvcc = machine.add("path/bin" if "_" in named and "=" not in named else "path", BROKEN)
    value = {"CUDACXX": f"{nvcc} -O2", "CUDAHOSTCXX": "g++-1"}.get(named, str(nvcc.parent.parent))
    machine.choose("on") if "=" in named else machine.choose(**{named: value})
    assert not machine.works and f"illada: {named} asks for CUDA kernels" in machine.said
    assert 'x.h:9: error: #error -- unsupported GNU version; see "x"' in machine.said


def test_a_name_that_leads_nowhere_is_an_error(machine):
    machine.add("path")
    assert not machine.choose(CUDACXX="/no/nvcc").works
    assert "/no/nvcc does not work. It says: no such file or directory" in machine.said.replace("No such", "no such")


def test_the_trial_has_the_flags_and_the_host_compiler_of_the_build(machine):
    nvcc = machine.add("path", 'echo "$@" >"$PWD/../../told"; exit 0')
    machine.choose(CUDACXX=f"{nvcc} -allow", CUDAFLAGS='-DX="a b"', CUDAHOSTCXX="/a g++")
    assert machine.works
    assert (machine.folder / "told").read_text() == "-allow -DX=a b -ccbin /a g++ -o trial trial.cu\n"


def test_what_setup_found_in_wheels_comes_last(machine):
    wheel, usual = machine.add("wheel"), machine.add("usual")
    assert machine.choose(last=wheel).nvcc == str(usual)
    usual.unlink()
    assert machine.choose(last=wheel).nvcc == str(wheel)
    machine.add("wheel", BROKEN)
    assert machine.choose(last=wheel).works and "no CUDA kernels are built" in machine.said
