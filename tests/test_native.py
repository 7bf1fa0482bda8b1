"""Import without what is missing, and the clear word when it is needed."""

import os
import subprocess
import sys

import pytest

import illada
from illada import _native


def python(code: str, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_build_info():
    info = illada.build_info()
    assert info["version"] == illada.__version__
    assert info["cpu_isa"] in ("avx512", "avx2", "baseline")
    cuda = {"cuda_version", "cuda_archs", "cutlass_version", "no_cuda"}
    assert set(info) == {"version", "compiler", "openmp", "cpu_isa"} | cuda
    assert bool(info["cuda_version"]) != bool(info["no_cuda"])


def test_import_needs_no_native_module_and_touches_nothing():
    code = (
        "import sys, random, torch; sys.modules['illada._C'] = None; before = torch.random.get_rng_state();"
        "import illada; assert torch.equal(before, torch.random.get_rng_state());"
        "assert not torch.cuda.is_initialized()\n"
        "try: illada.sample_tokens(torch.eye(2))\n"
        "except ImportError as error: print(error)"
    )
    assert "pip install ." in python(code)


def test_import_with_cuda_absent():
    assert python("import illada; print(illada.__version__)", CUDA_VISIBLE_DEVICES="").strip() == illada.__version__


def test_version_mismatch_is_said(monkeypatch):
    monkeypatch.setattr(_native, "package_version", lambda: "9.9.9")
    _native.native.cache_clear()
    with pytest.raises(ImportError, match=r"built from version .*, the Python package is\s+9\.9\.9"):
        _native.native()
    _native.native.cache_clear()


def test_cuda_tensor_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(_native, "has_cuda", lambda: False)
    with pytest.raises(NotImplementedError, match=r"sample_tokens: this build has no CUDA kernels \(.*\); .* nvcc"):
        _native.require_cuda_build("sample_tokens")
