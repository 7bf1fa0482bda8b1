"""The build of illada._C with CMake.

All metadata is in pyproject.toml; all compilation is in CMakeLists.txt.

Environment: ILLADA_CUDA=on|off|auto, ILLADA_CUDA_ARCHS, ILLADA_CUDART, ILLADA_CUTLASS_DIR, ILLADA_CUTLASS_DOWNLOAD,
ILLADA_BUILD_DIR, MAX_JOBS, CMAKE_ARGS, CMAKE_GENERATOR; CMake's own, such as CXX, CXXFLAGS, CUDACXX and CUDAFLAGS.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from illada_nvcc import find_nvcc  # noqa: E402

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml, whose license fields older ones refuse or misread

# With pip's isolation it is always new enough.
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"illada: setuptools {setuptools.__version__} was found in {Path(setuptools.__file__).parents[1]}; "
        f"{OLDEST_SETUPTOOLS} or newer is needed.\n"
        f"Run `{sys.executable} -m pip install 'setuptools>={OLDEST_SETUPTOOLS}'`, "
        "or build without --no-build-isolation."
    )

PYTHON = f"{sys.implementation.cache_tag}{sys.abiflags}"
CGROUP, PROC_CGROUP, TERMINAL = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/dev/tty")
OPTIONS = ("ILLADA_CUDA", "ILLADA_CUDA_ARCHS", "ILLADA_CUDART", "ILLADA_CUTLASS_DOWNLOAD")
# What CMake reads when a cache is new and never again, and what decides for which GPUs kernels are built.
FIRST_CONFIGURE = (
    *("CC", "CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH"),
    *("CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "CMAKE_GENERATOR", "CMAKE_ARGS", "CMAKE_PREFIX_PATH"),
)


# Folders of the checkout that are installed in the package, and what of them. An editable install finds the checkout.
SHIPPED = {"benchmarks": ("*.py", "predicted.json"), "configs": ("*.toml",)}


class PythonBuild(build_py):
    """The build of the Python package, with the folders of SHIPPED in it.

    What an earlier build left is removed: a module that was deleted must not be in the next wheel.
    """

    def run(self) -> None:
        """Copy the package and the folders that are shipped inside it."""
        package = Path(self.build_lib) / "illada"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for folder, patterns in SHIPPED.items():
                for file in (file for pattern in patterns for file in sorted((ROOT / folder).glob(pattern))):
                    (package / folder).mkdir(exist_ok=True)
                    shutil.copyfile(file, package / folder / file.name)


class CMakeBuild(build_ext):
    """The build of the native module: one CMake configure, build and install.

    The module lands where setuptools wants it.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install the native module."""
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = build_folder(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        nvcc = "" if os.environ.get("ILLADA_CUDA", "").lower() == "off" else find_nvcc(os.environ)
        forget_other_build(build_dir, build_choices(nvcc))
        ninja = None if os.environ.get("CMAKE_GENERATOR") else shutil.which("ninja")
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build_dir)),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DILLADA_PYTHON=ON",
            "-DILLADA_CUTLASS_DOWNLOAD=ON",
            f"-DILLADA_CUTLASS_DIR={os.environ.get('ILLADA_CUTLASS_DIR', '')}",
            # Those that are not set are left to a preset in CMAKE_ARGS; no cache keeps an earlier build's.
            *(f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)),
            f"-DILLADA_NVCC_LAST={nvcc}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Given at every configure: a cache left by an earlier isolated build names tools that pip has deleted.
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ]
        if ccache := shutil.which("ccache"):
            configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in ("CXX", "CUDA")]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))  # last: they outweigh what is above
        self.run_cmake(configure)
        show_warnings(build_dir / "illada-warnings.txt")
        self.run_cmake(["cmake", "--build", str(build_dir), "--parallel", str(job_count())])
        built = build_dir / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, target)  # not copy2: an older mtime would keep an editable install from being updated

    def run_cmake(self, command: list[str]) -> None:
        """Run a command of CMake; SystemExit with a hint where it fails."""
        self.announce(" ".join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit("illada: cmake was not found; `pip install cmake ninja` or a system package") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"illada: the native build failed (exit {error.returncode}); the first error above says why.\n"
                "It needs a C++17 compiler (g++ >= 9 or clang >= 12); CUDA is optional (ILLADA_CUDA=off)."
            ) from None


def build_folder(temporary: str) -> Path:
    """Return the folder of CMake's build.

    It is in setuptools' own, or in ILLADA_BUILD_DIR, which several kinds of Python may share: each has its own there.
    """
    kept = os.environ.get("ILLADA_BUILD_DIR")
    return Path(kept).resolve() / PYTHON if kept else Path(temporary).resolve() / "cmake"


def build_choices(nvcc: str) -> dict[str, str]:
    """Return the choices of a build, which must be the same for its files to be of use again.

    They include all that a cache of CMake keeps from its first configure.
    """
    choices = {name: os.environ.get(name, "") for name in (*OPTIONS, *FIRST_CONFIGURE)}
    compilers = {name: os.environ.get(name) or usual for name, usual in (("CC", "cc"), ("CXX", "c++"))}
    for name, command in {**compilers, "nvcc": nvcc, "CUDAHOSTCXX": os.environ.get("CUDAHOSTCXX") or "g++"}.items():
        found = shutil.which(command) or shutil.which(command.partition(" ")[0])  # it may hold options
        # Its time as well: another version may be at the same place.
        choices[f"{name} is"] = f"{os.path.realpath(found)} of {os.stat(found).st_mtime_ns}" if found else ""
    choices["ninja"] = str(bool(shutil.which("ninja")))  # whether, not which: its path is given at every configure
    return {**choices, "source": str(ROOT), "python": PYTHON}


def forget_other_build(build_dir: Path, choices: dict[str, str]) -> None:
    """Remove the cache and the objects of a build that was made by other choices; fetched headers stay."""
    stamp, now = build_dir / "illada-choices.json", json.dumps(choices, indent=1)
    if not stamp.exists() or stamp.read_text() != now:
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build_dir / "CMakeFiles", ignore_errors=True)
        stamp.write_text(now)


def show_warnings(file: Path) -> None:
    """Show a file of warnings on the terminal, because pip hides the output of a build that succeeds."""
    text = file.read_text() if file.exists() else ""
    if text and not sys.stderr.isatty():
        try:
            with open(TERMINAL, "w") as terminal:
                terminal.write("\n" + text)
        except OSError:  # there is none
            pass


def memory_limit() -> int:
    """Return the bytes that this process may take.

    They are the machine's, or what its cgroup (version 2 or 1) or an outer one allows.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    places = {CGROUP / "memory.max", CGROUP / "memory/memory.limit_in_bytes"}  # a container sees its own at the root
    for line in PROC_CGROUP.read_text().splitlines() if PROC_CGROUP.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root, name = (CGROUP / controllers, "memory.limit_in_bytes" if controllers else "memory.max")
            folder = root / path.strip("/")
            places |= {inner / name for inner in (folder, *folder.parents) if inner.is_relative_to(root)}
    for place in places:
        try:
            memory = min(memory, int(place.read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return memory


def job_count() -> int:
    """Return the number of compilers to run at a time.

    It is MAX_JOBS, else one for each core but no more than one for every 3 GB of memory (nvcc is large).
    """
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = memory_limit()
    except (ValueError, OSError, AttributeError):
        return cores
    return max(1, min(cores, memory // (3 << 30)))


setup(ext_modules=[Extension("illada._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "build_py": PythonBuild})
