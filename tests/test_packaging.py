"""The package as users meet it: wheel and sdist, second and editable install, uninstall, the C++ library."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import illada

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")]


def environment(**more):
    """Without a checkout on the path; tools that are installed beside this Python come first."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ILLADA_BUILD_DIR", "CMAKE_ARGS")}
    return {**clean, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **more}


def run(*command, cwd=None, **env):
    """A command that must succeed; its output."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment(**env), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout in a path with a space, without anything built."""
    copy = tmp_path_factory.mktemp("a path") / "illada"
    ignore = shutil.ignore_patterns(
        ".git", "build", "dist", ".venv", ".cache", "runs", "data", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, source)
    return next(out.glob("illada-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, in pip's isolated environment, without CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, sdist, ILLADA_CUDA="off")
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
    left_out = {".gitignore", ".clang-format"}
    missing = {
        name
        for name in tracked - names - left_out
        if name and (ROOT / name).exists() and not name.startswith((".ci/", "benchmarks/results/"))
    }
    assert not missing
    assert {"CMakeLists.txt", "csrc/include/illada/illada.h", "cmake/IlladaFlags.cmake", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"illada", f"illada-{illada.__version__}.dist-info"}
    assert any(name.startswith("illada/_C.") for name in names) and "illada/py.typed" in names


def test_wheel_installs_imports_and_uninstalls(wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    code = (
        "import illada, torch; assert illada.build_info()['version'] == illada.__version__;"
        "print(illada.sample_tokens(torch.eye(3)).token.tolist(), illada.__file__)"
    )
    out = run(python, "-c", code, cwd=tmp_path)
    assert out.startswith("[0, 1, 2]") and "venv" in out
    run(python, "-m", "pip", "uninstall", "-y", "illada")
    assert not list((tmp_path / "venv").rglob("*illada*"))


def test_installing_twice_and_editable(source, tmp_path):
    python = make_venv(tmp_path / "venv")
    for _ in range(2):  # the second build meets the first one's folder, whose isolated tools are gone
        run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", source, ILLADA_CUDA="off")
    run(python, "-m", "pip", "install", "--no-deps", "-e", source, ILLADA_CUDA="off")
    code = "import illada, torch; print(illada.sample_tokens(torch.eye(2)).token.tolist(), illada.__file__)"
    out = run(python, "-c", code, cwd=tmp_path)
    assert out.startswith("[0, 1]") and str(source) in out


needs_nvcc = pytest.mark.skipif(
    shutil.which(os.environ.get("CUDACXX") or "nvcc") is None, reason="needs nvcc: set CUDACXX or PATH"
)


@pytest.fixture(scope="module")
def cuda_wheel(sdist, tmp_path_factory) -> Path:
    """With CUDA kernels for one arch, from the sdist, in pip's isolated environment."""
    out = tmp_path_factory.mktemp("cuda wheel")
    env = {"ILLADA_CUDA": "on", "ILLADA_CUDA_ARCHS": "90a-real", "ILLADA_CUDART": "static"}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, sdist, **env)
    return next(out.glob("illada-*.whl"))


@needs_nvcc
def test_cuda_wheel_says_what_it_has(cuda_wheel, tmp_path):
    python = make_venv(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", cuda_wheel)
    code = "import illada; info = illada.build_info(); print(info['cuda_archs'], 'CUDA', info['cuda_version'])"
    out = run(python, "-c", code, cwd=tmp_path)  # with no driver on this machine, most likely
    assert out.startswith("90a-real CUDA ") and out.split()[-1][0].isdigit()
    assert "90a-real" in run(tmp_path / "venv" / "bin" / "illada", "info", cwd=tmp_path)


@needs_nvcc
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs nm and readelf of binutils")
def test_cuda_wheel_keeps_its_runtime_to_itself(cuda_wheel, tmp_path):
    """A static libcudart that nobody else can bind to, whatever runtime torch brings into the process."""
    with zipfile.ZipFile(cuda_wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.startswith("illada/_C.")]
        module = archive.extract(name, tmp_path)
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", module).splitlines()]
    assert [name for name in exported if not name.startswith("_")] == ["PyInit__C"]
    assert not [name for name in exported if "cuda" in name.lower() or "illada" in name]
    needed = [line for line in run("readelf", "-d", module).splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "cuda" in line]


@pytest.mark.parametrize("cuda", ["off", pytest.param("on", marks=needs_nvcc)])
def test_cpp_library_and_example(source, tmp_path, cuda):
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    options = [f"-DILLADA_CUDA={cuda}", "-DILLADA_CUDA_ARCHS=80-real", f"-DCMAKE_INSTALL_PREFIX={prefix}"]
    run("cmake", "-S", source, "-B", build, "-DILLADA_PYTHON=OFF", *options)
    run("cmake", "--build", build, "--parallel", "2")
    run("cmake", "--install", build)
    if cuda == "on":  # the kernels are in the library itself, not in object files that stay behind
        members = run("ar", "t", next(prefix.glob("lib*/libillada.a"))).split()
        assert {"sample_tokens.cu.o", "remask.cu.o", "device.cpp.o"} <= set(members)
    example = tmp_path / "example"
    run("cmake", "-S", source / "examples" / "cpp", "-B", example, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", example)
    out = run(example / "remask_step", ILLADA_CPU_ISA="baseline")
    assert out == f"illada {illada.__version__} on baseline: 5 5 2 3 (2 committed)\n"


@pytest.mark.parametrize(
    "wanted,works,said",
    [
        ("auto", True, "no nvcc found, building for the CPU"),
        ("on", False, "or ILLADA_CUDA=off for a CPU build"),
        ("maybe", False, "allowed are on, off and auto"),
    ],
)
def test_without_a_cuda_toolkit(source, tmp_path, wanted, works, said):
    command = ["cmake", "-S", str(source), "-B", str(tmp_path / "b"), "-DILLADA_PYTHON=OFF", f"-DILLADA_CUDA={wanted}"]
    env = environment(CUDACXX="/nonexistent/nvcc")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == works and said in " ".join((done.stdout + done.stderr).split())


def test_pip_says_why_there_is_no_cuda_build(source):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "unused", str(source)]
    env = environment(ILLADA_CUDA="on", CUDACXX="/nonexistent/nvcc")
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "ILLADA_CUDA=on, but no working nvcc was found" in said and "Set CUDACXX=/path/to/nvcc" in said


@needs_nvcc
@pytest.mark.parametrize(
    "option,said",
    [
        (
            "ILLADA_CUDA_ARCHS=sm_90",
            'ILLADA_CUDA_ARCHS holds "sm_90"; entries look like 80-real, 90a-real or 90-virtual',
        ),
        ("ILLADA_CUDA_ARCHS=80-real;90a", 'ILLADA_CUDA_ARCHS holds "90a"'),
        ("ILLADA_CUDART=both", 'ILLADA_CUDART is "both"; allowed are static and shared'),
    ],
)
def test_wrong_build_options(source, tmp_path, option, said):
    command = ["cmake", "-S", str(source), "-B", str(tmp_path / "b"), "-DILLADA_PYTHON=OFF", f"-D{option}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0 and said in " ".join((done.stdout + done.stderr).split())
