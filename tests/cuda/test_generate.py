"""Generation on CUDA tensors: its layout of the pack, the caches' writes and the ops' calls, against the CPU.

As long as attention has no CUDA kernels, plain torch stands in for it; the rest is what runs on a GPU.
"""

import dataclasses

import pytest
import torch

import illada.model
from illada.config import ModelConfig
from illada.generation import GenerationConfig, generate
from illada.generation.graphs import available
from illada.model import MaskedDiffusionModel
from illada.ops import attention_plan, reference

CONFIG = ModelConfig.preset(
    "tiny", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=600,
    max_position_embeddings=128, initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[7, 8, 9], list(range(20, 60)), [11]]
BASE = GenerationConfig(gen_length=16, block_length=8, steps=4, stop_tokens=())
REQUESTS = [
    BASE,
    dataclasses.replace(BASE, mode="fixed", steps=8, rule="threshold", threshold=0.3, temperature=0.7, cfg_scale=0.5),
    dataclasses.replace(BASE, rule="entropy_bound", forbid_tokens=(8,), delay_tokens=(3, 4), end_think=(50, 51),
                        end_think_boost=20.0),
]  # fmt: skip


def run(*arguments, **keywords):
    """Without inference mode, in which operators reach a dispatch mode (that of a simulator) whole."""
    with torch.no_grad():
        return generate.__wrapped__(*arguments, **keywords)


@pytest.fixture(scope="module")
def has_attention(device):
    try:
        attention_plan(
            torch.tensor([0, 1], dtype=torch.int32, device=device), num_heads=1, num_kv_heads=1, head_dim=64, total_q=1
        )
    except NotImplementedError:
        return False
    return True


@pytest.fixture
def models(device, has_attention, monkeypatch):
    """The same weights on the CPU and the GPU."""
    models = [MaskedDiffusionModel(CONFIG, seed=5) for _ in range(2)]
    for model in models:
        with torch.no_grad():
            model.embed_tokens.weight.mul_(2.5)
            model.embed_tokens.weight[[CONFIG.eos_token_id, CONFIG.mask_token_id]] *= 0.01
    if not has_attention:
        on_cpu = illada.model.varlen_attention

        def attention(q, k, v, cu_seqlens, *, plan=None, **slots):
            if q.is_cuda:
                return reference.varlen_attention(q, k, v, cu_seqlens, **slots)
            return on_cpu(q, k, v, cu_seqlens, plan=plan, **slots)

        def plan(cu_seqlens, **arguments):
            return None if cu_seqlens.is_cuda else attention_plan(cu_seqlens, **arguments)

        monkeypatch.setattr(illada.model, "varlen_attention", attention)
        monkeypatch.setattr(illada.model, "attention_plan", plan)
    return models[0], models[1].to(device)


@pytest.mark.parametrize("cache", ["none", "prefix", "block"])
def test_tokens_of_the_cpu(models, cache):
    on_cpu, on_gpu = models
    configs = [dataclasses.replace(config, cache=cache) for config in REQUESTS]
    want = run(on_cpu, PROMPTS, configs, seed=[1, 2, 3])
    assert run(on_gpu, PROMPTS, configs, seed=[1, 2, 3], cuda_graphs=False) == want


def test_graphs_change_nothing(models, has_attention):
    if not has_attention:
        pytest.skip("a graph of a whole step needs attention's CUDA kernels, which are not built yet")
    _, model = models
    config = dataclasses.replace(BASE, cache="prefix")
    assert available(model, None) is False
    want = run(model, PROMPTS, config, cuda_graphs=False)
    assert run(model, PROMPTS, config) == want
