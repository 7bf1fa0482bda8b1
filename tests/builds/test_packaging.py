"""The package as users meet it: sdist, installs on four kinds of machines, second and editable install, uninstall, the C++
library. Every build is of the unpacked sdist. The module for CPUs is compiled once, as are the CUDA kernels, as PTX; later
builds continue in the same folder.
"""

import json
import os
import re
import shutil
import sys
import tarfile
import time
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from building import ROOT, attempt, broken_nvcc, environment, needs_nvcc, one_line, run

import illada

pytestmark = pytest.mark.slow


# An index that is asked although it must not be: nobody listens there.
NOWHERE = {
    name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
}
OFFLINE = {**NOWHERE, "PIP_NO_INDEX": "1"}
TAG = f"{sys.implementation.cache_tag}{sys.abiflags}"  # of setup.py's folder in ILLADA_BUILD_DIR


def pip(*arguments, python=sys.executable, **env) -> str:
    """Return what pip and the build in it say."""
    done = attempt(python, "-m", "pip", *arguments, "-v", **env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """A folder with wheels of what a build asks for, and nothing else: what an offline machine has."""
    folder = tmp_path_factory.mktemp("tools")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    requires += ["cmake>=3.22", "ninja"]
    download = (sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "-d")
    done = attempt(*download, folder, *requires)
    if done.returncode:
        # Only a missing index is no fault: a requirement that it does not have is one.
        index = attempt(*download, tmp_path_factory.mktemp("index"), "--no-deps", "pip")
        assert index.returncode, done.stderr[-3000:]
        pytest.skip(f"needs a package index: {index.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Build the sdist of a copy of the checkout, without anything built."""
    copy, out = tmp_path_factory.mktemp("checkout") / "illada", tmp_path_factory.mktemp("sdist")
    anywhere = shutil.ignore_patterns(".git", "build", "dist", ".venv", ".cache", "*.so", "*.egg-info", "__pycache__")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return anywhere(folder, names) | ({"runs", "data"} if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, copy, ignore=ignore)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, copy)
    return next(out.glob("illada-*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist, in a path with a space."""
    folder = tmp_path_factory.mktemp("a path")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def cpu_build(source) -> dict[str, str]:
    """Return the variables of all builds for CPUs: a machine whose nvcc does not work."""
    return {"ILLADA_BUILD_DIR": str(source / "build" / "cpu"), **broken_nvcc(source.parent / "broken")}


@pytest.fixture(scope="module")
def wheel(source, tools, cpu_build, tmp_path_factory) -> Path:
    """Build a wheel in pip's isolated environment, on a machine without a network: nothing but `tools` is needed."""
    out = tmp_path_factory.mktemp("wheel")
    said = pip("wheel", "--no-deps", "--no-index", "--find-links", tools, "-w", out, source, **OFFLINE, **cpu_build)
    assert "illada: no CUDA kernels are built" in " ".join(said.split()) and "Building CXX object" in said
    assert "nvidia-cutlass" not in said and "illada: CUTLASS" not in said
    return next(out.glob("illada-*.whl"))


def make_venv(path: Path) -> Path:
    """A venv that also sees the packages of the interpreter running the tests (torch is large)."""
    run(sys.executable, "-m", "venv", path)
    python = path / "bin" / "python"
    site = next((path / "lib").glob("python*/site-packages"))
    paths = [p for p in sys.path if p.endswith("site-packages")]
    (site / "outer.pth").write_text("\n".join(paths))
    return python


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tracked = set(run("git", "ls-files", cwd=ROOT).split("\n")) if (ROOT / ".git").exists() else set()
    left_out = {".gitignore"}
    missing = {
        name
        for name in tracked - names - left_out
        if name and (ROOT / name).exists() and not name.startswith((".ci/", ".github/"))
    }
    assert not missing
    assert {"CMakeLists.txt", "csrc/include/illada/illada.h", "build_backend/illada_backend.py", "NOTICE"} <= names
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "requirements-docs.txt", "docs/site/mkdocs.yml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_sdist_holds_no_foreign_code(sdist):
    """No header of CUTLASS, and no license of another project outside NOTICE."""
    with tarfile.open(sdist) as archive:
        files = {f.name.split("/", 1)[1]: archive.extractfile(f).read() for f in archive.getmembers() if f.isfile()}
    foreign = ("cutlass/", "cute/", "cutlass_library/", "third_party/", "pybind11/")
    assert not [name for name in files if any(f"/{part}" in f"/{name}" for part in foreign)]
    notice = re.compile(rb"SPDX-License-Identifier|Redistribution and use|Copyright \(c\)")
    assert {name for name, text in files.items() if notice.search(text)} == {"NOTICE", "tests/builds/test_packaging.py"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"illada", f"illada-{illada.__version__}.dist-info"}
    assert any(name.startswith("illada/_C.") for name in names) and "illada/py.typed" in names
    assert {Path(name).suffix for name in names if name.startswith("illada/")} == {
        ".py", ".so", ".typed", ".toml", ".json",
    }  # fmt: skip
    assert {"illada/benchmarks/__main__.py", "illada/benchmarks/predicted.json", "illada/configs/demo.toml"} <= set(
        names
    )
    licenses = {name.split("/", 1)[1] for name in names if "/licenses/" in name}
    assert licenses == {"licenses/LICENSE", "licenses/NOTICE"}


def test_modules_name_no_path_of_the_build(wheel, source, request):
    """Lines of source in CUDA kernels would, as would __FILE__."""
    with zipfile.ZipFile(wheel) as archive:
        modules = [archive.read(next(name for name in archive.namelist() if name.endswith(".so")))]
    if not needs_nvcc.args[0]:
        modules.append(request.getfixturevalue("cuda_install").module().read_bytes())
    for module in modules:
        assert str(source).encode() not in module and b"/csrc/" not in module


def test_wheel_installs_imports_and_uninstalls(wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    code = (
        "import illada, torch; assert illada.build_info()['version'] == illada.__version__;"
        "print(illada.sample_tokens(torch.eye(3)).token.tolist(), illada.__file__)"
    )
    out = run(python, "-c", code, cwd=tmp_path)
    assert out.startswith("[0, 1, 2]") and "venv" in out
    program = tmp_path / "venv" / "bin" / "illada"
    assert 'preset = "tiny"' in run(program, "train", "demo", "--print-config", cwd=tmp_path)
    listed = run(program, "benchmark", "all", "--device", "cpu", "--quick", "--list", cwd=tmp_path)
    assert "cases of overhead on cpu:" in listed and "cases of train-step on cpu:" in listed
    options = ["attention", "--seqlens", "5,9", "--heads", "2", "--repeats", "1", "--json", "o.jsonl"]
    assert "fwd 5+9 2/2 D64" in run(program, "benchmark", *options, "--device", "cpu", cwd=tmp_path)
    run(python, "-m", "pip", "uninstall", "-y", "illada")
    assert not list((tmp_path / "venv").rglob("*illada*"))


def test_installing_again_and_editable(wheel, source, tools, cpu_build, tmp_path):
    """In the folder of the wheel's build, whose isolated tools are gone; a module that was deleted since is not installed."""
    python = make_venv(tmp_path / "venv")
    (old,) = source.glob("build/lib*/illada")
    (old / "deleted.py").touch()
    options = ["--no-deps", "--no-index", "--find-links", tools]
    said = pip("install", *options, "--force-reinstall", source, python=python, **cpu_build)
    assert "illada.dir/csrc" not in said  # nothing of the library is compiled again
    assert not list((tmp_path / "venv").rglob("deleted.py")) and list((tmp_path / "venv").rglob("illada/files.py"))
    said = pip("install", *options, "-e", source, python=python, **cpu_build)
    assert "illada.dir/csrc" not in said
    code = "import illada, torch; print(illada.sample_tokens(torch.eye(2)).token.tolist(), illada.__file__)"
    out = run(python, "-c", code, cwd=tmp_path)
    assert out.startswith("[0, 1]") and str(source) in out


# ------------------------------------------------------------------ `pip install .` in fresh environments with an nvcc


@dataclass
class Installed:
    """An environment, what was said while illada was installed there, and where its headers came from."""

    folder: Path
    said: str
    headers: Path

    def module(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages/illada/_C*.so"))

    def info(self) -> str:
        return run(self.folder / "bin" / "illada", "info", cwd=self.folder)


def cutlass_in(said: str) -> tuple[str, Path]:
    """The version and the folder of the headers, as the build said."""
    found = re.search(r"illada: CUTLASS (\S+) in (.*)", said)
    return found[1], Path(found[2])


@pytest.fixture(scope="module")
def cuda_build(source) -> dict[str, str]:
    """Return the variables of all builds with CUDA, in the path with a space."""
    return {"ILLADA_CUDA": "on", "ILLADA_CUDA_ARCHS": "80-virtual", "ILLADA_BUILD_DIR": str(source / "build" / "cuda")}


@pytest.fixture(scope="module")
def cuda_install(source, tools, cuda_build, tmp_path_factory) -> Installed:
    """Install with nvcc and network, in pip's isolated environment; no package and no headers were there before."""
    folder = tmp_path_factory.mktemp("cuda") / "venv"
    python = make_venv(folder)
    said = pip("install", "--no-deps", source, python=python, **cuda_build)
    return Installed(folder, said, cutlass_in(said)[1])


@needs_nvcc
def test_install_with_nvcc_and_network(cuda_install, source):
    """The headers are fetched, without their dependencies, and stay in the build folder."""
    assert "illada: fetching the headers of nvidia-cutlass" in cuda_install.said
    version, headers = cutlass_in(cuda_install.said)
    assert headers == source / "build/cuda" / TAG / "nvidia-cutlass/cutlass_library/source/include"
    info = cuda_install.info()  # with no driver on this machine, most likely
    assert re.search(rf"^cutlass +{re.escape(version)}$", info, re.MULTILINE) and int(version.split(".")[0]) >= 4
    assert re.search(r"^cuda archs +.*80-virtual", info, re.MULTILINE)
    assert re.search(r"^cuda toolkit +\d", info, re.MULTILINE)
    site = cuda_install.module().parent.parent
    assert not {"cutlass_library", "scipy", "networkx", "cuda"} & {path.name for path in site.iterdir()}
    assert not list(cuda_install.module().parent.rglob("*.h*"))


@needs_nvcc
def test_install_with_nvcc_and_headers_and_no_network(cuda_install, source, tools, cuda_build, tmp_path):
    python = make_venv(tmp_path / "venv")
    env = {**OFFLINE, **cuda_build, "ILLADA_CUTLASS_DIR": str(cuda_install.headers)}
    said = pip("install", "--no-deps", "--no-index", "--find-links", tools, source, python=python, **env)
    installed = Installed(tmp_path / "venv", said, cuda_install.headers)
    assert cutlass_in(said)[1] == cuda_install.headers and "fetching" not in said
    assert "Building CUDA object" in cuda_install.said
    assert "Building CUDA object" not in said  # the same headers: no second build
    version = cutlass_in(said)[0]
    assert re.search(rf"^cutlass +{re.escape(version)}$", installed.info(), re.MULTILINE)


@needs_nvcc
def test_install_with_nvcc_and_neither(source, tools, tmp_path):
    """The message, within seconds, and nothing from a compiler."""
    python = make_venv(tmp_path / "venv")
    options = ["--no-deps", "--no-index", "--find-links", tools]
    began = time.monotonic()
    env = {**OFFLINE, "ILLADA_BUILD_DIR": str(tmp_path / "build")}
    env |= {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}  # no wheel of CUTLASS that this machine has
    done = attempt(python, "-m", "pip", "install", *options, source, **env)
    assert done.returncode != 0 and time.monotonic() - began < 300
    said = " ".join((done.stdout + done.stderr).split())
    assert "illada: the CUDA kernels need the headers of CUTLASS 4.0 or newer, and there are none" in said
    assert "They could not be fetched either: ERROR: Could not find a version that satisfies" in said
    assert "ILLADA_CUTLASS_DIR=/path/to/cutlass" in said and "pip install --no-deps 'nvidia-cutlass>=4.0,<5'" in said
    assert not re.search(r"\.(cu|cuh|cpp|h)[:(]\d+", said) and not list((tmp_path / "build").rglob("*.cu.o"))


def test_install_with_an_nvcc_that_does_not_work(wheel, source, tmp_path):
    """The wheel's fixture says how it was built; what is installed says why it has no CUDA kernels."""
    python = make_venv(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, **NOWHERE)
    info = run(tmp_path / "venv" / "bin" / "illada", "info", cwd=tmp_path)
    reason = f'{source.parent}/broken/nvcc was found and does not work: nvcc fatal: Unsupported compiler "g++"'
    assert re.search(r"^cutlass +none$", info, re.MULTILINE)
    assert f"none: this build has no CUDA kernels ({reason})" in info


@needs_nvcc
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs nm and readelf of binutils")
def test_cuda_module_keeps_its_runtime_to_itself(cuda_install):
    """A static libcudart that nobody else can bind to, whatever runtime torch brings into the process."""
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", cuda_install.module()).splitlines()]
    assert [name for name in exported if not name.startswith("_")] == ["PyInit__C"]
    assert not [name for name in exported if "cuda" in name.lower() or "illada" in name]
    needed = [line for line in run("readelf", "-d", cuda_install.module()).splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line]


ASK = """
import json, os, sys
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv

with DefaultIsolatedEnv() as env:
    env.install({"setuptools>=77"})
    builder = ProjectBuilder.from_isolated_env(env, sys.argv[1])
    for more in json.loads(sys.argv[2]):
        before = dict(os.environ)
        os.environ.update(more)
        for kind in ("wheel", "editable", "sdist"):  # the machine may lack cmake and ninja
            asked = builder.get_requires_for_build(kind)
            print("asked:", sorted(name for name in asked if not name.startswith(("cmake", "ninja"))))
        os.environ.clear()
        os.environ.update(before)
"""


@needs_nvcc
def test_what_the_backend_asks_for(source, tools):
    """Through a frontend whose environments have no pip: there the backend asks for one, to fetch headers."""
    machines = [{}, {"ILLADA_CUDA": "off"}, {"ILLADA_CUTLASS_DIR": "/some/where"}]
    said = run(sys.executable, "-c", ASK, source, json.dumps(machines))
    assert re.findall("asked: (.*)", said) == ["['pip']", "['pip']", "[]", *["[]"] * 6]


@pytest.mark.parametrize("cuda", ["off", pytest.param("on", marks=needs_nvcc)])
def test_cpp_library_and_example(wheel, source, tmp_path, cuda, request):
    """Configured anew where the package was built, which need not be compiled again."""
    prefix = tmp_path / "prefix"
    options = [f"-DILLADA_CUDA={cuda}", f"-DCMAKE_INSTALL_PREFIX={prefix}", "-G", "Ninja"]
    build = source / "build" / ("cuda" if cuda == "on" else "cpu") / TAG
    if cuda == "on":
        headers = request.getfixturevalue("cuda_install").headers
        options += ["-DILLADA_CUDA_ARCHS=80-virtual", f"-DILLADA_CUTLASS_DIR={headers}"]
    if ccache := shutil.which("ccache", path=environment()["PATH"]):  # as setup.py does
        options += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]
    (build / "CMakeCache.txt").unlink()
    run("cmake", "-S", source, "-B", build, "-DILLADA_PYTHON=OFF", *options)
    said = run("cmake", "--build", build, "--parallel", "2")
    assert "attention.cpp" not in said and "remask.cu" not in said
    run("cmake", "--install", build)
    assert list(prefix.glob("share/doc/illada/NOTICE"))
    for kernels in build.rglob("row_kernels_avx*.o"):  # nothing in there may be taken for a copy that any CPU can run
        defined = re.findall(r"^\S+ [TVWDu] (.*)", run("nm", "-C", kernels), re.MULTILINE)
        assert defined and not [name for name in defined if "avx" not in name.lower()]
    if cuda == "on":  # the kernels are in the library itself, not in object files that stay behind
        members = run("ar", "t", next(prefix.glob("lib*/libillada.a"))).split()
        assert {"sample_tokens.cu.o", "remask.cu.o", "device.cpp.o"} <= set(members)
    example = tmp_path / "example"
    run("cmake", "-S", source / "examples" / "cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", example)
    out = run(example / "remask_step", ILLADA_CPU_ISA="baseline")
    assert out == f"illada {illada.__version__} on baseline: 5 5 2 3 (2 committed)\n"


def test_pip_says_why_there_is_no_cuda_build(source, tmp_path):
    """What somebody names must work."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = attempt(*command, ILLADA_BUILD_DIR=str(tmp_path / "build"), CUDACXX="/nonexistent/nvcc")
    assert done.returncode != 0 and "/nonexistent/nvcc does not work. It says:" in one_line(done)
    assert "Set CUDACXX=/path/to/another/nvcc, or ILLADA_CUDA=off for a CPU build." in one_line(done)


@needs_nvcc
def test_toolkit_laid_out_as_wheels_have_it(source, tmp_path):
    """lib and no lib64, libcudart.so.13 and no libcudart.so."""
    said = attempt(os.environ.get("CUDACXX") or "nvcc", "--dryrun", "-x", "cu", "/dev/null").stderr
    toolkit, wheel = Path(re.search(r"_HERE_=(.*)", said)[1]).parent, tmp_path / "nvidia" / "cu"
    for header in ("cutlass/version.h", "cute/tensor.hpp"):
        (tmp_path / header).parent.mkdir()
        (tmp_path / header).write_text("".join(f"#define CUTLASS_{part} 4\n" for part in ("MAJOR", "MINOR", "PATCH")))
    for folder in ("bin", "nvvm", "include"):
        shutil.copytree(toolkit / folder, wheel / folder, copy_function=os.symlink)
    profile = (toolkit / "bin" / "nvcc.profile").read_text()
    (wheel / "bin" / "nvcc.profile").unlink()
    (wheel / "bin" / "nvcc.profile").write_text(re.sub(r"/\$\(_TARGET_DIR_\)|\$\(_TARGET_SIZE_\)", "", profile))
    (wheel / "lib").mkdir()
    for library in ("libcudart_static.a", "libcudadevrt.a", "libcudart.so"):
        (wheel / "lib" / library).symlink_to((toolkit / "lib64" / library).resolve())
    major = re.search(r"release (\d+)", run(wheel / "bin" / "nvcc", "--version"))[1]
    (wheel / "lib" / "libcudart.so").rename(wheel / "lib" / f"libcudart.so.{major}")
    options = ["-DILLADA_PYTHON=OFF", "-DILLADA_CUDA=on", "-DILLADA_CUDA_ARCHS=80-virtual", "-G", "Ninja"]
    options += ["-DILLADA_CUDART=shared", f"-DILLADA_CUTLASS_DIR={tmp_path}"]
    run("cmake", "-S", source, "-B", tmp_path / "b", *options, CUDACXX=str(wheel / "bin" / "nvcc"))
    cache = (tmp_path / "b" / "CMakeCache.txt").read_text()
    for library in (f"libcudart.so.{major}", "libcudart_static.a"):
        assert re.search(rf"^CUDA_cudart\w*_LIBRARY:FILEPATH={wheel}/lib/{library}$", cache, re.MULTILINE)
