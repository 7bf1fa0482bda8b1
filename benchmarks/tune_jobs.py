"""The jobs at which choices between kernels are decided.

They run the public call's kernels and nothing around them.

Names are those of the benchmarks' cases, so that `compare` finds the predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import illada

from . import attention, attention_providers, dry_run, loss, loss_providers, remask, timing
from .attention_providers import equal
from .runner import generator

LOSS_TOLERANCE = 2**-6  # of norms
CONFIDENCE_TOLERANCE = {"sample": 1e-3, "linear": 0.05}  # relative, of the worst row; the logits' 16-bit operands


@dataclass
class Inputs:
    """The calls of a prepared job, with the check of their result.

    bind: Makes the call(s) under the choices in use, plans and workspaces included. Several calls, each on inputs of
        its own, are for a graph, because one call is short.
    error: Error of the first call's result.
    """

    bind: Callable[[], Sequence[Callable[[], Any]]]
    error: Callable[[Any], float]
    allowed: float


@dataclass(frozen=True)
class Job:
    """A job at which choices are decided.

    kind, dim: as in `choices`; bench: the benchmark that has a case of this name.
    """

    name: str
    kind: str
    bench: str
    make: Callable[[], Inputs]
    flops: float | None = None
    bytes: float | None = None
    dim: int | None = None


def attention_inputs(job: attention_providers.Job, direction: str) -> Inputs:
    """Return the inputs of the attention kernels alone, which write into existing buffers."""
    inputs = job.inputs()
    want = attention.exact(job, inputs, direction)
    allowed = attention.TOLERANCE[job.dtype]
    providers: list[attention_providers.AttentionProvider] = []

    def bind() -> list[Callable[[], Any]]:
        providers[:] = [attention_providers.illada_raw_provider(job)]
        return [attention.bind(providers[0], inputs, direction)]

    def error(result: Sequence[torch.Tensor]) -> float:
        return max(attention.row_error(got.detach(), w) for got, w in zip(result, want, strict=True))

    return Inputs(bind, error, allowed)


def loss_inputs(job: loss_providers.Job) -> Inputs:
    """Return the inputs of the public loss op."""
    inputs = job.inputs()
    exact, provider = loss.Exact(inputs, "fwdbwd"), loss_providers.PROVIDERS["illada"]

    def error(result: Any) -> float:
        found = exact.errors(provider, result)
        return max(found[key] for key in ("loss error", "dX error", "dW error"))

    return Inputs(lambda: [loss.bind(provider, inputs, "fwdbwd")], error, LOSS_TOLERANCE)


def sample_inputs(rows: int, vocab: int, temperature: float, device: torch.device) -> Inputs:
    """Return the inputs of `sample_tokens`; without noise each token must be its row's largest."""
    sets = timing.input_sets(rows * vocab * 2, device)
    logits = [remask.random_logits(rows, vocab, torch.bfloat16, device, seed) for seed in range(sets)]

    def call(i: int) -> illada.TokenSample:
        return illada.sample_tokens(logits[i], temperature=temperature, seed=1)

    def error(sample: illada.TokenSample) -> float:
        if temperature == 0 and not torch.equal(sample.token, logits[0].float().argmax(-1)):
            return float("inf")
        return remask.confidence_error(logits[0], (sample.token, sample.confidence))

    return Inputs(lambda: [partial(call, i) for i in range(sets)], error, CONFIDENCE_TOLERANCE["sample"])


def linear_inputs(rows: int, width: int, vocab: int, temperature: float, device: torch.device) -> Inputs:
    """Return the inputs of `linear_sample_tokens`, whose first rows are compared with float32."""
    random = generator(device)
    weight = (2 * width**-0.5 * torch.randn(vocab, width, generator=random, device=device)).to(torch.bfloat16)
    hidden = [torch.randn(rows, width, generator=random, device=device).to(torch.bfloat16) for _ in range(2)]
    sampled = min(rows, 32)
    exact = torch.cat([hidden[0][:sampled].float() @ part.float().t() for part in weight.chunk(16)], dim=1)

    def call(i: int) -> illada.TokenSample:
        return illada.linear_sample_tokens(hidden[i], weight, temperature=temperature, seed=1)

    def error(sample: illada.TokenSample) -> float:
        token = sample.token[:sampled]
        if temperature == 0:
            chosen = exact.gather(1, token[:, None]).squeeze(1)
            if bool((chosen < exact.amax(1) - 2**-8 * exact.abs().amax(1)).any()):
                return float("inf")
        return remask.confidence_error(exact, (token, sample.confidence[:sampled]))

    return Inputs(lambda: [partial(call, i) for i in range(2)], error, CONFIDENCE_TOLERANCE["linear"])


def jobs(device: torch.device) -> list[Job]:
    """Return the jobs, first those that decide most. A dry run has one of each kind, small."""
    found = []

    def add_attention(direction: str, pack: attention_providers.Pack, heads: int, kv_heads: int, dim: int) -> None:
        job = attention_providers.Job(pack, heads, kv_heads, dim, torch.bfloat16, device)
        kind = {"fwd": "attention_forward", "bwd": "attention_backward"}[direction]
        make = partial(attention_inputs, job, direction)
        name, flops, size = f"{direction} {job.name}", job.flops(direction), job.bytes(direction)
        found.append(Job(name, kind, "attention", make, flops, size, dim))

    def add_loss(total: int, masked: float, width: int, vocab: int) -> None:
        job = loss_providers.Job(total, masked, width, vocab, device=device)
        make = partial(loss_inputs, job)
        found.append(Job(f"fwdbwd {job.name}", "linear_loss", "loss", make, job.flops("fwdbwd")))

    def add_sample(rows: int, vocab: int, temperature: float) -> None:
        make = partial(sample_inputs, rows, vocab, temperature, device)
        name = f"sample {rows}x{vocab} T={temperature:g}"
        found.append(Job(name, "sample_tokens", "remask", make, None, 2.0 * rows * vocab))

    def add_linear(rows: int, width: int, vocab: int, temperature: float) -> None:
        make = partial(linear_inputs, rows, width, vocab, temperature, device)
        name, size = f"linear {rows}x{width}x{vocab} T={temperature:g}", 2.0 * (vocab + rows) * width
        found.append(Job(name, "linear_sample_tokens", "remask", make, 2.0 * rows * width * vocab, size))

    if dry_run.ACTIVE:
        add_attention("fwd", equal(2, 100), 4, 1, 128)
        add_attention("bwd", equal(1, 150), 4, 1, 64)
        add_loss(200, 0.5, 64, 1000)
        add_sample(3, 2000, 0.0)
        add_linear(5, 64, 1000, 0.0)
        return found
    packs = [equal(1, 8192), equal(2, 4096), equal(8, 1024), equal(64, 128)]
    for direction in ("fwd", "bwd"):
        add_attention(direction, packs[0], 32, 8, 128)
    add_loss(8192, 0.5, 4096, 155136)
    for pack in packs[1:]:
        for direction in ("fwd", "bwd"):
            add_attention(direction, pack, 32, 8, 128)
    for rows in (128, 1024, 32):
        add_linear(rows, 4096, 155136, 0.0)
    for rows in (128, 1024):
        for temperature in (0.0, 1.0):
            add_sample(rows, 155136, temperature)
    for pack in (equal(1, 8192), equal(8, 1024)):
        for direction in ("fwd", "bwd"):
            add_attention(direction, pack, 32, 8, 64)
    return found
