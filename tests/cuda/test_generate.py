"""Generation on CUDA tensors: its layout of the pack, the caches' writes and the ops' calls, against the CPU.

Attention's kernels take 16-bit tensors alone.
"""

import dataclasses

import pytest
import torch
from recorded_graph import RecordedGraph
from torch.utils._python_dispatch import _get_current_dispatch_mode

import illada.model.layers
from illada.config import ModelConfig
from illada.generation import GenerationConfig, generate, loop
from illada.generation.graphs import CudaCapture, available
from illada.model import MaskedDiffusionModel
from illada.ops import reference
from illada.testing import assert_close_like

CONFIG = ModelConfig.preset(
    "tiny", hidden_size=128, num_key_value_heads=2, head_dim=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=600,
    max_position_embeddings=128, initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[7, 8, 9], list(range(20, 60)), [11], [12, 13]]
BASE = GenerationConfig(gen_length=16, block_length=8, steps=4, stop_tokens=())
REQUESTS = [
    BASE,
    dataclasses.replace(BASE, mode="fixed", steps=8, rule="threshold", threshold=0.3, temperature=0.7, cfg_scale=0.5),
    dataclasses.replace(BASE, rule="entropy_bound", forbid_tokens=(8,), delay_tokens=(3, 4), end_think=(50, 51),
                        end_think_boost=20.0),
    dataclasses.replace(BASE, gen_length=8, steps=3, temperature=0.7, top_p=0.9, top_k=50, forbid_tokens=(8,)),
]  # fmt: skip


def run(*arguments, **keywords):
    """Generate without inference mode, so that a dispatch mode (that of a simulator) sees whole operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run", torch.no_grad()(loop._run.__wrapped__))
        return generate(*arguments, **keywords)


def make_models(config, dtype, device):
    """The same weights on the CPU and the GPU."""
    models = [MaskedDiffusionModel(config, seed=5, dtype=dtype) for _ in range(2)]
    for model in models:
        with torch.no_grad():
            model.embed_tokens.weight.mul_(2.5)
            model.embed_tokens.weight[[config.eos_token_id, config.mask_token_id]] *= 0.01
    return models[0], models[1].to(device)


@pytest.fixture
def half_attention(monkeypatch):
    """Compute attention in float16 on both devices, and all else in float32: near enough that tokens agree."""
    attend = illada.model.layers.varlen_attention

    def attention(q, k, v, *arguments, **keywords):
        return attend(q.half(), k.half(), v.half(), *arguments, **keywords).to(q.dtype)

    monkeypatch.setattr(illada.model.layers, "varlen_attention", attention)


@pytest.mark.parametrize("cache", ["none", "prefix", "block"])
def test_tokens_of_the_cpu(cache, device, half_attention):
    on_cpu, on_gpu = make_models(CONFIG, torch.float32, device)
    configs = [dataclasses.replace(config, cache=cache) for config in REQUESTS]
    want = run(on_cpu, PROMPTS, configs, seed=[1, 2, 3, 4])
    assert run(on_gpu, PROMPTS, configs, seed=[1, 2, 3, 4], cuda_graphs=False) == want


def test_hidden_states_of_the_cpu(device):
    """A model in bfloat16, without a cache, against float64."""
    on_cpu, on_gpu = make_models(CONFIG, torch.bfloat16, device)
    exact = MaskedDiffusionModel(CONFIG, dtype=torch.float64)
    exact.load_state_dict(on_cpu.state_dict())
    lengths = [70, 1, 33]
    tokens = torch.randint(0, 500, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        baseline = on_cpu(tokens, cu_seqlens)
        want = reference_forward(exact, tokens, cu_seqlens)
        got = on_gpu(tokens.to(device), cu_seqlens.to(device))
    assert_close_like(got.cpu(), want, baseline)


def reference_forward(model, tokens, cu_seqlens):
    """Run the model with the reference attention, which also takes float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            illada.model.layers, "varlen_attention",
            lambda q, k, v, cu, *, plan=None, **slots: reference.varlen_attention(q, k, v, cu, **slots),
        )  # fmt: skip
        return model(tokens, cu_seqlens)


@pytest.fixture
def graphs_made(monkeypatch):
    """The graphs that are captured: CUDA's, or recorded ones where a dispatch mode stands in for torch's kernels."""
    made = []
    kind = torch.cuda.CUDAGraph if _get_current_dispatch_mode() is None else RecordedGraph

    class Counted(kind):
        replays = 0

        def replay(self):
            self.replays += 1
            super().replay()

    def make(*arguments, **keywords):
        made.append(Counted(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    return made


@pytest.mark.parametrize("cache, options", [
    ("prefix", {}),
    ("block", {"temperature": 0.7, "rule": "threshold", "threshold": 0.1, "measure": "margin"}),
    ("prefix", {"rule": "entropy_bound", "forbid_tokens": (8,), "delay_tokens": (3, 4), "end_think": (50, 51),
                "end_think_boost": 20.0}),
    ("block", {"alg_temp": 0.5, "take_back": 0.5}),
    ("block", {"temperature": 0.5, "top_p": 0.9, "top_k": 50, "forbid_tokens": (8,)}),
], ids=["quota", "threshold", "entropy_bound", "take_back", "filters"])  # fmt: skip
def test_graphs_change_nothing(cache, options, device, graphs_made):
    """Captured whole and replayed with other tokens, positions, cache slots, limits and numbers of sequences."""
    _, model = make_models(CONFIG, torch.bfloat16, device)
    config = dataclasses.replace(BASE, cache=cache, **options)
    assert not available(model, None)  # without a cache there is nothing to capture
    want = run(model, PROMPTS, config, seed=[1, 2, 3, 4], cuda_graphs=False)
    assert not graphs_made
    assert run(model, PROMPTS, config, seed=[1, 2, 3, 4]) == want
    assert sum(graph.replays for graph in graphs_made) > len(graphs_made) > 0
    assert len({len(result.tokens) for result in want}) == 1


def test_a_graph_must_not_wait(device, graphs_made):
    """What a step must not do is refused while it is recorded, so that the tests above say something."""
    if _get_current_dispatch_mode() is None:
        pytest.skip("CUDA itself refuses these; its allocator is not fit for more captures after that")
    x = torch.arange(4, device=device)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.cpu(), lambda: torch.ones(2).to(device) + 1):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            CudaCapture()(lambda wait=wait: wait())
        torch.cuda.synchronize()
