"""The test matrix of builds: compilers, generators, CMakes, Pythons, options right and wrong. `make test-build` runs all of it,
`make test-slow` what configures alone; tests/builds/test_packaging.py builds, installs and runs the package for CPUs and for CUDA.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from building import ROOT, attempt, broken_nvcc, environment, needs_nvcc, one_line, run

# CUTLASS's headers as far as a configure looks at them.
HEADERS = {
    "cutlass/version.h": "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n",
    "cute/tensor.hpp": "",
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cutlass")
    for name, text in HEADERS.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def configure(tmp_path, headers):
    """Return a function that configures the C++ library, with Ninja if it is installed and no generator is given."""

    def one(*options: str, cmake="cmake", **env):
        ninja = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) and "-G" not in options else []
        common = ["-S", ROOT, "-B", tmp_path / "build", "-DILLADA_PYTHON=OFF", f"-DILLADA_CUTLASS_DIR={headers}"]
        return attempt(cmake, *common, *ninja, *options, **env)

    return one


def build(folder: Path) -> str:
    return run("cmake", "--build", folder, "--parallel", "2", "--verbose")


def warnings(said: str) -> int:
    return len(re.findall(r"warning:|CMake Warning|Could NOT", said))


def compiler_without_openmp(folder: Path) -> str:
    script = folder / "c++ without OpenMP"
    script.write_text(
        '#!/bin/sh\nfor a; do case "$a" in -[fX]*openmp) echo "no such option" >&2; exit 1;; esac; done\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def found(*names: str) -> list:
    """Return the programs of `names` that work here, as parameters; the others are skipped, by name."""
    here = {name for name in names if shutil.which(name) and attempt(name, "--version").returncode == 0}
    return [pytest.param(name, marks=pytest.mark.skipif(name not in here, reason=f"no {name}")) for name in names]


# ------------------------------------------------------------------ configured alone, in CI


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
def test_for_cpus(configure, generator):
    done = configure("-G", generator, "-DILLADA_CUDA=off")
    assert done.returncode == 0 and warnings(done.stdout + done.stderr) == 0
    assert "illada: building for the CPU: ILLADA_CUDA=off" in done.stdout


@pytest.mark.slow
def test_without_openmp_one_warning(configure, tmp_path):
    done = configure("-DILLADA_CUDA=off", CXX=compiler_without_openmp(tmp_path))
    assert done.returncode == 0 and warnings(done.stdout + done.stderr) == 1
    assert "illada: this compiler has no OpenMP, the CPU ops will use one thread" in one_line(done)
    written = (tmp_path / "build/illada-warnings.txt").read_text()  # what setup.py shows on the terminal
    assert written == "illada: this compiler has no OpenMP, the CPU ops will use one thread\n"


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_an_nvcc_that_does_not_work(configure, tmp_path, wanted):
    names = ("CUDACXX", "CUDAHOSTCXX", "CUDA_HOME", "CUDA_PATH")
    done = configure(f"-DILLADA_CUDA={wanted}", **broken_nvcc(tmp_path / "broken"), **dict.fromkeys(names, ""))
    assert (done.returncode == 0) == (wanted == "auto")
    assert 'does not work. It says: nvcc fatal: Unsupported compiler "g++"' in one_line(done)
    if not needs_nvcc.args[0] and wanted == "auto":  # a mended nvcc is taken in the same folder
        assert "illada: CUDA " in configure("-DILLADA_CUDA_ARCHS=80-virtual").stdout


@pytest.mark.slow
@needs_nvcc
def test_a_host_compiler_that_does_not_work(configure):
    done = configure(CUDAHOSTCXX="/nonexistent/g++")
    assert done.returncode != 0 and "CUDAHOSTCXX asks for CUDA kernels" in one_line(done)
    assert "/nonexistent/g++" in one_line(done).split("It says:")[1]


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "options, env, archs, cudart",
    [
        (["-DILLADA_CUDA_ARCHS=80-virtual"], {}, "80-virtual", "static"),
        (["-DILLADA_CUDART=shared"], {"TORCH_CUDA_ARCH_LIST": "7.5 9.0"}, "90a-real", "shared"),
    ],
)
def test_with_cuda(configure, options, env, archs, cudart):
    done = configure(*options, **env)
    assert done.returncode == 0, one_line(done)
    assert re.search(rf"illada: CUDA \d+\.\d\S* for {archs}, cudart {cudart}\n", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option, said",
    [
        ("ILLADA_CUDA=maybe", 'ILLADA_CUDA is "maybe"; allowed are on, off and auto'),
        ("ILLADA_CUDART=both", 'ILLADA_CUDART is "both"; allowed are static and shared'),
        pytest.param(
            "ILLADA_CUDA_ARCHS=75-real",
            'holds "75-real"; the kernels need a GPU of compute capability 8.0 (80) or newer',
            marks=needs_nvcc,
        ),
    ],
)
def test_wrong_options(configure, option, said):
    done = configure(f"-D{option}")
    assert done.returncode != 0 and said in one_line(done)


# ------------------------------------------------------------------ compiled, or with what is fetched: `make test-build`


@pytest.mark.builds
@pytest.mark.parametrize("version", ["3.22.*", ">=4"])
@pytest.mark.parametrize("cuda", ["off", pytest.param("auto", marks=needs_nvcc)])
def test_oldest_and_newest_cmake(configure, tmp_path, version, cuda):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    operator = "" if version.startswith(">") else "=="
    run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", f"cmake{operator}{version}")
    done = configure(f"-DILLADA_CUDA={cuda}", "-DILLADA_CUDA_ARCHS=80-virtual", cmake=tmp_path / "venv/bin/cmake")
    assert done.returncode == 0, one_line(done)


@pytest.mark.builds
@pytest.mark.parametrize("compiler", found("g++", "g++-9", "g++-10", "g++-11", "clang++", "clang++-14", "clang++-19"))
def test_compilers(configure, tmp_path, compiler):
    """Without a warning, and the example's result."""
    assert configure("-DILLADA_CUDA=off", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}", CXX=compiler).returncode == 0
    assert warnings(build(tmp_path / "build")) == 0
    run_the_example(tmp_path, CXX=compiler)


@pytest.mark.builds
def test_without_openmp(configure, tmp_path):
    compiler = compiler_without_openmp(tmp_path)
    prefix = f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}"
    assert configure("-DILLADA_CUDA=off", prefix, CXX=compiler).returncode == 0
    assert warnings(build(tmp_path / "build")) == 0  # the configure has said it
    run_the_example(tmp_path, CXX=compiler)


def run_the_example(folder: Path, **env) -> None:
    run("cmake", "--install", folder / "build")
    example = folder / "example"
    run("cmake", "-S", ROOT / "examples/cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={folder / 'prefix'}", **env)
    run("cmake", "--build", example)
    assert "5 5 2 3 (2 committed)" in run(example / "remask_step")


@pytest.mark.builds
@needs_nvcc
def test_one_arch(tmp_path):
    """Machine code for one GPU, by pip, with fetched headers."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT]
    run(*command, ILLADA_CUDA="on", ILLADA_CUDA_ARCHS="80-real", ILLADA_BUILD_DIR=str(tmp_path / "build"))
    (module,) = (tmp_path / "build").glob("*/_C.*.so")
    assert b"sm_80" in module.read_bytes() and str(ROOT).encode() not in module.read_bytes()


@pytest.mark.builds
def test_two_pythons_in_one_folder(tmp_path):
    """Each has its own part, and finds it again: nothing is compiled a second time."""
    names = ("python3.11", "python3.12", "python3.13", "python3.14")
    pythons = [name for name in names if shutil.which(name) and attempt(name, "-m", "pip", "--version").returncode == 0]
    if len(pythons) < 2:
        pytest.skip(f"needs two of {', '.join(names)} with pip")
    env = {"ILLADA_CUDA": "off", "ILLADA_BUILD_DIR": str(tmp_path / "build")}
    for python in (*pythons[:2], pythons[0]):
        said = attempt(python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, ROOT, **env)
        assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    assert "attention.cpp" not in said.stdout
    tags = [python.replace("python3.", "cpython-3") for python in pythons[:2]]
    assert sorted(os.listdir(tmp_path / "build")) == tags and len(list(tmp_path.glob("*.whl"))) == 2


@pytest.mark.builds
@pytest.mark.skipif(
    not os.environ.get("ILLADA_TORCHES"), reason="ILLADA_TORCHES names no interpreters of other torches"
)
def test_one_wheel_for_every_torch(tmp_path):
    """Each public op in each torch whose interpreter is named; built once, installed once."""
    build = {"ILLADA_CUDA": "off", "ILLADA_BUILD_DIR": str(tmp_path / "build")}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT, **build)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "installed", wheel)
    for python in os.environ["ILLADA_TORCHES"].split():
        said = run(python, ROOT / "tests/helpers/every_op.py", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
        assert re.search(rf"^every op \d\S+ {re.escape(str(tmp_path))}/installed/", said, re.MULTILINE), said
