"""A training step, forward and backward, against the loop that most diffusion-LM code runs.

Both do the same arithmetic on the same weights and the same masked windows (with the paper's random split):

    illada    sequences packed, attention within each, only masked rows meet the head, never all logits
    padded    every sequence a row padded to the longest, attention under a key mask, logits of all positions,
              cross-entropy of all of them times the weights

The optimizer step is the same for both and left out. Peak memory is that of a process of its own: the most that was
resident during the step, less what was resident before it (weights and inputs).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import published
from benchmarks.runner import Case, Goal, Provider, ratio
from benchmarks.timing import CPU
from illada.config import ModelConfig
from illada.diffusion import Batch, make_batch
from illada.model import MaskedDiffusionModel

DEVICES = ("cpu",)

WINDOWS, LENGTH = 8, 1024
SIZES: dict[str, dict[str, int]] = {
    "small 8x1024": {},  # C 512, 8 layers, V 32,768
    "tiny 2x64": {  # for the tests
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500,
    },
}  # fmt: skip


def build(name: str) -> tuple[MaskedDiffusionModel, Batch]:
    """The model and the batch of a case, always the same."""
    config = ModelConfig.preset("small", **SIZES[name])
    windows, length = (WINDOWS, LENGTH) if name.startswith("small") else (2, 64)
    tokens = np.random.default_rng(0).integers(6, config.vocab_size, (windows, length))
    # Seed 3 splits 3 of the 8 windows; 2.4 are expected.
    batch = make_batch(tokens, np.arange(windows), seed=3, mask_id=config.mask_token_id)
    return MaskedDiffusionModel(config), batch


def packed_step(model: MaskedDiffusionModel, batch: Batch) -> Tensor:
    """illada's loss."""
    return model.loss(batch)


def padded_step(model: MaskedDiffusionModel, batch: Batch) -> Tensor:
    """The same loss on a padded batch with all logits."""
    config = model.config
    bounds = batch.cu_seqlens.tolist()
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    longest = max(b - a for a, b in parts)

    def pad(packed: Tensor, value: float) -> Tensor:
        return torch.stack([F.pad(packed[a:b], (0, longest - (b - a)), value=value) for a, b in parts])

    tokens, targets = pad(batch.tokens, config.pad_token_id), pad(batch.targets, config.pad_token_id)
    weights = pad(batch.token_weights, 0.0)
    lengths = batch.cu_seqlens.diff()
    key_mask = (torch.arange(longest) < lengths[:, None])[:, None, None, :]  # [B, 1, 1, L]
    logits = published.forward(model, tokens, key_mask)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (cross_entropy * weights.flatten()).sum() / batch.num_tokens


STEPS: dict[str, Callable[[MaskedDiffusionModel, Batch], Tensor]] = {"illada": packed_step, "padded": padded_step}


def gradients(model: MaskedDiffusionModel, batch: Batch, provider: str) -> list[Tensor]:
    """One forward and backward."""
    return list(torch.autograd.grad(STEPS[provider](model, batch), list(model.parameters())))


def make_case(name: str) -> Case:
    """Time, memory and gradient error of both ways."""
    config = ModelConfig.preset("small", **SIZES[name])

    def make() -> list[Provider]:
        model, batch = build(name)
        reference = gradients(model, batch, "padded")

        def error(result: list[Tensor]) -> float:
            """Relative difference of all gradients from the padded loop's."""
            pairs = list(zip(result, reference, strict=True))
            difference = sum(float((a - b).double().square().sum()) for a, b in pairs)
            return (difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5

        return [Provider(p, partial(gradients, model, batch, p), error=error) for p in STEPS]

    model_parameters = config.num_parameters - config.vocab_size * config.hidden_size
    _, batch = build(name) if name.startswith("tiny") else (None, None)
    tokens, masked = (batch.num_tokens, len(batch.rows)) if batch else (WINDOWS * LENGTH, WINDOWS * LENGTH // 2)
    return Case(
        name=name,
        make=make,
        # 6 per parameter and token, the head for masked tokens only; attention's pairs are left out.
        flops=6.0 * (model_parameters * tokens + config.vocab_size * config.hidden_size * masked),
        peak_memory=lambda provider: measure_memory(name, provider),
        repeats=3,
    )


def cases(device: torch.device = CPU) -> list[Case]:
    """The case of the design's goal; on a CPU alone until there are kernels for all of a training step."""
    return [make_case("small 8x1024")]


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """1.5 times as fast in half the memory."""
    found = []
    for case in dict.fromkeys(r["case"] for r in records):
        faster = ratio(records, case, "padded")
        memory = ratio(records, case, "padded", "peak_memory_bytes")
        if faster is not None and memory is not None:
            found.append(Goal(f"{case}: {faster:.2f}x faster than padded (goal 1.5x)", faster >= 1.5))
            found.append(Goal(f"{case}: {memory:.2f}x less memory than padded (goal 2x)", memory >= 2.0))
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def measure_memory(name: str, provider: str) -> int:
    """Peak resident bytes of one step in a fresh process, beyond what was resident before it."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.train_step", name, provider]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _measure_here(name: str, provider: str) -> int:
    model, batch = build(name)
    tiny_model, tiny_batch = build("tiny 2x64")
    gradients(tiny_model, tiny_batch, provider)  # libraries and thread pools are loaded before we look
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    gradients(model, batch, provider)
    done.set()
    watcher.join()
    return peak - before


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], sys.argv[2])))
