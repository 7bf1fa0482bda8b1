"""`python -m benchmarks generate` on a GPU: each way runs, at a size that takes seconds."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks import generate, published, runner
from illada.generation import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(generate.SIZES, "8b", (16, 8, 4, 24))
    # Without inference mode, in which operators reach a dispatch mode (that of a simulator) whole.
    for module, name in ((loop, "_run"), (published, "generate")):
        monkeypatch.setattr(module, name, torch.no_grad()(getattr(module, name).__wrapped__))
    return {
        "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "vocab_size": 600,
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_every_way_runs(batch, device, small):
    case = generate.make_case("8b", batch, "var", torch.device("cuda", 0), **small)
    providers = case.make()
    assert [p.name for p in providers] == ["illada", "illada prefix", "illada block", "illada launched", "one by one"]
    for provider in providers:
        if provider.name in ("illada prefix", "illada block"):  # their graphs hold operators of torch
            continue
        result = provider.call()
        assert provider.counts(result)["tokens"] == 16 * batch and 0 <= provider.error(result) <= 1
        assert len(result[0]) == batch and all(len(tokens) == 16 for tokens in result[0])
    assert providers[-1].error(providers[-1].call()) == 0


def test_records(device, small):
    case = generate.make_case("8b", 1, "var", torch.device("cuda", 0), **small)
    names = ["illada", "illada launched", "one by one"]
    records = runner.run("generate", [case], providers=names, repeats=1, device=torch.device("cuda", 0))
    assert [r["provider"] for r in records] == names
    assert all(r["median_ms"] > 0 and r["counts"]["forwards"] == 8 and r["timing"] == "events" for r in records)
