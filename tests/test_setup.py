"""What setup.py says before it builds anything."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")

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


def test_pyproject_asks_for_the_same():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert "setuptools>=77" in required


def ask(folder: Path, code: str, **more: str) -> list:
    """What `code`, run after setup.py, appends to `said`."""
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
    s["forget_other_build"](build, s["build_choices"]())
    said.append((build / "CMakeCache.txt").exists())
    (build / "CMakeCache.txt").touch()
said.append((build / "nvidia-cutlass").exists())
"""
    assert ask(tmp_path, code) == [False, True, False, True]


@pytest.mark.parametrize("limit,gigabytes", [("2000000000", 2), ("max", None)])
def test_jobs_read_the_memory_of_the_container(limit, gigabytes, tmp_path):
    code = f"""
from pathlib import Path
import os
s["memory_limit"].__globals__["CGROUP"] = Path({str(tmp_path)!r})
said += [s["memory_limit"](), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
"""
    (tmp_path / "memory.max").write_text(limit + "\n")
    found, machine = ask(tmp_path, code)
    assert found == (gigabytes * 10**9 if gigabytes else machine)


def test_cuda_home_names_an_nvcc(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    code = """
home = {"CUDA_HOME": HOME}
said += [s["with_nvcc"](dict(home)).get("CUDACXX"), s["with_nvcc"]({**home, "CUDACXX": "mine"})["CUDACXX"]]
""".replace("HOME}", f"{str(tmp_path)!r}}}")
    assert ask(tmp_path, code) == [str(tmp_path / "bin" / "nvcc"), "mine"]


@pytest.mark.parametrize(
    "given", ['-DX="a b" -DILLADA_CUDA="off"', "-D ILLADA_CUDA:STRING=off", "-D 'ILLADA_CUDA=off'"]
)
def test_backend_reads_quoted_cmake_args(given):
    code = f"import runpy; b = runpy.run_path({str(ROOT / 'build_backend/illada_backend.py')!r}); print(b['option']('ILLADA_CUDA'))"
    environment = {**os.environ, "CMAKE_ARGS": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "off"
