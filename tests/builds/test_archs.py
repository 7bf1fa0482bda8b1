"""Which GPUs a build is for: cmake/IlladaArchs.cmake with scripts in place of nvcc and nvidia-smi. No compiler runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ROOT / "cmake" / "IlladaArchs.cmake"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")

# What `nvcc --list-gpu-code` prints.
LISTED = {
    "12.3": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.8": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120",
    "12.9": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 103 120 121",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}

SCRIPT = """
cmake_minimum_required(VERSION 3.22)
include("${MODULE}")
illada_known_archs(known "${NVCC}" "${VERSION}")
set(detected "")
set(ILLADA_CUDA_ARCHS "${WANTED}")
illada_wanted_archs(wanted by)
if(NOT wanted)
  illada_detect_gpus(detected)
endif()
illada_choose_archs(chosen "${wanted}" "${detected}" "${known}" "${VERSION}" ${by})
message(STATUS "default: ${ILLADA_DEFAULT_ARCHS}")
message(STATUS "known: ${known}")
message(STATUS "chosen: ${chosen}")
"""


class Run:
    """The result of `cmake -P` with a toolkit and a list; `lines` is what it says, each sentence in one line."""

    def __init__(self, folder: Path, version="13.0", wanted="", gpus=(), listed=None, nvcc_fails=False, **settings):
        listed = LISTED[version].split() if listed is None else listed
        programs = {
            "nvcc": f'[ "$1" = --list-gpu-code ] || exit 3\nprintf "sm_%s\\n" {" ".join(listed)}\n'
            if listed
            else "echo nothing; exit 0\n",
            "nvidia-smi": f'printf "%s\\n" {" ".join(gpus)}\n' if gpus else "exit 9\n",
        }
        if nvcc_fails:
            programs["nvcc"] = "echo broken >&2; exit 1\n"
        for name, body in programs.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}")
            (folder / name).chmod(0o755)
        (folder / "script.cmake").write_text(SCRIPT)
        options = {"MODULE": ARCHS, "NVCC": folder / "nvcc", "VERSION": version, "WANTED": wanted}
        if "CMAKE_CUDA_ARCHITECTURES" in settings:
            options["CMAKE_CUDA_ARCHITECTURES"] = settings.pop("CMAKE_CUDA_ARCHITECTURES")
        clean = {name: value for name, value in os.environ.items() if name not in ("CUDAARCHS", "TORCH_CUDA_ARCH_LIST")}
        done = subprocess.run(
            [CMAKE, *(f"-D{name}={value}" for name, value in options.items()), "-P", str(folder / "script.cmake")],
            env={**clean, "PATH": f"{folder}{os.pathsep}{PATH}", **settings}, capture_output=True, text=True,
        )  # fmt: skip
        self.works = done.returncode == 0
        self.lists = {name: x.split(";") for name, x in re.findall(r"-- (\w+): (.*)", done.stdout)}
        self.said = " ".join(done.stderr.split())

    @property
    def chosen(self) -> str:
        assert self.works, self.said
        return ";".join(self.lists["chosen"])


@pytest.mark.parametrize(
    "version, chosen",
    [
        ("12.3", "80-real;90a-real;90-virtual"),
        ("12.8", "80-real;90a-real;100-real;120-real;90-virtual"),
        ("13.0", "80-real;90a-real;100-real;120-real;90-virtual"),
    ],
)
def test_the_default_is_what_the_toolkit_knows(version, chosen, tmp_path):
    run = Run(tmp_path, version)
    assert run.chosen == chosen and run.said == ""


@pytest.mark.parametrize(
    "version, wanted",
    [
        ("12.3", "80-real;90a-real;90-virtual"),
        ("12.3", "90a-virtual"),
        ("12.8", "100a-real;120-real;89-virtual"),
        ("12.9", "100f-real;120f-virtual;121a-real"),
        ("13.0", "88-real;110-real;100f-real"),
    ],
)
def test_known_entries_stay_as_they_are(version, wanted, tmp_path):
    run = Run(tmp_path, version, wanted)
    assert run.chosen == wanted and run.said == ""


@pytest.mark.parametrize(
    "version, wanted, chosen, replaced",
    [
        ("12.3", "80-real;120-real", "80-real;90-virtual", {"120-real": "90-virtual"}),
        ("12.3", "120-virtual", "90-virtual", {"120-virtual": "90-virtual"}),
        ("12.3", "90-virtual;100-real;120a-real", "90-virtual", {"100-real": "90-virtual", "120a-real": "90-virtual"}),
        ("12.8", "100f-real", "100-virtual", {"100f-real": "100-virtual"}),
        (
            "12.8",
            "103-real;130-real",
            "101-virtual;120-virtual",
            {"103-real": "101-virtual", "130-real": "120-virtual"},
        ),
        ("13.0", "101-real", "100-virtual", {"101-real": "100-virtual"}),
        ("13.0", "86a-real", "86-virtual", {"86a-real": "86-virtual"}),
    ],
)
def test_unknown_entries_become_the_newest_ptx_that_runs_there(version, wanted, chosen, replaced, tmp_path):
    run = Run(tmp_path, version, wanted)
    assert run.chosen == chosen
    for entry, other in replaced.items():
        assert (
            f"ILLADA_CUDA_ARCHS holds {entry}, which CUDA {version} does not know. {other} takes its place" in run.said
        )
    assert run.said.count("takes its place") == len(replaced)


def test_a_toolkit_that_lists_what_others_leave_out(tmp_path):
    run = Run(tmp_path, "12.8", "90a-real;100f-real", listed=["80", "90", "90a", "100", "100a", "100f"])
    assert run.chosen == "90a-real;100f-real"
    assert run.lists["known"] == ["80", "90", "90a", "100", "100a", "100f"]


def test_codes_that_no_compiler_has_are_not_made_up(tmp_path):
    known = Run(tmp_path, "12.8").lists["known"]
    assert {"90a", "100a", "120a"} <= set(known) and not {"80a", "89a", "90f", "100f"} & set(known)
    assert "100f" in Run(tmp_path, "12.9").lists["known"]


@pytest.mark.parametrize(
    "version, gpus, chosen, said",
    [
        ("13.0", ["9.0", "9.0"], "90a-real", ""),
        ("13.0", ["8.6", "7.5"], "86-real", ""),
        ("13.0", ["10.3"], "103-real", ""),
        ("13.0", ["7.5"], "80-real;90a-real;100-real;120-real;90-virtual", ""),
        ("12.3", ["9.0", "12.0"], "90a-real;90-virtual", "the GPUs of this machine ask for 120-real"),
    ],
)
def test_gpus_of_the_machine(version, gpus, chosen, said, tmp_path):
    run = Run(tmp_path, version, gpus=gpus)
    assert run.chosen == chosen and said in run.said and bool(said) == bool(run.said)


def test_a_list_outweighs_the_gpus(tmp_path):
    assert Run(tmp_path, wanted="80-real", gpus=["9.0"]).chosen == "80-real"


@pytest.mark.parametrize(
    "wanted, entry, spelt",
    [
        ("90", "90", "90a-real"),
        ("9.0", "9.0", "90a-real"),
        ("sm_90", "sm_90", "90a-real"),
        ("12.0", "12.0", "120-real"),
        ("9.0a;8.0+PTX", "9.0a", "90a-real;80-real;80-virtual"),
        ("9.0a 8.0+PTX", "9.0a 8.0+PTX", "90a-real;80-real;80-virtual"),
        ("80-real,90a-real", "80-real,90a-real", "80-real;90a-real"),
        ("80-real;90a", "90a", "80-real;90a-real"),
        ("compute_100f", "compute_100f", "100f-virtual"),
        ("90-real;9.0+PTX", "9.0+PTX", "90-real;90a-real;90-virtual"),
    ],
)
def test_other_spellings_are_refused_with_the_right_one(wanted, entry, spelt, tmp_path):
    run = Run(tmp_path, wanted=wanted)
    assert not run.works
    assert f'ILLADA_CUDA_ARCHS holds "{entry}"; entries look like 80-real, 90a-real or 90-virtual' in run.said
    assert f'Write ILLADA_CUDA_ARCHS="{spelt}"' in run.said
    assert Run(tmp_path, wanted=spelt).chosen == spelt


@pytest.mark.parametrize("wanted", ["native", "all", "80-", "hopper", "80-real;-real", "8"])
def test_what_means_nothing_is_refused(wanted, tmp_path):
    run = Run(tmp_path, wanted=wanted)
    assert not run.works and "entries look like 80-real" in run.said and "Write" not in run.said


TORCH, CUDAARCHS, CMAKE_VARIABLE = "TORCH_CUDA_ARCH_LIST", "CUDAARCHS", "CMAKE_CUDA_ARCHITECTURES"


@pytest.mark.parametrize(
    "settings, chosen, said",
    [
        ({TORCH: "8.0;9.0a+PTX"}, "80-real;90a-real;90-virtual", ""),
        ({TORCH: "7.0 7.5 8.0 8.6 9.0 12.0+PTX"}, "80-real;86-real;90a-real;120-real;120-virtual", ""),
        ({TORCH: "8.0 Hopper"}, "80-real", 'TORCH_CUDA_ARCH_LIST holds "Hopper", which is left out'),
        ({TORCH: "7.5", "gpus": ["8.6"]}, "86-real", 'TORCH_CUDA_ARCH_LIST="7.5" names no GPU'),
        ({TORCH: "8.0 13.0"}, "80-real;121-virtual", "TORCH_CUDA_ARCH_LIST holds 130-real, which CUDA 13.0 does not"),
        ({CUDAARCHS: "80-real;90"}, "80-real;90a-real;90-virtual", ""),
        ({CMAKE_VARIABLE: "90-real;89-virtual"}, "90a-real;89-virtual", ""),
        ({CMAKE_VARIABLE: "native", "gpus": ["8.6"]}, "86-real", ""),
        ({CMAKE_VARIABLE: "OFF", TORCH: "8.9"}, "89-real", ""),
        ({CMAKE_VARIABLE: "80-real", CUDAARCHS: "86-real", TORCH: "8.9"}, "80-real", ""),
        ({CMAKE_VARIABLE: "80-real", TORCH: "8.9", "wanted": "100-real"}, "100-real", ""),
    ],
)
def test_settings_of_cmake_and_torch(settings, chosen, said, tmp_path):
    """ILLADA_CUDA_ARCHS comes first, then these; what they ask for and has no kernels is left out."""
    run = Run(tmp_path, **settings)
    assert run.chosen == chosen and said in run.said and bool(said) == bool(run.said)


def test_gpus_that_are_too_old(tmp_path):
    run = Run(tmp_path, wanted="90a-real;75-real")
    assert (
        not run.works and 'holds "75-real"; the kernels need a GPU of compute capability 8.0 (80) or newer' in run.said
    )
    run = Run(tmp_path, wanted="89-real", listed=["50", "75", "100"])
    assert not run.works and "knows neither it nor an older GPU from 80 on" in run.said


@pytest.mark.parametrize("broken", [{"nvcc_fails": True}, {"listed": []}])
def test_a_compiler_that_does_not_say(broken, tmp_path):
    run = Run(tmp_path, **broken)
    assert not run.works and "--list-gpu-code" in run.said and "does not say which GPUs it compiles for" in run.said


def test_the_budget_is_checked_for_all_of_the_default(ptxas, tmp_path):
    """ptxas.py has a list of its own, since it runs without CMake; and the same view of what a toolkit knows."""
    run = Run(tmp_path)
    real = {entry.removesuffix("-real") for entry in run.lists["default"] if entry.endswith("-real")}
    assert set(ptxas.DEFAULT_ARCHS) == real
    (tmp_path / "nvcc").write_text(
        "#!/bin/sh\nif [ $1 = --version ]; then echo release 13.0; else echo sm_80 sm_90; fi\n"
    )
    assert ptxas.toolkit(str(tmp_path / "nvcc")) == ("13.0", {"80", "90", "90a"})
