"""The cases that `predict` runs under the simulator.

Each says how its times become those of a case of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

import illada
from illada.ops import raw

from . import attention_providers
from .attention_providers import equal

LAUNCH_US = 3.0  # that the model adds to each kernel, and that is not scaled
VOCAB, WIDTH = 155136, 4096


@dataclass(frozen=True)
class Estimate:
    """The basis of a range: the machine's parameters at its fast and slow end, and the model's own errors."""

    fast: Mapping[str, float]
    slow: Mapping[str, float]
    factors: tuple[float, float]  # of the time, beside these parameters
    text: str


# The factors are from the simulator's own table of published kernels on an H100: FlashAttention-3's forward is
# predicted 9% too slow to 8% too fast, its backward up to 15% too fast from 2048 tokens on, a GEMM within what was
# measured.
ESTIMATES = {
    "forward": Estimate({}, {}, (0.95, 1.12), "the model's errors on FlashAttention-3's forward, and 4% for power"),
    "backward": Estimate({}, {"red_bw": 8}, (0.97, 1.12),
                         "8 to 12 bytes of fp32 reductions a clock and SM; conversions of dq not included (1%)"),
    "gemm": Estimate({}, {}, (0.94, 1.10), "the clock that tensor cores hold: 1.4 to 1.6 GHz"),
    "memory": Estimate({"hbm_gbs": 4500}, {"hbm_gbs": 3900}, (1.0, 1.05), "3.9 to 4.5 TB/s of memory"),
    "latency": Estimate({}, {}, (0.8, 1.3), "latencies, which the model has from microbenchmarks"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A case whose kernels the simulator times.

    run: puts the kernels on the device. kernel: a part of their names, without which nothing is timed.

    slots: the multiprocessors (or pairs of them) that are timed; the busiest counts. scale: of a kernel's time beyond
    its launch, by a part of its name, where a smaller job stands for the case; once: kernels of which only the first
    launch counts, the others being empty in the case. more_us: launches that do next to nothing.
    """

    name: str
    group: str
    estimate: str
    kernel: str
    run: Callable[[], None]
    slots: tuple[int, ...] = (0,)
    scale: Mapping[str, float] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    more_us: float = 0.0
    flops: float | None = None
    note: str = ""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return zeros on the device: the times do not depend on their values."""
    return torch.zeros(*shape, dtype=dtype, device="cuda")


def attend(job: attention_providers.Job, direction: str) -> None:
    """Run one direction of attention; the backward gets zeros as out and lse."""
    q, k, v, dout = (empty(job.total_q if of_q else job.total_k, job.heads if of_q else job.kv_heads, job.dim)
                     for of_q in (True, False, False, True))  # fmt: skip
    provider = attention_providers.illada_raw_provider(job)
    if direction == "fwd":
        provider.attend(q, k, v)
    else:
        provider.differentiate(empty(*q.shape), (q, k, v), dout)


def linear_loss(rows: int, vocab: int) -> None:
    """Compute the loss and gradients of given rows."""
    hidden, weight, nll = empty(rows, WIDTH), empty(vocab, WIDTH), empty(rows, dtype=torch.float32)
    targets, ones = empty(rows, dtype=torch.int64), torch.ones(rows, device="cuda")
    listed = torch.arange(rows, dtype=torch.int32, device="cuda")
    size = raw.linear_masked_cross_entropy_workspace(hidden, weight, listed)
    raw.linear_masked_cross_entropy(
        nll, hidden, weight, targets, ones, listed, hidden_grad=empty(rows, WIDTH),
        weight_grad=empty(vocab, WIDTH, dtype=torch.float32), workspace=empty(size or 0, dtype=torch.uint8),
    )  # fmt: skip


def sample(rows: int, temperature: float) -> None:
    """Run `sample_tokens` on logits like those of the benchmark."""
    logits = (2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    illada.sample_tokens(logits.cuda(), temperature=temperature, seed=1)


def linear_sample(rows: int, temperature: float) -> None:
    """Run `linear_sample_tokens` on a weight whose rows repeat, which takes no less time."""
    generator = torch.Generator().manual_seed(0)
    block = (2 * WIDTH**-0.5 * torch.randn(2048, WIDTH, generator=generator)).to(torch.bfloat16)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(torch.bfloat16).cuda()
    weight = block.repeat(-(-VOCAB // 2048), 1)[:VOCAB].cuda()
    illada.linear_sample_tokens(hidden, weight, temperature=temperature, seed=1)


def remask(sequences: int, rows: int) -> None:
    """Run `remask` by quota."""
    total = sequences * rows
    confidence = torch.rand(total, generator=torch.Generator().manual_seed(0)).cuda()
    found = illada.TokenSample(torch.arange(total).cuda(), confidence, confidence.log())
    cu_rows = torch.arange(0, total + 1, rows, dtype=torch.int32).cuda()
    positions = torch.arange(total, dtype=torch.int32).cuda()
    illada.remask(torch.full((total,), 5).cuda(), positions, cu_rows, found, quota=4, mask_id=5)


def cases() -> list[Case]:
    """Return the cases of `tune_jobs`, by the same names, and those of remask."""
    found = []
    shapes = [(equal(1, 8192), 128), (equal(2, 4096), 128), (equal(8, 1024), 128), (equal(64, 128), 128),
              (equal(1, 8192), 64), (equal(8, 1024), 64)]  # fmt: skip
    device = torch.device("cuda", 0)
    for direction, group in (("fwd", "forward"), ("bwd", "backward")):
        for pack, dim in shapes:
            job = attention_providers.Job(pack, 32, 8, dim, torch.bfloat16, device)
            # The scores are recomputed for dq, so there are no sums.
            estimate = "forward" if pack.lengths[0] <= 256 else group
            # Which slot has the longest list is not known before, so the first, the middle and the last one are timed.
            slots = (0, 33, 65) if direction == "fwd" else (0, 66, 131)
            found.append(Case(f"{direction} {job.name}", group, estimate, f"attention_{group}",
                              partial(attend, job, direction), slots, flops=job.flops(direction)))  # fmt: skip
    rows, small = 4096, 33 * 256
    rounds = -(-rows // 256 * -(-VOCAB // 256) // 66) / (
        rows // 256 * small // 256 / 66
    )  # of tiles, by 66 pairs of CTAs
    by_vocab = VOCAB / small
    scale = {"logits_sm90": rounds, "weight_grad_sm90": rounds, "hidden_grad_sm90": by_vocab, "statistics": by_vocab}
    note = f"each GEMM from one of {small} ids, scaled by rounds of tiles ({rounds:g}) or steps of K ({by_vocab:.2f})"
    found.append(Case(
        "fwdbwd 8192 t=0.5 4096x155136", "loss", "gemm", "linear_masked_cross_entropy",
        partial(linear_loss, rows, small), scale=scale, once=("logits_sm90", "statistics"), more_us=4 * LAUNCH_US,
        flops=6.0 * rows * VOCAB * WIDTH, note=note,
    ))  # fmt: skip
    for rows in (128, 1024):
        for temperature in (0.0, 1.0):
            name = f"sample {rows}x{VOCAB} T={temperature:g}"
            run = partial(sample, rows, temperature)
            found.append(Case(name, "sample", "memory", "sample_tokens", run))
    for rows in (32, 128, 1024):
        name, flops = f"linear {rows}x{WIDTH}x{VOCAB} T=0", 2.0 * rows * WIDTH * VOCAB
        estimate, run = "memory" if rows <= 128 else "gemm", partial(linear_sample, rows, 0.0)
        found.append(Case(name, "linear", estimate, "sample_tokens", run, flops=flops))
    for sequences, rows in ((32, 32), (1, 8192)):
        name, run = f"commit {sequences}x{rows} quota", partial(remask, sequences, rows)
        found.append(Case(name, "remask", "latency", "remask", run))
    return found
