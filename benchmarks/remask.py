"""A benchmark of confidence remasking.

A step samples every row of the logits, then commits the surest tokens of each sequence.

    ROWSxVOCAB T=...            the whole step (on a GPU its name begins with "step")
    sample ROWSxVOCAB T=...     sample_tokens alone, against the copy bandwidth
    linear ROWSxCxVOCAB T=...   linear_sample_tokens: the head's matrix product in it
    commit SEQUENCESxROWS ...   remask alone, by quota and by threshold

`published` is the rule as LLaDA and iLLaDA publish it (float64 Gumbel noise, argmax, softmax, gather, a loop of topk
over the sequences); `compile` is the same rule with its tensor part under torch.compile; `mm+...` makes the logits by
torch.mm first, which is cuBLAS on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import illada

from . import ceiling, published, timing
from .runner import Case, Goal, Provider, compiled, generator, no_compiler, on_gpu, ratio
from .shapes import Shapes
from .timing import CPU

DEVICES = ("cpu", "cuda")
OWN = ("rows", "vocab", "hidden", "dtype")

SEQUENCES = 8  # rows of a step are shared out evenly over so many sequences, or fewer where they do not divide
COMMIT = 4  # tokens a sequence commits
THRESHOLD = 0.9
MASK_ID = 5

SHAPES = [(256, 126464), (128, 155136), (32, 155136)]  # rows x vocabulary: LLaDA and iLLaDA blocks
# A GPU: from one row, a block's end, to a batch of 128 such blocks; those with goals first.
CUDA_SHAPES = [(128, 155136), (1024, 155136), (256, 126464), (32, 155136), (1, 155136), (4096, 155136)]
LINEAR_ROWS, WIDTH, VOCAB = [128, 32, 256, 1024, 4096], 4096, 155136
COMMIT_SHAPES = [(1, 32), (32, 32), (128, 64), (1, 8192)]  # sequences x rows of each
TEMPERATURES = [0.0, 1.0]
REPEATS = {"cpu": 9, "cuda": 30}


def random_logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Return random logits [rows, vocab], as peaked as in the middle of a generation."""
    return (2 * torch.randn(rows, vocab, generator=generator(device, seed), device=device)).to(dtype)


def confidence_error(logits: Tensor, result: tuple[Tensor, ...]) -> float:
    """Return the largest relative error of the confidences result[1] [N].

    They are those of the tokens result[0], by the logits [N, V].
    """
    worst = 0.0
    for part in (slice(i, i + 128) for i in range(0, len(logits), 128)):  # float64 of all rows would be gigabytes
        want = logits[part].double().log_softmax(-1).gather(-1, result[0][part].unsqueeze(-1)).squeeze(-1).exp()
        worst = max(worst, float(((result[1][part].double() - want) / want).abs().max()))
    return worst


def _rotate(call: Callable[[int], Any], sets: int, device: torch.device) -> list[Callable[[], Any]]:
    """Return `call` bound to each of the inputs, for a graph; none on a CPU."""
    return [partial(call, i) for i in range(sets)] if device.type == "cuda" else []


def step_case(
    rows: int, vocab: int, temperature: float, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> Case:
    """Return the case of a whole step: sample from random logits [rows, vocab], and commit."""
    sequences = math.gcd(SEQUENCES, rows)
    quota = min(COMMIT, rows // sequences)

    def make() -> list[Provider]:
        sets = timing.input_sets(rows * vocab * dtype.itemsize, device)
        logits = [random_logits(rows, vocab, dtype, device, seed) for seed in range(sets)]
        canvas = torch.full((sequences, rows // sequences), MASK_ID, device=device)
        positions = torch.arange(rows, dtype=torch.int32, device=device)
        cu_rows = torch.arange(0, rows + 1, rows // sequences, dtype=torch.int32, device=device)
        error = partial(confidence_error, logits[0])

        def ours(i: int = 0) -> tuple[Tensor, Tensor]:
            tokens = canvas.flatten().clone()  # a fresh canvas for every call; all providers pay for it
            sample = illada.sample_tokens(logits[i], temperature=temperature, seed=1)
            illada.remask(tokens, positions, cu_rows, sample, quota=quota, mask_id=MASK_ID)
            return sample.token, sample.confidence

        def theirs(sample_function: Callable[[Tensor, float], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            tokens = canvas.clone()
            token, confidence = sample_function(logits[0], temperature)
            published.commit(tokens, token, confidence, MASK_ID, quota=quota)
            return token, confidence

        return [
            Provider("illada", ours, error=error, rotating=_rotate(ours, sets, device)),
            Provider("published", partial(theirs, published.sample), error=error),
            Provider("compile", partial(theirs, compiled(published.sample)), no_compiler(), error=error),
        ]

    return Case(
        name=f"{'step ' if device.type == 'cuda' else ''}{rows}x{vocab} T={temperature:g}",
        make=make,
        bytes=rows * vocab * dtype.itemsize,  # the logits, read once
        repeats=REPEATS[device.type],
        slow={"published"},
    )


def sample_case(
    rows: int, vocab: int, temperature: float, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU
) -> Case:
    """Return the case of `sample_tokens` alone, from random logits [rows, vocab]."""

    def make() -> list[Provider]:
        sets = timing.input_sets(rows * vocab * dtype.itemsize, device)
        logits = [random_logits(rows, vocab, dtype, device, seed) for seed in range(sets)]

        def ours(i: int = 0) -> tuple[Tensor, Tensor]:
            sample = illada.sample_tokens(logits[i], temperature=temperature, seed=1)
            return sample.token, sample.confidence

        error = partial(confidence_error, logits[0])
        return [Provider("illada", ours, error=error, rotating=_rotate(ours, sets, device))]

    return Case(
        name=f"sample {rows}x{vocab} T={temperature:g}",
        make=make,
        bytes=rows * vocab * dtype.itemsize,  # the logits, read once; the results are 16 bytes a row
        repeats=REPEATS[device.type],
    )


def linear_case(
    rows: int,
    width: int,
    vocab: int,
    temperature: float,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
) -> Case:
    """Return the case of `linear_sample_tokens` of hidden [rows, width] and weight [vocab, width].

    The logits are as peaked as in other cases.
    """

    def make() -> list[Provider]:
        random = generator(device)
        weight = (2 * width**-0.5 * torch.randn(vocab, width, generator=random, device=device)).to(dtype)
        # The weight alone is many times the L2 cache, so two sets of hidden states are as cold as more.
        hidden = [torch.randn(rows, width, generator=random, device=device).to(dtype) for _ in range(2)]
        sampled = min(rows, 32)  # float32 logits of the first rows are truth enough: 16-bit ones are far from them
        exact = torch.cat([hidden[0][:sampled].float() @ part.float().t() for part in weight.chunk(16)], dim=1)

        def error(result: tuple[Tensor, Tensor]) -> float:
            return confidence_error(exact, tuple(x[:sampled] for x in result))

        def ours(i: int = 0) -> tuple[Tensor, Tensor]:
            sample = illada.linear_sample_tokens(hidden[i], weight, temperature=temperature, seed=1)
            return sample.token, sample.confidence

        def mm_ours(i: int = 0) -> tuple[Tensor, Tensor]:
            sample = illada.sample_tokens(torch.mm(hidden[i], weight.t()), temperature=temperature, seed=1)
            return sample.token, sample.confidence

        peer = partial(published.linear_sample, hidden[0], weight, temperature)
        fused = partial(compiled(published.linear_sample), hidden[0], weight, temperature)
        return [
            Provider("illada", ours, error=error, rotating=_rotate(ours, 2, device)),
            Provider("mm+illada", mm_ours, error=error, rotating=_rotate(mm_ours, 2, device)),
            Provider("mm+published", peer, error=error),
            Provider("mm+compile", fused, no_compiler(), error=error),
        ]

    return Case(
        name=f"linear {rows}x{width}x{vocab} T={temperature:g}",
        make=make,
        flops=2.0 * rows * width * vocab,  # the matrix product
        dtype=dtype,
        bytes=(vocab + rows) * width * dtype.itemsize,  # weight and hidden states, read once; no logits
        repeats=REPEATS[device.type],
        slow={"mm+published"},
    )


def commit_case(sequences: int, rows: int, rule: str, device: torch.device = CPU) -> Case:
    """Return the case of `remask` alone, with `rows` masks in each sequence.

    Confidences are spread evenly over [0, 1). rule: quota or threshold.
    """
    limit: dict[str, Any] = {"quota": COMMIT} if rule == "quota" else {"threshold": THRESHOLD}
    total = sequences * rows

    def make() -> list[Provider]:
        random = generator(device)
        token = torch.randint(MASK_ID + 1, 1000, (total,), generator=random, device=device)
        confidence = torch.rand(total, generator=random, device=device)
        sample = illada.TokenSample(token, confidence, confidence.log())
        canvas = torch.full((sequences, rows), MASK_ID, device=device)
        positions = torch.arange(total, dtype=torch.int32, device=device)
        cu_rows = torch.arange(0, total + 1, rows, dtype=torch.int32, device=device)

        def ours() -> Tensor:
            tokens = canvas.flatten().clone()  # a fresh canvas for every call, also in `theirs`
            illada.remask(tokens, positions, cu_rows, sample, mask_id=MASK_ID, **limit)
            return tokens

        def theirs() -> Tensor:
            tokens = canvas.clone()
            published.commit(tokens, token, confidence, MASK_ID, **limit)
            return tokens

        expected = theirs().flatten()

        def error(tokens: Tensor) -> float:
            """Return the share of the canvas that differs from the published rule's result."""
            return float((tokens.flatten() != expected).double().mean())

        # In a graph over one input: it is small and, in use, in the cache, where the sampler has just put it.
        rotating = [ours] if device.type == "cuda" else []
        return [Provider("illada", ours, error=error, rotating=rotating), Provider("published", theirs, error=error)]

    return Case(
        name=f"commit {sequences}x{rows} {rule}",
        make=make,
        # each row's token, confidence, position and canvas, read once; the canvas written is the caller's copy
        bytes=total * (8 + 4 + 4 + 8),
        repeats=REPEATS[device.type],
        slow={"published"},
    )


def cases(device: torch.device = CPU) -> list[Case]:
    """Return the cases of the device.

    CPU: the step in all shapes and temperatures. GPU: each part, then the step.
    """
    if device.type != "cuda":
        return [step_case(rows, vocab, t) for rows, vocab in SHAPES for t in TEMPERATURES]
    return [
        *(sample_case(rows, vocab, t, device=device) for rows, vocab in CUDA_SHAPES for t in TEMPERATURES),
        *(linear_case(rows, WIDTH, VOCAB, 1.0, device=device) for rows in LINEAR_ROWS),
        *(commit_case(*shape, rule, device) for shape in COMMIT_SHAPES for rule in ("quota", "threshold")),
        *(step_case(rows, vocab, t, device=device) for rows, vocab in CUDA_SHAPES for t in TEMPERATURES),
    ]


def quick(device: torch.device = CPU) -> list[Case]:
    """Return the cases of one shape of each kind."""
    if device.type != "cuda":
        return [step_case(*SHAPES[-1], t) for t in TEMPERATURES]
    return [
        sample_case(*CUDA_SHAPES[0], 1.0, device=device),
        linear_case(LINEAR_ROWS[0], WIDTH, VOCAB, 1.0, device=device),
        commit_case(*COMMIT_SHAPES[1], "quota", device), step_case(*CUDA_SHAPES[0], 1.0, device=device),
    ]  # fmt: skip


def own(shapes: Shapes, device: torch.device = CPU) -> list[Case]:
    """Return steps of these shapes; with a width, the head's product and sampling."""
    dtype, default = shapes.dtype or torch.bfloat16, CUDA_SHAPES if device.type == "cuda" else SHAPES
    found = []
    for rows, vocab in dict.fromkeys((shapes.rows or rows, shapes.vocab or vocab) for rows, vocab in default):
        for t in TEMPERATURES:
            step = step_case(rows, vocab, t, dtype, device)
            found.append(linear_case(rows, shapes.hidden, vocab, t, dtype, device) if shapes.hidden else step)
    return found


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    names = ("illada", "published", "compile")
    return [*names, *(f"mm+{name}" for name in names)]


def _peer_goals(records: Sequence[dict[str, Any]], case: str, bars: dict[str, float]) -> list[Goal]:
    found = []
    for provider, bar in bars.items():
        times = ratio(records, case, provider)
        if times is not None:
            found.append(Goal(f"{case}: {times:.1f}x faster than {provider} (goal {bar:g}x)", times >= bar))
    return found


def cpu_goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals on a CPU, at 256 rows.

    30x the published rule and 2x compile at temperature 1, 8x and 1.5x at temperature 0.
    """
    return [
        *_peer_goals(records, "256x126464 T=1", {"published": 30.0, "compile": 2.0}),
        *_peer_goals(records, "256x126464 T=0", {"published": 8.0, "compile": 1.5}),
    ]


def cuda_goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals on a GPU.

    In graphs: sampling at 90% of the copy bandwidth from 1024 rows on, the step in 25 us at 128 rows, the head and
    sampling in 450 us up to 128 rows. In single calls at temperature 1: 30x the published rule and 3x compile.
    """
    found = []
    for r in records:
        if r["provider"] != "illada" or r["timing"] != "graph":
            continue
        kind, _, shape = r["case"].partition(" ")
        rows = int(shape.split("x")[0])
        us = 1e3 * r["median_ms"]
        share = ceiling.share(records, r, "bytes")
        if kind == "sample" and rows >= 1024 and share is not None:
            found.append(Goal(f"{r['case']}: {share:.0%} of copy bandwidth (goal 90%)", share >= 0.9))
        if kind == "step" and rows == 128:
            found.append(Goal(f"{r['case']}: {us:.1f} us (goal 25 us)", us <= 25))
        if kind == "linear" and rows <= 128:
            found.append(Goal(f"{r['case']}: {us:.0f} us (goal 450 us)", us <= 450))
    for rows, vocab in CUDA_SHAPES[:3]:
        found += _peer_goals(records, f"step {rows}x{vocab} T=1", {"published": 30.0, "compile": 3.0})
    return found


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the device that the records are from."""
    return (cuda_goals if any(map(on_gpu, records)) else cpu_goals)(records)
