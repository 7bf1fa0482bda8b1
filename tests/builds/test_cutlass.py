"""Where a build finds the headers of CUTLASS: cmake/IlladaCutlass.cmake with made-up folders and a stand-in for pip, and
what the build backend asks for. No compiler runs and nothing is fetched."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "cmake" / "IlladaCutlass.cmake"
BACKEND = ROOT / "build_backend" / "illada_backend.py"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake")

PROJECT = """
cmake_minimum_required(VERSION 3.22)
project(search LANGUAGES NONE)
foreach(place SYSTEM_ENVIRONMENT_PATH CMAKE_SYSTEM_PATH PACKAGE_REGISTRY CMAKE_SYSTEM_PACKAGE_REGISTRY)
  set(CMAKE_FIND_USE_${place} OFF) # not what this machine itself has installed
endforeach()
include("${MODULE}")
illada_find_cutlass(found "${PYTHON}")
message(STATUS "found: ${found_VERSION} ${found}")
"""

# What CUTLASS installs, as far as it matters: lib/cmake/NvidiaCutlass below a prefix, the target in its namespace.
PACKAGE = """
if(TARGET nvidia::cutlass::CUTLASS)
  return()
endif()
add_library(nvidia::cutlass::cutlass INTERFACE IMPORTED)
get_filename_component(prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set_target_properties(nvidia::cutlass::cutlass PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES "/opt/none/include;${prefix}/include")
"""


def make_headers(include: Path, version="4.2.0", cute=True) -> Path:
    """Make the part of an include folder that the search looks at."""
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass").mkdir(parents=True)
    text = "".join(f"#define CUTLASS_{name} {number}\n" for name, number in names)
    (include / "cutlass" / "version.h").write_text(f"#pragma once\n{text}#define CUTLASS_BUILD 0\n")
    if cute:
        (include / "cute").mkdir()
        (include / "cute" / "tensor.hpp").touch()
    return include


def make_package(prefix: Path, version="4.2.0") -> Path:
    folder = prefix / "lib" / "cmake" / "NvidiaCutlass"
    folder.mkdir(parents=True)
    (folder / "NvidiaCutlassConfig.cmake").write_text(PACKAGE)
    make_headers(prefix / "include", version)
    return prefix


def make_wheel(folder: Path, version="4.2.0") -> Path:
    """A wheel whose import would fail."""
    make_headers(folder / "tree" / "cutlass_library" / "source" / "include", version)
    (folder / "tree" / "cutlass_library" / "__init__.py").write_text("raise ImportError('scipy')\n")
    (folder / "tree" / f"nvidia_cutlass-{version}.0.dist-info").mkdir()
    (folder / "tree" / f"nvidia_cutlass-{version}.0.dist-info" / "METADATA").touch()
    wheel = folder / f"nvidia_cutlass-{version}.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((folder / "tree").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder / "tree"))
    return wheel


def make_program(path: Path, body="exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# A Python that logs its calls. Its sys.path is SITES; its pip is what PIP says: none, broken, or a wheel to copy.
# With -I or -E it is the interpreter around an isolated environment, whose variables begin with OUTER_.
FAKE_PYTHON = """import json, os, shutil, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
outer = arguments[0] in ("-I", "-E")
value = lambda name: os.environ.get(f"OUTER_{{name}}" if outer else name, "")
arguments = arguments[1:] if outer else arguments
if arguments[0] == "-c":
    print(value("SITES"))
elif arguments[:2] == ["-m", "pip"]:
    if not value("PIP"):
        sys.exit("No module named pip")
    if arguments[2] != "--version":
        if value("PIP") == "broken":
            sys.exit("ERROR: no index\\nERROR: none at all")
        shutil.copy(value("PIP"), arguments[arguments.index("--dest") + 1])
else:
    sys.exit(f"what is {{arguments}}?")
"""


class Search:
    """A machine on which CMake looks for headers."""

    def __init__(self, folder: Path):
        self.folder = folder / "a machine"
        self.build = self.folder / "build"
        self.log = self.folder / "python.log"
        (self.folder / "project").mkdir(parents=True)
        (self.folder / "project" / "CMakeLists.txt").write_text(PROJECT)
        self.python = self.folder / "python"
        script = self.folder / "python.py"
        script.write_text(FAKE_PYTHON.format(log=str(self.log)))
        make_program(self.python, f'exec "{sys.executable}" "{script}" "$@"')
        self.works, self.out, self.said = None, "", ""

    def run(self, options=(), python=True, **environment) -> str:
        """Return what is found, as `VERSION FOLDER`; empty after an error."""
        self.log.unlink(missing_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ILLADA_", "UV", "CMAKE_", "Nvidia"))}
        command = [CMAKE, "-S", str(self.folder / "project"), "-B", str(self.build), f"-DMODULE={MODULE}"]
        command += [f"-DPYTHON={self.python if python else ''}", *(f"-D{option}" for option in options)]
        command += [f"-DCMAKE_MAKE_PROGRAM={CMAKE}"]  # nothing is built: any program will do
        environment = {**clean, "PATH": f"{Path(CMAKE).parent}{os.pathsep}/bin", **environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        self.works, self.out, self.said = done.returncode == 0, done.stdout, " ".join(done.stderr.split())
        found = re.search(r"-- found: (.*)", done.stdout)
        assert self.works == bool(found), done.stderr
        return found[1] if found else ""

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def downloads(self) -> list[list[str]]:
        return [call for call in self.calls() if "download" in call]


@pytest.fixture
def search(tmp_path) -> Search:
    return Search(tmp_path)


@needs_cmake
@pytest.mark.parametrize("layout", ["checkout", "include", "wheel"])
def test_each_layout_of_a_named_folder(search, layout):
    below = {"checkout": "include", "include": "", "wheel": "cutlass_library/source/include"}[layout]
    include = make_headers(search.folder / "some where" / below, "4.1.3")
    assert search.run(ILLADA_CUTLASS_DIR=str(search.folder / "some where")) == f"4.1.3 {include}"
    assert search.run([f"ILLADA_CUTLASS_DIR={search.folder / 'some where'}"], python=False) == f"4.1.3 {include}"
    assert not search.calls() and search.said == ""


@needs_cmake
def test_the_order(search, tmp_path):
    """CMake's variable, the environment's, a CMake package, a wheel in the build's environment, one around it, a fetch."""
    places = {
        name: make_headers(tmp_path / name / "include", f"4.0.{i}").parent
        for i, name in enumerate(("option", "variable"))
    }
    prefix = make_package(tmp_path / "prefix", "4.0.2")
    inner, outer, fetched = (make_wheel(tmp_path / name, f"4.0.{i}") for i, name in enumerate(("in", "out", "net"), 3))
    options = [f"ILLADA_CUTLASS_DIR={places['option']}", f"CMAKE_PREFIX_PATH={prefix}", "ILLADA_CUTLASS_DOWNLOAD=ON"]
    environment = {
        "ILLADA_CUTLASS_DIR": str(places["variable"]),
        "SITES": f"/nowhere;{inner.parent / 'tree'}",
        "OUTER_SITES": str(outer.parent / "tree"),
        "OUTER_PIP": str(fetched),
    }

    def version() -> str:
        shutil.rmtree(search.build, ignore_errors=True)
        return search.run(options, **environment).split()[0]

    assert version() == "4.0.0"
    options[0] = "ILLADA_CUTLASS_DIR="
    assert version() == "4.0.1"
    del environment["ILLADA_CUTLASS_DIR"]
    assert version() == "4.0.2" and not search.calls()
    del options[1]
    assert version() == "4.0.3"
    del environment["SITES"]
    assert version() == "4.0.4" and not search.downloads()
    del environment["OUTER_SITES"]
    assert version() == "4.0.5" and len(search.downloads()) == 1


@needs_cmake
def test_what_is_fetched(search, tmp_path):
    """Headers and their license, once, without dependencies."""
    environment = {"OUTER_PIP": str(make_wheel(tmp_path / "net"))}
    include = search.build / "nvidia-cutlass" / "cutlass_library" / "source" / "include"
    assert search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], **environment) == f"4.2.0 {include}"
    (call,) = search.downloads()
    assert call[:4] == ["-I", "-m", "pip", "download"] and "--no-deps" in call and call[-1] == "nvidia-cutlass>=4.0,<5"
    assert {path.name for path in (search.build / "nvidia-cutlass").iterdir()} == {
        "cutlass_library", "nvidia_cutlass-4.2.0.0.dist-info",
    }  # fmt: skip
    assert not (search.build / "nvidia-cutlass" / "cutlass_library" / "__init__.py").exists()
    assert search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"]) == f"4.2.0 {include}" and not search.downloads()


@needs_cmake
def test_an_interrupted_fetch_is_none(search, tmp_path):
    make_headers(search.build / "nvidia-cutlass.part" / "cutlass_library" / "source" / "include", cute=False)
    assert not search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], OUTER_PIP="broken")
    assert search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], OUTER_PIP=str(make_wheel(tmp_path / "net"))).startswith("4.2.0 ")


@needs_cmake
def test_which_program_fetches(search, tmp_path):
    """The pip in an isolated environment where there is none around it, else uv."""
    wheel = make_wheel(tmp_path / "net")
    assert search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], PIP=str(wheel))
    assert [call[:3] for call in search.downloads()] == [["-m", "pip", "download"]]
    shutil.rmtree(search.build)
    uv = search.folder / "uv"
    uv.write_text(f'#!/bin/sh\nwhile [ "$1" != --target ]; do shift; done\ncp -R "{wheel.parent}/tree/." "$2"\n')
    uv.chmod(0o755)
    assert search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], UV=str(uv)).startswith("4.2.0 ") and not search.downloads()
    shutil.rmtree(search.build)
    assert not search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"])
    assert f"They could not be fetched either: {search.python} has no pip" in search.said


@needs_cmake
def test_without_any(search):
    """The message has the ways out, and what pip said where it was asked."""
    assert not search.run(OUTER_PIP="broken") and not search.downloads()  # CMake alone does not fetch
    assert "need the headers of CUTLASS 4.0 or newer, and there are none: ILLADA_CUTLASS_DIR is not set" in search.said
    for way in (
        "pip install --no-deps 'nvidia-cutlass>=4.0,<5'",
        "ILLADA_CUTLASS_DIR=/path/to/cutlass",
        "ILLADA_CUDA=off",
    ):
        assert way in search.said
    assert "fetched" not in search.said
    assert not search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], OUTER_PIP="broken") and len(search.downloads()) == 1
    assert "They could not be fetched either: ERROR: no index ERROR: none at all Any of these helps:" in search.said
    assert not search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], python=False) and not search.calls()


@needs_cmake
@pytest.mark.parametrize("source", ["variable", "package", "wheel"])
def test_an_old_one_is_refused_wherever_it_is(search, tmp_path, source):
    options, environment = ["ILLADA_CUTLASS_DOWNLOAD=ON"], {"OUTER_PIP": str(make_wheel(tmp_path / "net"))}
    if source == "variable":
        include = make_headers(tmp_path / "old one" / "include", "3.9.2")
        environment["ILLADA_CUTLASS_DIR"] = str(tmp_path / "old one")
    elif source == "package":
        include = make_package(tmp_path / "old one", "3.9.2") / "include"
        options.append(f"NvidiaCutlass_ROOT={tmp_path / 'old one'}")
    else:
        include = make_wheel(tmp_path / "old one", "3.9.2").parent / "tree" / "cutlass_library" / "source" / "include"
        environment["SITES"] = str(tmp_path / "old one" / "tree")
    assert not search.run(options, **environment) and not search.downloads()
    assert f"CUTLASS 3.9.2 was found in {include}; 4.0 or newer is needed. Any of these helps:" in search.said


@needs_cmake
def test_a_folder_without_headers_or_with_some(search, tmp_path):
    environment = {"OUTER_PIP": str(make_wheel(tmp_path / "net"))}
    for folder in (tmp_path / "no thing", tmp_path / "missing"):
        (tmp_path / "no thing").mkdir(exist_ok=True)
        assert not search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], ILLADA_CUTLASS_DIR=str(folder), **environment)
        assert f"ILLADA_CUTLASS_DIR is {folder}, and neither it, its include nor its" in search.said
        assert "holds cutlass/version.h. Any of these helps:" in search.said and not search.calls()
    include = make_headers(tmp_path / "half" / "include", cute=False)
    assert not search.run(ILLADA_CUTLASS_DIR=str(tmp_path / "half"))
    assert f"CUTLASS 4.2.0 in {include} is not complete: cute/tensor.hpp is missing" in search.said


@needs_cmake
@pytest.mark.parametrize("version, warns", [("4.0.0", False), ("4.99.1", False), ("5.0.0", True), ("10.1.0", True)])
def test_a_newer_major_version_is_a_warning(search, tmp_path, version, warns):
    include = make_headers(tmp_path / "include", version)
    assert search.run(ILLADA_CUTLASS_DIR=str(tmp_path)) == f"{version} {include}"
    assert (
        f"CUTLASS {version} was found in {include}; the kernels were tested with versions below 5" in search.said
    ) == warns


@needs_cmake
def test_headers_without_a_version(search, tmp_path):
    include = make_headers(tmp_path / "include")
    (include / "cutlass" / "version.h").write_text("#pragma once\n")
    search.run(ILLADA_CUTLASS_DIR=str(include))
    assert f"{include}/cutlass/version.h names no version of CUTLASS" in search.said


@needs_cmake
def test_a_build_folder_whose_name_reads_as_a_pattern(search, tmp_path):
    search.build = search.folder / "build [1] *"
    found = search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], PIP=str(make_wheel(tmp_path)))
    assert found.startswith("4.2.0 ") and not list(search.build.glob("*.part"))


@needs_cmake
def test_a_pip_that_fetches_nothing_is_named(search, tmp_path):
    search.run(["ILLADA_CUTLASS_DOWNLOAD=ON"], PIP=str(make_program(tmp_path / "other.whl")))
    assert "They could not be fetched either: " in search.said and "download" in search.said
    assert "and no headers in" in search.said and not list(search.build.glob("*.part"))


@needs_cmake
def test_real_headers(search, cutlass_include):
    """Those that the Makefile fetches, or that the environment names."""
    version, _, include = search.run(ILLADA_CUTLASS_DIR=cutlass_include).partition(" ")
    assert int(version.split(".")[0]) >= 4 and (Path(include) / "cute" / "arch").is_dir() and search.said == ""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_when_the_makefile_fetches(tmp_path):
    """A pinned version, once, where there is an nvcc and nobody names other headers."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    nvcc = make_program(tmp_path / "bin" / "nvcc")

    def fetched(**environment) -> list[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("ILLADA_CUTLASS_DIR", "MAKEFLAGS", "MFLAGS")}
        command = ["make", "--dry-run", "ptxas"]
        done = subprocess.run(
            command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, check=True
        )
        assert "cmake/ptxas.py" in done.stdout
        return re.findall(r"nvidia-cutlass==(\S+)", done.stdout)

    (version,) = fetched(CUDACXX=str(nvcc))
    assert version.startswith("4.")
    assert fetched(CUDACXX=f"{nvcc} -ccbin g++") == fetched(CUDACXX="", CUDA_PATH=str(nvcc.parent.parent)) == [version]
    assert fetched(CUDACXX=str(nvcc), ILLADA_CUDA="off") == []
    assert fetched(CUDACXX="/no/nvcc") == fetched(CUDACXX=str(nvcc), ILLADA_CUTLASS_DIR="/some/where") == []
    (folder / ".cache" / f"cutlass-{version}").mkdir(parents=True)
    assert fetched(CUDACXX=str(nvcc)) == []


# ---------------------------------------------------------------------------------------------------------- backend


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The backend's module, on a machine with an nvcc and without pip, uv or headers."""
    pytest.importorskip("setuptools.build_meta")
    monkeypatch.syspath_prepend(BACKEND.parent)
    monkeypatch.setattr("illada_nvcc.USUAL", "/nonexistent")
    monkeypatch.setattr("illada_nvcc.wheel_nvcc", lambda environ: "")
    spec = importlib.util.spec_from_file_location("illada_backend", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in [name for name in os.environ if name.startswith(("ILLADA_", "CUDA", "CMAKE_", "UV"))]:
        monkeypatch.delenv(name)
    make_program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(make_program(tmp_path / "python", "exit 1")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "version", lambda program: (9, 9, 9))  # of cmake and ninja
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable"):
        monkeypatch.setattr(module.build_meta, hook, lambda settings: [])
    return module


def test_pip_is_asked_for_where_nothing_else_can_fetch(backend):
    assert backend.get_requires_for_build_wheel() == ["pip"]
    assert backend.get_requires_for_build_editable({"any": "setting"}) == ["pip"]


@pytest.mark.parametrize(
    "environment",
    [
        {"ILLADA_CUDA": "off"},
        {"ILLADA_CUDA": "OFF"},
        {"CMAKE_ARGS": "-G Ninja -DILLADA_CUDA:STRING=off"},
        {"ILLADA_CUDA": "on", "CMAKE_ARGS": "-DILLADA_CUDA=on -DILLADA_CUDA=off"},
        {"CUDACXX": "/no/nvcc"},
        {"PATH": "/nowhere"},
        {"ILLADA_CUTLASS_DIR": "/some/where"},
        {"CMAKE_ARGS": "-DILLADA_CUTLASS_DIR=/some/where"},
        {"ILLADA_CUTLASS_DOWNLOAD": "off"},
        {"UV": "/usr/bin/uv"},
    ],
)
def test_nothing_is_asked_for_otherwise(backend, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert backend.get_requires_for_build_wheel() == backend.get_requires_for_build_editable() == []


@pytest.mark.parametrize(
    "environment",
    [
        {"ILLADA_CUDA": "on"},
        {"ILLADA_CUDA": "off", "CMAKE_ARGS": "-DILLADA_CUDA=on"},
        {"CMAKE_ARGS": "-DILLADA_CUDA_ARCHS=80-real"},
        {"CUDACXX": "nvcc -ccbin g++", "PATH": "{bin}"},
        {"CUDACXX": "{bin}/nvcc", "PATH": "/nowhere"},
        {"CUDA_HOME": "{bin}/..", "PATH": "/nowhere"},
        {"CUDA_PATH": "{bin}/..", "PATH": "/nowhere"},
        {"CMAKE_ARGS": "-DCMAKE_CUDA_COMPILER={bin}/nvcc", "PATH": "/nowhere"},
    ],
)
def test_where_an_nvcc_is_seen(backend, monkeypatch, tmp_path, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(bin=tmp_path / "bin"))
    assert backend.get_requires_for_build_wheel() == ["pip"]


def test_a_pip_or_headers_that_are_there(backend, monkeypatch, tmp_path):
    for body in ('[ "$1" = -I ]', '[ "$1" = -m ]'):
        make_program(tmp_path / "python", body)
        assert backend.get_requires_for_build_wheel() == []
    make_program(tmp_path / "python", "exit 1")
    monkeypatch.setattr(importlib.util, "find_spec", {"cutlass_library": "a spec"}.get)
    assert backend.get_requires_for_build_wheel() == []


def test_a_machine_without_nvcc_starts_nothing(backend, monkeypatch):
    """No process, let alone a network, before the build on a machine for CPUs."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert backend.get_requires_for_build_wheel() == []


def test_all_of_setuptools_hooks_are_there(backend):
    for name in backend.build_meta.__all__:
        assert hasattr(backend, name), name
    own = {"get_requires_for_build_wheel", "get_requires_for_build_editable"}
    for name in {"build_wheel", "build_editable", "build_sdist", "prepare_metadata_for_build_wheel"} - own:
        assert getattr(backend, name) == getattr(backend.build_meta, name)
