"""A benchmark of a training step, forward and backward.

Its peer is the loop that most diffusion-LM code runs.

Both do the same arithmetic on the same weights and the same masked sequences:

    illada    sequences packed, attention within each, only masked rows meet the head, never all logits
    padded    every sequence a row padded to the longest, attention under a key mask where there is padding, logits of
              all positions, cross-entropy of all of them in float32 times the weights

On a CPU windows with the paper's random split and masks. On a GPU one window of 8192 tokens, half of them masked: whole
(8192), as the paper leaves 7 of 10, or split in two (5120+3072), in bfloat16:

    8b         the geometry of iLLaDA; layers are recomputed in the backward pass but for `kept`
    4 layers   four of its layers and its head, for GPUs with less memory

The optimizer step is the same for both and left out. FLOPs, whoever does more, are those of a model that computes what
the loss needs, once: for each token 6 per parameter of the layers, for each masked token 6 per parameter of the head,
and 12 H D for each layer and pair of tokens of one sequence (two products forward, four backward). What is recomputed,
padded, or computed for tokens that are not masked is not counted; their rate over the GPU's peak is the MFU.

`error` is the relative difference of gradients from the padded loop's: of the embedding, the final norm, the first and
the last layer, since all of 8b would be 15 GB. It is nothing where the padded loop does not fit.

Memory on a CPU is that of a process of its own: the most that was resident during the step, less what was resident
before it (weights and inputs). On a GPU it is what the step allocates, gradients included and weights not; they are
dropped after each step. GB of 8b on 8192 tokens at the worst moment, which must be less than 80:

                                      illada   kept   padded
    weights                             15.2   15.2     15.2
    gradients, at the end               15.2      -     15.2    of kept layers, as their activations go
    inputs of 32 layers                  2.1      -      2.1
    activations of 1, of 32 layers       1.7   55.4      1.7
    head and loss                        3.9    3.9     15.2    float32 gradient and a chunk; three of all logits
    sum, if all were there at once      38.1   74.5     49.4

The padded loop does not fit with all layers kept; the runner says so and goes on. Temporaries come on top.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from illada.batch import Batch
from illada.config import ModelConfig
from illada.diffusion import make_batch, make_validation_batch
from illada.model import MaskedDiffusionModel

from . import published
from .attention_providers import given
from .runner import Case, Goal, Provider, on_gpu, ratio, reason
from .shapes import Shapes
from .timing import CPU
from .weights import random_model

DEVICES = ("cpu", "cuda")
OWN = ("seqlens", "heads", "head_dim", "hidden", "vocab")
LEAST_VOCAB = 7  # special tokens take the ids up to 5

REPEATS = {"cpu": 3, "cuda": 5}


def random_tokens(config: ModelConfig, windows: int, length: int) -> np.ndarray:
    """Return random tokens, int64 [windows, length], the same in every call."""
    return np.random.default_rng(0).integers(6, config.vocab_size, (windows, length))


def windows(count: int, length: int, config: ModelConfig) -> Batch:
    """Return a batch of windows, split and masked at random."""
    # Seed 3 splits 3 of 8 windows; 2.4 are expected.
    tokens = random_tokens(config, count, length)
    return make_batch(tokens, np.arange(count), seed=3, mask_id=config.mask_token_id)


def one_window(lengths: Sequence[int], config: ModelConfig) -> Batch:
    """Return a batch of sequences of these lengths, masked at t = 0.5."""
    tokens = random_tokens(config, 1, sum(lengths))
    batch = make_validation_batch(tokens, np.arange(1), stratum=0, strata=1, mask_id=config.mask_token_id)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return replace(batch, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), position_ids=positions)


@dataclass(frozen=True)
class Job:
    """A model and its batch, the same in every run.

    make_batch: on the CPU. recompute: layers in the backward pass, instead of keeping their activations.
    """

    name: str
    config: ModelConfig
    make_batch: Callable[[ModelConfig], Batch]
    recompute: bool = False
    device: torch.device = CPU

    def model(self) -> MaskedDiffusionModel:
        """Return the model with random weights: float32 on a CPU, bfloat16 on a GPU."""
        on_gpu = self.device.type == "cuda"
        return random_model(self.config, self.device) if on_gpu else MaskedDiffusionModel(self.config)

    def batch(self) -> Batch:
        """Return the batch on the job's device."""
        return self.make_batch(self.config).to(self.device)


def flops(config: ModelConfig, batch: Batch) -> float:
    """Return the floating-point operations of a forward and backward, as counted above."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    pairs = int(batch.cu_seqlens.diff().long().square().sum())
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * pairs
    return 6.0 * (layers * batch.num_tokens + head * len(batch.rows)) + 12.0 * attention


# ------------------------------------------------------------------------------------------------------------ providers


def packed_loss(model: MaskedDiffusionModel, batch: Batch) -> Callable[[], Tensor]:
    """Return a call of illada's loss."""
    return partial(model.loss, batch)


def padded_loss(model: MaskedDiffusionModel, batch: Batch) -> Callable[[], Tensor]:
    """Return a call of the same loss on a padded batch with all logits; the padding itself is not timed."""
    config = model.config
    bounds = batch.cu_seqlens.tolist()
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    longest = max(b - a for a, b in parts)

    def pad(packed: Tensor, value: float) -> Tensor:
        return torch.stack([F.pad(packed[a:b], (0, longest - (b - a)), value=value) for a, b in parts])

    padding = 0 if config.pad_token_id is None else config.pad_token_id
    tokens, targets = pad(batch.tokens, padding), pad(batch.targets, padding)
    weights = pad(batch.token_weights, 0.0)
    key_mask = None
    if any(b - a < longest for a, b in parts):
        lengths = batch.cu_seqlens.diff()
        valid = torch.arange(longest, device=lengths.device) < lengths[:, None]
        key_mask = valid[:, None, None, :]  # [B, 1, 1, L]

    def loss() -> Tensor:
        logits = published.forward(model, tokens, key_mask).float()
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (cross_entropy * weights.flatten()).sum() / batch.num_tokens

    return loss


LOSSES = {"illada": packed_loss, "padded": padded_loss}


def gradients(model: MaskedDiffusionModel, loss: Callable[[], Tensor]) -> list[Tensor]:
    """Run one forward and backward and return the gradients; none of them stay in the model."""
    return list(torch.autograd.grad(loss(), list(model.parameters())))


def compared(model: MaskedDiffusionModel) -> list[int]:
    """Return which of the gradients `error` looks at.

    A gradient of the first layer has gone through all others.
    """
    parts = ("embed_tokens.", "norm.", "layers.0.", f"layers.{len(model.layers) - 1}.", "lm_head.")
    return [i for i, (name, _) in enumerate(model.named_parameters()) if name.startswith(parts)]


class GradientError:
    """The relative difference of `compared` gradients from the padded loop's, which are kept on the CPU."""

    def __init__(self, model: MaskedDiffusionModel, batch: Batch):
        found = gradients(model, padded_loss(model, batch))
        self.reference = {i: found[i].cpu() for i in compared(model)}

    def __call__(self, result: list[Tensor]) -> float:
        """Return the relative error of the gradients, over all parameters that are compared."""
        difference = size = 0.0
        for i, want in self.reference.items():
            # In parts: in float64 the embedding alone is 5 GB of 8b.
            for a, b in zip(result[i].split(4096), want.to(result[i].device).split(4096), strict=True):
                difference += float((a.double() - b.double()).square().sum())
                size += float(b.double().square().sum())
        return (difference / size) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- cases


def make_case(job: Job) -> Case:
    """Return the case that compares time, memory and gradient error of both losses."""

    def make() -> list[Provider]:
        try:
            model, batch = job.model(), job.batch()
        except torch.OutOfMemoryError as error:
            return [Provider(p, lambda: None, unavailable=reason(error)) for p in LOSSES]
        wrong: GradientError | None = None
        try:
            model.activation_checkpointing = job.device.type == "cuda"  # needs less, and gives the same
            wrong = GradientError(model, batch)
        except torch.OutOfMemoryError:
            pass
        model.activation_checkpointing = job.recompute
        if job.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return [
            Provider(name, partial(gradients, model, bind(model, batch)), error=wrong) for name, bind in LOSSES.items()
        ]

    return Case(
        name=job.name,
        make=make,
        flops=flops(job.config, job.make_batch(job.config)),
        dtype=torch.bfloat16 if job.device.type == "cuda" else torch.float32,
        peak_memory=partial(measure_memory, job.name) if job.name in CPU_JOBS else None,
        repeats=REPEATS[job.device.type],
    )


CPU_JOBS = {
    job.name: job
    for job in (
        Job("small 8x1024", ModelConfig.preset("small"), partial(windows, 8, 1024)),  # C 512, 8 layers, V 32,768
        Job("small 2x512", ModelConfig.preset("small"), partial(windows, 2, 512)),  # for --quick
        Job(
            "tiny 2x64",  # for the tests
            ModelConfig.preset(
                "small", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                vocab_size=500,
            ),
            partial(windows, 2, 64),
        ),
    )
}  # fmt: skip


def gpu_jobs(device: torch.device) -> list[Job]:
    """Return the jobs on a GPU: the design's first, and the one that needs most memory last."""
    job = Job("8b 8192", ModelConfig.preset("illada_8b"), partial(one_window, [8192]), recompute=True, device=device)
    return [
        job,
        replace(job, name="8b 5120+3072", make_batch=partial(one_window, [5120, 3072])),
        replace(job, name="4 layers 8192", config=ModelConfig.preset("illada_8b", num_hidden_layers=4)),
        replace(job, name="8b 8192 kept", recompute=False),
    ]


def cases(device: torch.device = CPU) -> list[Case]:
    """Return the case of the design's goal on a CPU; on a GPU the paper's model and window."""
    jobs = gpu_jobs(device) if device.type == "cuda" else [CPU_JOBS["small 8x1024"]]
    return [make_case(job) for job in jobs]


def quick(device: torch.device = CPU) -> list[Case]:
    """Return a few sequences; on a GPU of few layers."""
    return [make_case(gpu_jobs(device)[2] if device.type == "cuda" else CPU_JOBS["small 2x512"])]


def own(shapes: Shapes, device: torch.device = CPU) -> list[Case]:
    """Return the case of one window of the given sequences, half of them masked.

    The model is the design's smaller one, changed as asked.
    """
    heads, more = shapes.heads or (None, None), {"num_hidden_layers": 4} if device.type == "cuda" else {}
    wanted = {
        "hidden_size": shapes.hidden, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "head_dim": shapes.head_dim, "vocab_size": shapes.vocab,
    }  # fmt: skip
    more |= {name: value for name, value in wanted.items() if value is not None}
    config = ModelConfig.preset("illada_8b" if device.type == "cuda" else "small", **more)
    lengths = shapes.seqlens or ((5120, 3072) if device.type == "cuda" else (1024,) * 8)
    name = f"own {given(lengths).name} C{config.hidden_size} V{config.vocab_size} {config.num_attention_heads}"
    name += f"/{config.num_key_value_heads} D{config.head_size}"
    return [make_case(Job(name, config, partial(one_window, [n for n in lengths if n]), device.type == "cuda", device))]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    return list(LOSSES)


# ---------------------------------------------------------------------------------------------------------------- goals

#: TFLOP/s of dense bfloat16 products, from the data sheets, by a part of the device's name; the first that fits.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the device that the records are from.

    On a CPU 1.5 times as fast in half the memory. On a GPU no slower than the padded loop, and 8b at half of the GPU's
    peak where that is known.
    """
    found = []
    for case in dict.fromkeys(r["case"] for r in records):
        ours = next((r for r in records if r["case"] == case and r["provider"] == "illada"), None)
        faster = ratio(records, case, "padded")
        if ours is not None and on_gpu(ours):
            peak = next((peak for name, peak in PEAKS.items() if name in (ours["device"] or "")), None)
            if case.startswith("8b ") and peak is not None and ours["flops"]:
                share = ours["flops"] / ours["median_ms"] / 1e9 / peak
                found.append(Goal(f"{case}: {share:.0%} of {peak} TFLOP/s (goal 50%)", share >= 0.5))
            if faster is not None:
                found.append(Goal(f"{case}: {faster:.2f}x as fast as padded (goal 1x)", faster >= 1))
            continue
        memory = ratio(records, case, "padded", "peak_memory_bytes")
        if faster is not None and memory is not None:
            found.append(Goal(f"{case}: {faster:.2f}x faster than padded (goal 1.5x)", faster >= 1.5))
            found.append(Goal(f"{case}: {memory:.2f}x less memory than padded (goal 2x)", memory >= 2.0))
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def measure_memory(name: str, provider: str) -> int:
    """Return the peak resident bytes of one step in a fresh process.

    What was resident before the step is not counted.
    """
    package = __package__ or ""
    top = Path(__file__).resolve().parents[len(package.split("."))]  # which makes the package importable
    command = [sys.executable, "-m", f"{package}.train_step", name, provider]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _measure_here(name: str, provider: str) -> int:
    def step(job: Job) -> partial[list[Tensor]]:
        model = job.model()
        return partial(gradients, model, LOSSES[provider](model, job.batch()))

    call = step(CPU_JOBS[name])
    step(CPU_JOBS["tiny 2x64"])()  # libraries and thread pools are loaded before we look
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return peak - before


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1], sys.argv[2])))
