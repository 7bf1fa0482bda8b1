"""A benchmark of packed bidirectional attention on sequences of unequal lengths.

    DIRECTION PACK H/G D...           one call on a pack, or of cached blocks; fwd, bwd (alone) or fwdbwd
    DIRECTION cached BxL H/G D...     B blocks of L queries, each against its own, partly filled slot of keys
    plan PACK H/G D...                attention_plan alone, once a batch; the calls above get it for nothing

The peers are in `attention_providers`. They get for nothing what depends on the lengths alone, as illada gets its plan.

`error` is against float32, of the worst row of any head: |got - want| / max(|want|, root mean square of |want|). Who is
further off than TOLERANCE is left out. Launches are what one call puts on the GPU: kernels, copies and fills.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from illada.ops import reference

from . import attention_providers, timing
from .attention_providers import (
    BACKWARD_PROVIDERS,
    CPU_PROVIDERS,
    PROVIDERS,
    AttentionProvider,
    Job,
    Pack,
    cached,
    equal,
    given,
    listed,
    make_plan,
    ragged,
)
from .runner import Case, Goal, Provider, is_ours, reason
from .shapes import Shapes
from .timing import CPU

DEVICES = ("cpu", "cuda")
DIRECTIONS = ("fwd", "bwd", "fwdbwd")
OWN = ("seqlens", "heads", "head_dim", "dtype")
PROVIDERS_DOC = attention_providers.__doc__

TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 1e-4}  # 8 roundings of 16-bit results
GRAPH_FLOPS = 2e11  # up to 0.3 ms on an H100: cases for which launch gaps matter are timed in a graph as well
REPEATS = {"cpu": 9, "cuda": 30}

PACKS = [
    equal(1, 8192), listed(5120, 3072), equal(2, 4096), equal(4, 2048), equal(8, 1024), equal(16, 512), equal(64, 128),
    listed(4096, 0, 4096), ragged(32768), cached(32, 32, 1024, 8192), cached(1, 32, 8192, 8192),
]  # fmt: skip
CPU_PACKS = [
    equal(1, 512), listed(320, 192), equal(4, 128), equal(16, 32), equal(64, 16), listed(256, 0, 256), ragged(1024),
    cached(4, 8, 64, 512), cached(1, 8, 512, 512),
]  # fmt: skip


def bind(provider: AttentionProvider, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call on these inputs, which stay as the provider arranges them.

    The call returns (out,) for fwd and (dq, dk, dv) for the other directions.
    """
    q, k, v, dout = inputs
    arranged = [provider.arrange(x, keys) for x, keys in ((q, False), (k, True), (v, True))]
    if direction == "fwd":
        return lambda: (provider.attend(*arranged),)
    leaves = [x.detach().requires_grad_() for x in arranged]
    gradient = provider.arrange(dout, False)
    if direction == "fwdbwd":
        return lambda: provider.differentiate(provider.attend(*leaves), leaves, gradient)
    made: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not made:
            made.append(provider.attend(*leaves))
        return provider.differentiate(made[0], leaves, gradient, retain_graph=True)

    return backward


def exact(job: Job, inputs: tuple[Tensor, ...], direction: str) -> tuple[Tensor, ...]:
    """Return what `bind`'s call should give for packed tensors, in float32.

    Key-value heads are computed one by one, to spare memory.
    """
    group = job.heads // job.kv_heads
    parts: list[tuple[Tensor, ...]] = []
    for g in range(job.kv_heads):
        mine = (slice(g * group, (g + 1) * group), slice(g, g + 1), slice(g, g + 1), slice(g * group, (g + 1) * group))
        leaves: list[Tensor]
        *leaves, dout = (x[:, part].float() for x, part in zip(inputs, mine, strict=True))
        if direction == "fwd":
            out = reference.varlen_attention(*leaves, **job.lengths)
            assert isinstance(out, Tensor)  # without return_lse
            parts.append((out,))
        else:
            leaves = [x.requires_grad_() for x in leaves]
            parts.append(torch.autograd.grad(reference.varlen_attention(*leaves, **job.lengths), leaves, dout))
    return tuple(torch.cat(heads, dim=1) for heads in zip(*parts, strict=True))


def row_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error of a row [D] of [T, heads, D].

    The error of a row is |got - want| / max(|want|, root mean square of |want|).
    """
    size = want.norm(dim=-1)
    least = size.square().mean().sqrt().clamp(min=1e-30)
    return float(((got.float() - want).norm(dim=-1) / size.clamp(min=least)).max())


def check(provider: AttentionProvider, want: tuple[Tensor, ...], tolerance: float, result: tuple[Tensor, ...]) -> float:
    """Return the largest error of a result.

    ValueError: it is more than `tolerance`, or NaN.
    """
    are_keys = (False,) if len(want) == 1 else (False, True, True)
    got = [provider.restore(x.detach(), keys) for x, keys in zip(result, are_keys, strict=True)]
    worst = max(row_error(a, b) for a, b in zip(got, want, strict=True))
    if not worst <= tolerance:
        raise ValueError(f"wrong: a row is off by {worst:.1e} of its length, {tolerance:.1e} is allowed")
    return worst


def count(job: Job, call: Callable[[], Any], result: Any = None) -> dict[str, int]:
    """Return the counts of a job for its record, on a GPU with the number of launches of one call."""
    found = {"sequences": len(job.pack.lengths), "longest": max(job.pack.keys)}
    launches = timing.launches(call) if job.device.type == "cuda" else None
    return found if launches is None else {**found, "launches": launches}


def make_case(job: Job, direction: str = "fwd", names: Sequence[str] | None = None) -> Case:
    """Return the case of one job in one direction by all providers of its device, or by those of these names."""
    on_gpu = job.device.type == "cuda"
    flops = job.flops(direction)
    tolerance = TOLERANCE[job.dtype]

    def offer(
        name: str, make_provider: Callable[[Job], AttentionProvider], inputs: list, want: tuple[Tensor, ...]
    ) -> Provider:
        try:
            provider = make_provider(job)
            first, *others = (bind(provider, x, direction) for x in inputs)
        except Exception as error:  # not installed, not in this version of torch, not for this device
            if name == "illada" and not isinstance(error, NotImplementedError):
                raise
            return Provider(name, lambda: None, unavailable=reason(error))

        worst = partial(check, provider, want, tolerance)
        counts = partial(count, job, first)
        return Provider(name, first, error=worst, counts=counts, rotating=[first, *others] if others else [])

    def make() -> list[Provider]:
        in_graph = on_gpu and direction == "fwd" and flops <= GRAPH_FLOPS
        inputs = [
            job.inputs(seed) for seed in range(timing.input_sets(job.bytes("fwd"), job.device) if in_graph else 1)
        ]
        want = exact(job, inputs[0], direction)
        providers = CPU_PROVIDERS if not on_gpu else PROVIDERS if direction == "fwd" else BACKWARD_PROVIDERS
        return [
            offer(name, make_provider, inputs, want)
            for name, make_provider in providers.items()
            if names is None or name in names
        ]

    return Case(
        name=f"{direction} {job.name}",
        make=make,
        flops=flops,
        dtype=job.dtype,
        bytes=job.bytes(direction),
        repeats=REPEATS[job.device.type],
        slow={"sdpa padded"},
    )


def plan_case(job: Job) -> Case:
    """Return the case that times `attention_plan` alone."""

    def make() -> list[Provider]:
        call = partial(make_plan, job)
        # In a graph over one input, a few bytes that are as good as cold everywhere.
        rotating = [call] if job.device.type == "cuda" else []
        return [Provider("illada", call, counts=partial(count, job, call), rotating=rotating)]

    return Case(f"plan {job.name}", make, repeats=REPEATS[job.device.type])


def cases(device: torch.device = CPU, direction: str = "fwd") -> list[Case]:
    """Return the cases of all packs of the device.

    Caches are read by the forward alone; plans serve every direction.
    """
    packs, heads, dim, dtype = defaults(device)
    jobs = [Job(pack, *h, dim, dtype, device) for h in heads for pack in packs]
    plans = [plan_case(job) for job in jobs[: len(packs)]]
    if device.type == "cuda":
        jobs += [Job(pack, *h, 64, dtype, device) for h in heads for pack in (equal(1, 8192), equal(8, 1024))]
    return [*(make_case(job, direction) for job in jobs if direction == "fwd" or not job.pack.used), *plans]


def defaults(device: torch.device) -> tuple[Sequence[Pack], Sequence[tuple[int, int]], int, torch.dtype]:
    """Return the default packs, head counts, head dim and dtype of a device.

    A CPU gets float32, because few CPUs have fast arithmetic on 16-bit numbers.
    """
    if device.type == "cuda":
        return PACKS, ((32, 8), (32, 32)), 128, torch.bfloat16
    return CPU_PACKS, ((8, 2), (8, 8)), 64, torch.float32


def quick(device: torch.device = CPU, direction: str = "fwd") -> list[Case]:
    """Return two small cases, equal sequences and ragged ones, and the plan of the first."""
    packs, heads, dim, dtype = defaults(device)
    some = [packs[4], ragged(32768)] if device.type == "cuda" else [packs[2], ragged(1024)]
    jobs = [Job(pack, *heads[0], dim, dtype, device) for pack in some]
    return [*(make_case(job, direction) for job in jobs), plan_case(jobs[0])]


def own(shapes: Shapes, device: torch.device = CPU, direction: str = "fwd") -> list[Case]:
    """Return the cases of the given packs, without cases of plans alone."""
    packs, heads, dim, dtype = defaults(device)
    if shapes.seqlens:
        packs = [given(shapes.seqlens)]
    pairs = [shapes.heads] if shapes.heads else heads
    jobs = [Job(pack, *h, shapes.head_dim or dim, shapes.dtype or dtype, device) for h in pairs for pack in packs]
    return [make_case(job, direction) for job in jobs if direction == "fwd" or not job.pack.used]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the providers of all directions on a device."""
    return list(BACKWARD_PROVIDERS if device.type == "cuda" else CPU_PROVIDERS)


# ---------------------------------------------------------------------------------------------------------------- goals

TERAFLOPS = {"fwd 1x8192 32/8 D128": 640, "bwd 1x8192 32/8 D128": 560}
#: How many times as fast as the best peer, by the longest sequence: up to so many keys, so many times.
TIMES = {"fwd": ((1024, 1.15), (math.inf, 1.0)), "bwd": ((512, 1.5), (1024, 1.3), (math.inf, 1.0))}


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of single calls on a GPU; there is none on a CPU.

    The goals are the best peer's speed at least, and more on short sequences.
    """
    found = []
    singles = [r for r in records if r["timing"] == "events"]
    for r in singles:
        direction = r["case"].split()[0]
        if r["provider"] != "illada" or not r["flops"]:
            continue
        rate = r["flops"] / r["median_ms"] / 1e9
        if (bar := TERAFLOPS.get(r["case"])) is not None:
            found.append(Goal(f"{r['case']}: {rate:.0f} TFLOP/s (goal {bar})", rate >= bar))
        peers = [p for p in singles if p["case"] == r["case"] and not is_ours(p["provider"])]
        longest = (r["counts"] or {}).get("longest")
        if peers and direction in TIMES and longest is not None:
            best = min(peers, key=lambda p: p["median_ms"])
            times = best["median_ms"] / r["median_ms"]
            wanted = next(w for most, w in TIMES[direction] if longest <= most)
            text = f"{r['case']}: {rate:.0f} TFLOP/s, {times:.2f}x the best peer, {best['provider']} (goal {wanted:g}x)"
            found.append(Goal(text, times >= wanted))
    return found
