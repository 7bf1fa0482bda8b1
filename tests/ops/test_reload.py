"""Modules of illada that are imported again; compiled packages that call its ops. Each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_meta import Exported
from torch.export import Dim, export

CHECK = """
import gc, importlib, sys
import torch
import illada
from torch.utils.flop_counter import FlopCounterMode

def check(ops):
    q, k, v = (torch.randn(7, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        ops.varlen_attention(q, k, v, starts).sum().backward()
    assert q.grad.any() and counter.get_total_flops()
    logits = torch.randn(7, 50, requires_grad=True)
    ops.masked_cross_entropy(logits, torch.arange(7), torch.ones(7)).backward()
    assert logits.grad.any() and ops.sample_tokens(logits.detach()).token.shape == (7,)
    try:
        torch.func.jvp(lambda q: ops.varlen_attention(q, k, v, starts), (q,), (q,))
    except NotImplementedError:
        return
    raise AssertionError("a tangent was not refused")

check(illada.ops)
"""
RELOAD = {
    "the library": "importlib.reload(illada.ops._library)",
    "every module of the ops": """
for name in sorted(name for name in sys.modules if name.startswith("illada.ops.")):
    importlib.reload(sys.modules[name])
importlib.reload(illada.ops)
importlib.reload(illada)""",
    "all, while the old ones are in use": """
old = illada.ops
for name in [name for name in sys.modules if name.partition(".")[0] == "illada"]:
    del sys.modules[name]
import illada
assert illada.ops is not old
check(old)""",
    "all, when the old ones are gone": """
for name in [name for name in sys.modules if name.partition(".")[0] == "illada"]:
    del sys.modules[name]
del illada
gc.collect()
import illada""",
}


def python(script: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)


def test_what_is_imported_again_finds_its_ops():
    """`Only a single TORCH_LIBRARY can be used to register the namespace illada`, it said."""
    steps = (f'{code}\ncheck(illada.ops)\nprint("{name}")\n' for name, code in RELOAD.items())
    done = python(CHECK + "".join(steps))
    assert done.stdout.splitlines() == list(RELOAD), done.stderr[-2000:]


@pytest.mark.slow
@torch.no_grad()
def test_a_package_of_aotinductor(tmp_path: Path):
    """Model, loss and sampler with sizes that stay free; a process that loads it needs illada.ops and no model."""
    generator = torch.Generator().manual_seed(7)

    def inputs(*lengths):
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        total = int(starts[-1])
        return torch.randint(100, (total,), generator=generator), starts, torch.rand(total, generator=generator)

    tokens, module = Dim("tokens", min=2, max=4096), Exported()
    shapes = {"tokens": {0: tokens}, "starts": {0: Dim("starts", min=2, max=512)}, "weights": {0: tokens}}
    exported = export(module, inputs(4, 5, 11), dynamic_shapes=shapes)
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    examples = [inputs(*lengths) for lengths in ((4, 5, 11), (3, 1, 7, 9, 2), (30,))]
    torch.save([(example, module(*example)) for example in examples], tmp_path / "examples.pt")
    load = f"""
import sys, torch
run = torch._inductor.aoti_load_package({package!r})
for example, wanted in torch.load({str(tmp_path / "examples.pt")!r}):
    for got, want in zip(run(*example), wanted, strict=True):
        torch.testing.assert_close(got, want)
print("illada.model" in sys.modules)
"""
    done = python("import illada.ops\n" + load)
    assert done.stdout == "False\n", done.stderr[-2000:]
    assert "Could not find schema for illada::" in python(load).stderr
