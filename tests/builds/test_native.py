"""Import without what is missing, and the clear word when it is needed."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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


def test_a_forked_child_with_one_thread_works():
    """As docs/embedding.md says: OpenMP's threads do not survive a fork."""
    code = (
        "import os, signal, torch, illada; x = torch.randn(64, 5000); want = illada.sample_tokens(x).token\n"
        "if (child := os.fork()) == 0:\n"
        "    signal.alarm(60)\n"  # a child that hangs is an error
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(illada.sample_tokens(x).token, want) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert python(code, OMP_NUM_THREADS="2").strip() == "0"


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


def test_calls_of_several_threads_do_not_disturb_each_other():
    """They run side by side with a GIL too: each call releases it."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(64, 3000, generator=generator) for _ in range(4)]
    targets = torch.arange(64)

    def calls(x: torch.Tensor) -> list[torch.Tensor]:
        said = illada.sample_tokens(x, temperature=1.0, seed=5)
        return [said.token, said.confidence, illada.masked_cross_entropy(x, targets, torch.ones(64))]

    alone = [calls(x) for x in logits]
    with ThreadPoolExecutor(4) as pool:
        for want, got in zip(alone * 5, pool.map(calls, logits * 5), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python")
def test_the_module_leaves_the_gil_off():
    load = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("illada._C", {_native.native().__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
sys.exit(sys._is_gil_enabled())
"""
    assert subprocess.run([sys.executable, "-c", load]).returncode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_too_little_memory_in_a_thread_is_an_exception():
    """Of several threads' rows with filters, each needs a copy: what is thrown there must not end the process."""
    assert "caught" in python("""
import resource, torch, illada
torch.set_num_threads(2)
logits = torch.zeros(1, 1 << 24).expand(2, -1)
illada.sample_tokens(logits[:, :64], temperature=1.0, top_k=2)  # starts the threads
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (40 << 20),) * 2)  # a copy takes 64 MB
try:
    illada.sample_tokens(logits, temperature=1.0, top_k=2)
except MemoryError:
    print("caught")
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for libgomp as Linux names it")
def test_attention_backward_in_a_parallel_region_of_the_callers():
    """A backward on one thread uses the first scratch, even if its caller is the last thread of a region."""
    said = python("""
import ctypes, sys, torch, illada
torch.set_num_threads(1)
torch.zeros(9).sum()
libraries = [line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line]
if not libraries:
    print("no libgomp")
    sys.exit()
q, k, v = (torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3))
lengths = torch.tensor([0, 64], dtype=torch.int32)
gradients = []

def backward():
    with torch.autograd.set_multithreading_enabled(False):
        gradients.append(torch.autograd.grad(illada.varlen_attention(q, k, v, lengths).sum(), (q, k, v)))

backward()

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def region(_):
    if omp.omp_get_thread_num() == 39:
        torch.set_num_threads(1)
        backward()

omp = ctypes.CDLL(libraries[0])
omp.GOMP_parallel(region, None, ctypes.c_uint(40), ctypes.c_uint(0))
assert all(map(torch.equal, *gradients))
print("same")
""")
    if "no libgomp" in said:
        pytest.skip("torch has loaded no libgomp")
    assert "same" in said
