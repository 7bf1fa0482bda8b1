"""What setup.py says before it builds anything."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# As much of setuptools as setup.py imports; `setup` says that it was reached.
FAKE = {
    "setuptools/__init__.py": "__version__ = {version!r}\nclass Extension:\n    def __init__(self, *_, **__): ...\n"
    "def setup(**_):\n    print('setup was called')\n",
    "setuptools/command/__init__.py": "",
    "setuptools/command/build_ext.py": "class build_ext: ...\n",
    "setuptools/command/build_py.py": "class build_py: ...\n",
}


def run_setup(folder: Path, version: str) -> subprocess.CompletedProcess:
    for name, text in FAKE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.format(version=version))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["59.6.0", "68.1.2", "75.3.0.post0", "76.1.0"])
def test_old_setuptools_is_refused(version, tmp_path):
    """Python's own `ensurepip` and many distributions have one; it would fail over pyproject.toml's license."""
    done = run_setup(tmp_path, version)
    assert done.returncode == 1 and "setup was called" not in done.stdout
    first, second = done.stderr.splitlines()
    assert first == f"illada: setuptools {version} was found in {tmp_path}; 77 or newer is needed."
    assert second.startswith(f"Run `{sys.executable} -m pip install 'setuptools>=77'`")


@pytest.mark.parametrize("version", ["77.0.0", "80.9.0", "100.1.0"])
def test_new_setuptools_is_used(version, tmp_path):
    done = run_setup(tmp_path, version)
    assert (done.returncode, done.stdout, done.stderr) == (0, "setup was called\n", "")


@pytest.mark.parametrize(
    "cmake, ninja, generator, asked",
    [
        ("echo cmake version 3.22.0", "echo 1.10.2", "", []),
        ("echo cmake version 3.31.6-rc1", "echo 1.13.0.git.kitware", "", []),
        ("echo cmake version 4.1.0", None, "", ["ninja"]),
        ("echo cmake version 4.1.0", None, "Unix Makefiles", []),
        ("echo cmake version 3.21.9", "echo 1.10.2", "", ["cmake>=3.22"]),
        ("echo pyenv: cmake: command not found >&2; exit 127", "exit 1", "", ["cmake>=3.22", "ninja"]),
        (None, None, "", ["cmake>=3.22", "ninja"]),
    ],
)
def test_cmake_and_ninja_are_asked_for_where_they_are_absent(cmake, ninja, generator, asked, tmp_path):
    """So that `python -m build --no-isolation` takes those of the system."""
    for name, body in (("cmake", cmake), ("ninja", ninja)):
        if body:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import illada_backend; "
    code += "print(illada_backend.requires())"
    environment = {"PATH": str(tmp_path), "ILLADA_CUDA": "off", "CMAKE_GENERATOR": generator}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{asked}\n"


def test_pyproject_asks_for_the_same():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert "setuptools>=77" in required


def ask(folder: Path, code: str, **more: str) -> list:
    """Return what `code`, run after setup.py, appends to `said`."""
    run_setup(folder, "80.9.0")
    program = f"import json, runpy; s = runpy.run_path({str(ROOT / 'setup.py')!r}); said = []\n{code}\n"
    program += "print(json.dumps(said))"
    environment = {**os.environ, "PYTHONPATH": str(folder), **more}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["ILLADA_CUDA", "ILLADA_CUDA_ARCHS", "CXX", "CXXFLAGS", "CUDACXX", "CMAKE_GENERATOR"])
def test_a_build_by_other_choices_begins_anew(name, tmp_path):
    """CMake's cache would keep the earlier build's compiler, flags and options, without a word."""
    code = f"""
from pathlib import Path
import os
build = Path({str(tmp_path / "build")!r})
(build / "CMakeFiles").mkdir(parents=True)
(build / "nvidia-cutlass").mkdir()
for value in ("one", "one", "other"):
    os.environ[{name!r}] = value
    s["forget_other_build"](build, s["build_choices"](""))
    said.append((build / "CMakeCache.txt").exists())
    (build / "CMakeCache.txt").touch()
said.append((build / "nvidia-cutlass").exists())
"""
    assert ask(tmp_path, code) == [False, True, False, True]


CMAKE = """#!{python}
import pathlib, sys, sysconfig
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(arguments, file=log)
if "-B" in arguments:
    build = pathlib.Path(arguments[arguments.index("-B") + 1])
    print(["cache", (build / "CMakeCache.txt").exists()], file=open({log!r}, "a"))
    (build / "CMakeCache.txt").touch()
    (build / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).touch()
"""


def test_a_cache_is_used_by_the_same_build_alone(tmp_path):
    """A build, the same again with another ninja, in a moved tree, and with other options: a stand-in for cmake logs."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    log, tree, tools = tmp_path / "log", tmp_path / "tree", tmp_path / "tools"
    for folder in (tree / "python" / "illada", tools, tmp_path / "other"):
        folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "build_backend", tree / "build_backend")
    (tree / "python" / "illada" / "__init__.py").touch()
    (tools / "cmake").write_text(CMAKE.format(python=sys.executable, log=str(log)))
    for program in (tools / "cmake", tools / "ninja", tmp_path / "other" / "ninja"):
        program.touch()
        program.chmod(0o755)

    def build(tree: Path, tools_first: Path = tools, **more: str) -> tuple[list[str], bool]:
        log.unlink(missing_ok=True)
        path = f"{tools_first}:{tools}:/usr/bin:/bin"
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("ILLADA_", "CMAKE_", "CUDA"))
        }
        command = [sys.executable, "setup.py", "-q", "build"]
        subprocess.run(command, cwd=tree, env={**clean, "ILLADA_CUDA": "off", "PATH": path, **more}, check=True)
        configure, cache, _ = (ast.literal_eval(line) for line in log.read_text().splitlines())
        return configure, cache[1]

    configure, cache = build(tree)
    for option in ("ILLADA_PYTHON=ON", "ILLADA_CUDA=off", f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}"):
        assert f"-D{option}" in configure
    assert cache is False
    (tree / "python" / "illada" / "new.py").touch()
    configure, cache = build(tree, tmp_path / "other")  # pip's isolated ninja is another each time
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path / 'other' / 'ninja'}" in configure and cache is True
    (tree / "python" / "illada" / "new.py").unlink()
    assert [build(tree, CXXFLAGS="-O2")[1], build(tree, CXXFLAGS="-O2")[1]] == [False, True]
    assert build(tree, ILLADA_CUDA="auto", CXXFLAGS="-O2")[1] is False
    assert build(tree, CXXFLAGS="-O2")[1] is False
    modules = {path.name for path in tree.glob("build/lib*/illada/*.py")}
    assert modules == {"__init__.py"}  # and not what was deleted
    moved = tree.rename(tmp_path / "moved")
    configure, cache = build(moved, CXXFLAGS="-O2")
    assert cache is False and str(tree) not in " ".join(configure)


@pytest.mark.parametrize(
    "files, process, gigabytes",
    [
        ({"memory.max": 2}, "0::/", 2),
        ({"memory.max": "max"}, "0::/", None),
        ({"a slice/memory.max": 3, "a slice/job/memory.max": "max"}, "0::/a slice/job", 3),  # the limit is further out
        ({"memory.max": 4, "a/memory.max": 3, "a/job/memory.max": 2}, "0::/a/job", 2),
        ({"a/memory.max": 2}, "0::/b", None),
        ({"memory/docker/x/memory.limit_in_bytes": 2}, "1:name=systemd:/\n7:memory:/docker/x", 2),
        ({"memory/memory.limit_in_bytes": 2}, "7:memory:/docker/of/the/host", 2),
    ],
)
def test_jobs_read_the_memory_of_the_container(files, process, gigabytes, tmp_path):
    code = f"""
from pathlib import Path
import os
s["memory_limit"].__globals__.update(CGROUP=Path({str(tmp_path)!r}), PROC_CGROUP=Path({str(tmp_path / "cgroup")!r}))
said += [s["memory_limit"](), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
"""
    (tmp_path / "cgroup").write_text(process + "\n")
    for name, limit in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit * 10**9 if isinstance(limit, int) else limit}\n")
    found, machine = ask(tmp_path, code)
    assert found == (gigabytes * 10**9 if gigabytes else machine)


def test_each_kind_of_python_has_its_own_folder(tmp_path):
    code = """
import os, sys
said += [str(s["build_folder"]("build/temp")), os.getcwd()]
os.environ["ILLADA_BUILD_DIR"] = "kept"
said += [str(s["build_folder"]("build/temp")), sys.implementation.cache_tag + sys.abiflags]
"""
    default, here, kept, tag = ask(tmp_path, code)
    assert default == f"{here}/build/temp/cmake" and kept == f"{here}/kept/{tag}"


def test_warnings_reach_a_terminal_that_pip_hides(tmp_path):
    code = """
from pathlib import Path
file, terminal = Path(FOLDER) / "warnings", Path(FOLDER) / "terminal"
show, places = s["show_warnings"], s["show_warnings"].__globals__
places["TERMINAL"] = str(terminal)
show(file)
said.append(terminal.exists())
file.write_text("illada: no OpenMP\\n")
show(file)
said.append(terminal.read_text())
places["TERMINAL"] = "/nowhere/tty"
show(file)
""".replace("FOLDER", repr(str(tmp_path)))
    assert ask(tmp_path, code) == [False, "\nillada: no OpenMP\n"]


def test_another_compiler_at_the_same_place_begins_anew(tmp_path):
    code = """
import os
said += [s["build_choices"]("") for _ in range(2)]
os.utime(os.environ["CXX"], (1, 1))
said.append(s["build_choices"](""))
said.append(s["build_choices"](os.environ["CXX"]))  # as an nvcc
os.environ["PATH"] = "/nowhere"  # no ninja: CMake's other generator
said.append(s["build_choices"](""))
"""
    for name in ("mine", "ninja"):
        (tmp_path / name).touch(mode=0o755)
    first, again, newer, nvcc, bare = ask(
        tmp_path, code, CXX=str(tmp_path / "mine"), PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert first == again and {name for name in first if first[name] != newer[name]} == {"CXX is"}
    assert newer["nvcc is"] != nvcc["nvcc is"] and newer["ninja"] != bare["ninja"]


# ------------------------------------------------------------------ where an nvcc is

sys.path.insert(0, str(ROOT / "build_backend"))


@pytest.fixture
def nvcc_of(monkeypatch):
    """Return what find_nvcc finds on a machine without a toolkit, in an environment of our choice."""
    import illada_nvcc

    monkeypatch.setattr(illada_nvcc, "USUAL", "/nonexistent")

    def find(prefix="/nonexistent", base="/nonexistent", **environ):
        monkeypatch.setattr(sys, "prefix", str(prefix))
        monkeypatch.setattr(sys, "base_prefix", str(base))
        return illada_nvcc.find_nvcc(environ)

    return find


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def wheels(prefix: Path, cuda="cu13", without="") -> Path:
    """Put NVIDIA's wheels into an environment and return its nvcc."""
    import illada_nvcc

    toolkit = prefix / "lib/python3.11/site-packages/nvidia" / cuda
    for wheel, part in illada_nvcc.PARTS.items():
        if wheel != without:
            put(toolkit / part)
    return put(toolkit / "bin" / "nvcc")


def test_order_of_places(nvcc_of, tmp_path, monkeypatch):
    import illada_nvcc

    places = {"PATH": tmp_path / "path", "CUDA_HOME": tmp_path / "home/bin", "CUDA_PATH": tmp_path / "cuda_path/bin"}
    nvcc = {name: str(put(place / "nvcc")) for name, place in places.items()}
    usual = put(tmp_path / "usual" / "bin" / "nvcc")
    monkeypatch.setattr(illada_nvcc, "USUAL", str(usual.parents[1]))
    venv = tmp_path / "venv"
    last = wheels(venv)
    environ = {"PATH": str(places["PATH"]), "CUDA_HOME": str(places["CUDA_HOME"].parent)}
    environ["CUDA_PATH"] = str(places["CUDA_PATH"].parent)
    assert nvcc_of(venv, **environ, CUDACXX="ccache mine") == "ccache mine"
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        assert nvcc_of(venv, **environ) == nvcc[name]
        del environ[name]
    assert nvcc_of(venv) == str(usual)
    monkeypatch.setattr(illada_nvcc, "USUAL", "/nonexistent")
    assert nvcc_of(venv) == str(last)
    assert nvcc_of() == ""


@pytest.mark.parametrize("how", ["pip", "build", "uv", "VIRTUAL_ENV"])
def test_wheels_of_the_environment_around_an_isolated_one(how, nvcc_of, tmp_path):
    """pip leaves sys.prefix, the others make an environment of their own."""
    venv, made = tmp_path / "venv", tmp_path / "made"
    nvcc = str(wheels(venv))
    (venv / "bin").mkdir()
    activated = {"PATH": f"{made / 'bin'}:{venv / 'bin'}:/usr/bin"}
    environ = {
        "pip": dict(prefix=venv),
        "build": dict(prefix=made, **activated, VIRTUAL_ENV=str(venv)),
        "uv": dict(prefix=made, **activated, VIRTUAL_ENV=str(made)),
        "VIRTUAL_ENV": dict(prefix=made, VIRTUAL_ENV=str(venv)),
    }
    assert nvcc_of(**environ[how]) == nvcc


def test_the_newest_whole_toolkit_of_wheels(nvcc_of, tmp_path, capsys):
    old, newest = wheels(tmp_path), wheels(tmp_path, "cu14")
    assert nvcc_of(tmp_path) == str(newest) and not capsys.readouterr().out
    part = wheels(tmp_path, "cu15", without="nvidia-cuda-cccl")
    assert nvcc_of(tmp_path) == str(newest)
    said = capsys.readouterr().out
    assert said == f"illada: {part} is not used: its toolkit is not complete; `pip install nvidia-cuda-cccl`\n"
    assert old.exists()


@pytest.mark.parametrize(
    "given", ['-DX="a b" -DILLADA_CUDA="off"', "-D ILLADA_CUDA:STRING=off", "-D 'ILLADA_CUDA=off'"]
)
def test_backend_reads_quoted_cmake_args(given):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import illada_backend as b; print(b.option('ILLADA_CUDA'))"
    environment = {**os.environ, "CMAKE_ARGS": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "off"
