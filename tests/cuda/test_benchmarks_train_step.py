"""The benchmarks of a training step and of scoring on CUDA tensors: their cases with all sizes made small."""

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import ceiling, report, score, timing, train_step  # noqa: E402
from benchmarks.weights import random_model  # noqa: E402
from illada.config import ModelConfig  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 600}


@pytest.fixture(autouse=True)
def little_to_flush(monkeypatch):
    monkeypatch.setattr(timing, "cold_bytes", lambda device: 4096)
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])  # a simulator would take minutes


def records(bench, tmp_path):
    """Return the records of the whole command, run as by hand."""
    out = tmp_path / "o.jsonl"
    assert command.main([bench, "--device", "cuda", "--repeats", "1", "--json", str(out)]) == 0
    lines = report.read_json(out)
    assert all(line["timing"] == "events" and line["median_ms"] > 0 for line in lines), lines
    return lines


def small_jobs(device, heads, kv_heads, dim):
    config = ModelConfig.preset(
        "illada_8b", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim, initializer_range=0.1,
        **SMALL,
    )  # fmt: skip
    jobs = []
    for job in train_step.gpu_jobs(device):
        lengths = [90, 40] if "+" in job.name else [130]
        jobs.append(replace(job, config=config, make_batch=partial(train_step.one_window, lengths)))
    return jobs


@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 1, 64), (2, 2, 128)])
def test_train_step(heads, kv_heads, dim, device, tmp_path, monkeypatch, capsys):
    jobs = small_jobs(torch.device("cuda", 0), heads, kv_heads, dim)
    monkeypatch.setattr(train_step, "gpu_jobs", lambda device: jobs)
    lines = records("train-step", tmp_path)
    assert [(line["case"], line["provider"]) for line in lines] == [
        (job.name, provider) for job in jobs for provider in ("illada", "padded")
    ]
    gradients = 2 * jobs[0].config.num_parameters
    for line in lines:
        assert line["error"] < 0.05 and line["flops"] > 0 and line["peak_memory_bytes"] >= gradients, line
    used = {(line["case"], line["provider"]): line["peak_memory_bytes"] for line in lines}
    assert used["8b 8192", "illada"] < used["8b 8192 kept", "illada"]
    assert used["8b 8192", "padded"] < used["8b 8192 kept", "padded"]
    assert "8b 5120+3072: " in capsys.readouterr().out  # a goal


def test_random_model(device):
    model = random_model(
        ModelConfig.preset("illada_8b", num_attention_heads=2, head_dim=64, num_key_value_heads=1, **SMALL), device
    )
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cuda" and parameter.dtype == torch.bfloat16 and parameter.requires_grad
        spread, mean = float(parameter.detach().float().std()), float(parameter.detach().float().mean())
        if name.endswith("norm.weight"):
            assert (mean, spread) == (1, 0)
        else:
            assert abs(mean) < 0.001 and spread == pytest.approx(0.009882118, rel=0.05), name


def test_score(device, tmp_path, monkeypatch):
    # Without inference mode, in which operators reach a dispatch mode (that of a simulator) whole.
    for name in ("confidence_score", "one_by_one"):
        monkeypatch.setattr(score, name, torch.no_grad()(getattr(score, name).__wrapped__))
    contexts = [[7, 8, 9] * 5] * 4 + [list(range(20, 50))] * 4
    continuations = [[11, 12, 13], [14], [15, 16], [17, 18, 19], [20] * 4, [21, 22], [23], [24, 25]]
    monkeypatch.setattr(score, "questions", lambda count, vocab: score.Questions(contexts, continuations))

    def cases(device):
        config = ModelConfig.preset("small", **SMALL, num_attention_heads=2, num_key_value_heads=1)
        few_layers = ModelConfig.preset(
            "illada_8b", **SMALL, num_attention_heads=2, num_key_value_heads=1, head_dim=128
        )
        return [score.make_case(*case, 2, device) for case in (("small", config), ("4 layers", few_layers))]

    monkeypatch.setattr(score, "cases", cases)
    lines = records("score", tmp_path)
    assert [(line["case"], line["provider"]) for line in lines] == [
        (f"{case} 2 questions", provider) for case in ("small", "4 layers") for provider in ("illada", "one by one")
    ]
    assert all(line["error"] < score.TOLERANCE["events"] for line in lines)
