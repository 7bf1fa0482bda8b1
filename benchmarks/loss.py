"""A benchmark of the loss of masked diffusion.

This is linear masked cross-entropy of packed tokens, with a weight for each.

    DIRECTION TOKENS t=SHARE CxV     fwdbwd: loss and both gradients; fwd: the loss alone, without autograd

SHARE of the tokens are masked, with a weight; t=1 is what a compacted batch is. `loss_providers` has the peers. FLOPs
are those of the masked rows, whoever computes more: 2 N V C for the logits and as many for each gradient. Memory is
what one call takes beyond inputs, loss and gradients.

Errors are relative norms against float64, of the loss and of sampled rows of the gradients, each in its own column; the
worst is `error`. No provider is left out for being wrong. "dW rest" looks at the tokens that are nobody's target: their
gradients are so small that the norm of all does not show whether a provider drops them. Filters of small gradients drop
nearly all of them where logits are as at initialisation, and few at --spread 8, as after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import loss_providers, timing
from .loss_providers import PROVIDERS, Inputs, Job, LossProvider
from .runner import Case, Goal, Provider, on_gpu, ratio, reason
from .shapes import Shapes
from .timing import CPU

DEVICES = ("cpu", "cuda")
DIRECTIONS = ("fwd", "fwdbwd")
SPREAD = 1.0  # the default
OWN = ("rows", "hidden", "vocab", "dtype")
PROVIDERS_DOC = loss_providers.__doc__

REPEATS = {"cpu": 5, "cuda": 15}
SAMPLED = 256  # rows of each gradient that are compared

# tokens, masked share, width, vocabulary: iLLaDA's, LLaDA's, Qwen's; first those with goals
SHAPES = [
    *((8192, t, 4096, 155136) for t in (0.5, 0.1, 0.9)),
    *((rows, 1.0, 4096, 155136) for rows in (4096, 1024, 2048, 8192, 1000, 4095)),
    *((rows, 1.0, 4096, vocab) for vocab in (126464, 151936) for rows in (1024, 2048, 4096, 8192)),
    *((rows, 1.0, 2048, vocab) for vocab in (155136, 126464, 151936) for rows in (1024, 2048, 4096, 8192)),
]
CPU_SHAPES = [*((512, t, 256, 16384) for t in (0.5, 0.1, 0.9)), (256, 1.0, 256, 16384), (100, 1.0, 256, 16384)]


def bind(provider: LossProvider, inputs: Inputs, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call on these inputs: (loss,) of fwd, (loss, d_hidden, d_weight) of fwdbwd.

    With a provider that is `straight`, d_weight is a buffer that begins at zero: after a call what was added to it.
    """
    mine = inputs if provider.everything else inputs.compact
    function = provider.make(mine)
    if direction == "fwd":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(mine.hidden, mine.weight),)

        return forward
    leaves = [x.detach().requires_grad_() for x in (mine.hidden, mine.weight)]
    if provider.straight:
        buffer = torch.zeros_like(mine.weight, dtype=torch.float32)

        def straight() -> tuple[Tensor, ...]:
            loss = function(*leaves, grad_weight=buffer)
            return (loss.detach(), *torch.autograd.grad(loss, leaves[:1]), buffer)

        return straight

    def both() -> tuple[Tensor, ...]:
        loss = function(*leaves)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    return both


# --------------------------------------------------------------------------------------------------------------- errors


def spaced(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return at most `wanted` evenly spaced indices below `count`, with the first and the last."""
    return torch.linspace(0, count - 1, min(count, wanted), dtype=torch.float64, device=device).round().long()


class Exact:
    """The loss in float64, with the gradients of a sample of hidden states and of rows of the head.

    The sample has SAMPLED hidden states, targets and tokens that are nobody's target.

    All rows meet the whole head, in parts: a gradient that is looked at is the complete one.
    """

    def __init__(self, inputs: Inputs, direction: str):
        self.inputs, compact, device = inputs, inputs.compact, inputs.hidden.device
        hidden, targets = compact.hidden.double(), compact.targets
        log_sum = torch.full((len(targets),), -torch.inf, dtype=torch.float64, device=device)
        for part in compact.weight.split(4096):
            log_sum = torch.logaddexp(log_sum, (hidden @ part.double().t()).logsumexp(-1))
        self.nll = log_sum - (hidden * compact.weight[targets].double()).sum(-1)
        if direction == "fwd":
            return
        self.rows = spaced(len(targets), SAMPLED, device)
        is_target = torch.zeros(len(compact.weight), dtype=torch.bool, device=device)
        is_target[targets] = True
        aimed, rest = is_target.nonzero().squeeze(-1), is_target.logical_not_().nonzero().squeeze(-1)
        self.aimed, self.rest = (x[spaced(len(x), SAMPLED, device)] if len(x) else x for x in (aimed, rest))

        self.d_hidden = -compact.weight[targets[self.rows]].double()  # of nll, to be weighed
        for part in compact.weight.split(4096):
            part = part.double()
            self.d_hidden += (hidden[self.rows] @ part.t() - log_sum[self.rows, None]).exp() @ part
        self.hidden = hidden
        self.d_logits = {}
        for name, tokens in (("aimed", self.aimed), ("rest", self.rest)):
            p = (hidden @ compact.weight[tokens].double().t() - log_sum[:, None]).exp()
            self.d_logits[name] = p - (targets[:, None] == tokens).double()

    def errors(self, provider: LossProvider, result: tuple[Tensor, ...]) -> dict[str, float]:
        """Return the relative errors of what `bind`'s call returned."""
        weights = self.inputs.compact.token_weights.double() / self.inputs.normalizer
        if not provider.weighted:
            weights = torch.full_like(weights, 1 / self.inputs.normalizer)
        found = {"loss error": relative(result[0], weights.dot(self.nll))}
        if len(result) == 1:
            return found
        _, d_hidden, d_weight = result
        want = self.d_hidden * weights[self.rows, None]
        masked = self.inputs.rows.long()
        got = d_hidden[masked[self.rows] if provider.everything else self.rows].double()
        if provider.everything:  # nothing may flow to tokens without a weight
            others = torch.ones(len(d_hidden), dtype=torch.bool, device=masked.device)
            others[masked] = False
            stray = d_hidden[others].double()
            got, want = torch.cat([got, stray]), torch.cat([want, torch.zeros_like(stray)])
        found["dX error"] = relative(got, want)
        gradients = {name: (d * weights[:, None]).t() @ self.hidden for name, d in self.d_logits.items()}
        found["dW error"] = relative(d_weight[torch.cat([self.aimed, self.rest])], torch.cat([*gradients.values()]))
        if len(self.rest):
            found["dW rest"] = relative(d_weight[self.rest], gradients["rest"])
        return found


def relative(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want|, of the norms.

    It is inf where a result is NaN, which no comparison would show.
    """
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else torch.inf


# ---------------------------------------------------------------------------------------------------------------- cases


def make_case(job: Job, direction: str = "fwdbwd", names: Sequence[str] | None = None) -> Case:
    """Return the case of one job in one direction by all providers, or by those of these names."""

    def offer(name: str, provider: LossProvider, inputs: Inputs, exact: Exact) -> Provider:
        try:
            call = bind(provider, inputs, direction)
        except Exception as error:  # not installed, not in this version of torch, not for this device
            if name == "illada" and not isinstance(error, NotImplementedError):
                raise
            return Provider(name, lambda: None, unavailable=reason(error))

        def worst(result: tuple[Tensor, ...]) -> float:
            found = exact.errors(provider, result)
            return max(found[key] for key in ("loss error", "dX error", "dW error") if key in found)

        def counts(result: tuple[Tensor, ...]) -> dict[str, float]:
            return {"rows": job.count, **exact.errors(provider, result)}

        # A buffer that was there before is not this call's.
        made = (lambda: call()[:2]) if provider.straight else call
        memory = partial(timing.extra_memory, made, job.device)
        return Provider(name, call, error=worst, counts=counts, memory=memory)

    def make() -> list[Provider]:
        inputs = job.inputs()
        exact = Exact(inputs, direction)
        # Where every token has a weight, all tokens are the rows that peers get anyway.
        offered = {
            name: provider for name, provider in PROVIDERS.items() if job.count < job.total or " all" not in name
        }
        return [
            offer(name, provider, inputs, exact)
            for name, provider in offered.items()
            if (direction == "fwdbwd" or not provider.gradients_alone) and (names is None or name in names)
        ]

    return Case(
        name=f"{direction} {job.name}",
        make=make,
        flops=job.flops(direction),
        dtype=job.dtype,
        repeats=REPEATS[job.device.type],
        slow={"eager all", "compile all"},
    )


def cases(device: torch.device = CPU, direction: str = "fwdbwd", spread: float = SPREAD) -> list[Case]:
    """Return the cases of the paper's 8192 tokens, then of compacted rows, for all heads.

    On a CPU they are small and float32.
    """
    on_gpu = device.type == "cuda"
    shapes, dtype = (SHAPES, torch.bfloat16) if on_gpu else (CPU_SHAPES, torch.float32)
    return [make_case(Job(*shape, spread, dtype, device), direction) for shape in shapes]


def quick(device: torch.device = CPU, direction: str = "fwdbwd", spread: float = SPREAD) -> list[Case]:
    """Return the case of one compacted batch."""
    shape, dtype = (
        ((1024, 1.0, 4096, 155136), torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[-2], torch.float32)
    )
    return [make_case(Job(*shape, spread, dtype, device), direction)]


def own(shapes: Shapes, device: torch.device = CPU, direction: str = "fwdbwd", spread: float = SPREAD) -> list[Case]:
    """Return the cases of the given heads, on the given rows or in the bench's batches."""
    default, dtype = (SHAPES, torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES, torch.float32)
    found = dict.fromkeys(
        (*((shapes.rows, 1.0) if shapes.rows else (total, share)), shapes.hidden or width, shapes.vocab or vocab)
        for total, share, width, vocab in default
    )
    return [make_case(Job(*shape, spread, shapes.dtype or dtype, device), direction) for shape in found]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    return list(PROVIDERS)


def rivals(provider: str) -> bool:
    """Return whether this peer weighs tokens and computes all gradients."""
    return "unweighted" not in provider and provider not in ("cce", "cce all")


# ---------------------------------------------------------------------------------------------------------------- goals

PAPER = "fwdbwd 8192 t=0.5 4096x155136"
THREE_PRODUCTS = ("torch chunked unweighted", "liger tuned unweighted", "quack unweighted")
#: Times as fast as these, each of which weighs tokens; and as the best of THREE_PRODUCTS, which need not.
TIMES = {"liger scaled": 1.4, "liger": 2.5}
MEMORY = {"illada": 1.4, "illada chunk_rows=1024": 0.4}  # GB


def _times(ours: float, theirs: float) -> float:
    """Return one error divided by the other.

    It is 1 where they are equal, also at 0 or infinity. NaN counts as infinite, as `max` may pass over it.
    """
    if ours == theirs:
        return 1.0
    times = ours / theirs if theirs else math.inf
    return math.inf if math.isnan(times) else times


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of fwdbwd, met or missed.

    Errors are at most twice eager's. On a GPU the paper's case takes 21 ms and little memory, and every case is faster
    than the peers. On a CPU it takes half the memory of all logits. Filters, ours and peers', are inexact and have no
    goals.
    """
    found = []
    for case in dict.fromkeys(r["case"] for r in records):
        mine = {r["provider"]: r for r in records if r["case"] == case}
        if "illada" not in mine:
            continue
        ours = mine["illada"]
        if not case.startswith("fwdbwd"):
            continue
        if "eager" in mine:
            theirs, errors = _errors(mine["eager"]), _errors(ours)
            times = max((_times(errors[key], theirs[key]) for key in errors.keys() & theirs.keys()), default=None)
        else:
            times = None
        if times is not None:
            found.append(Goal(f"{case}: {times:.1f} times the error of eager (goal 2)", times <= 2))
        if not on_gpu(ours):
            memory = ratio(records, case, "eager all", "peak_memory_bytes")
            if memory is not None:
                found.append(Goal(f"{case}: {memory:.1f}x less memory than eager all (goal 2x)", memory >= 2))
            continue
        if case == PAPER:
            found.append(Goal(f"{case}: {ours['median_ms']:.1f} ms (goal 21 ms)", ours["median_ms"] <= 21))
            for name, bar in MEMORY.items():
                if name in mine and mine[name]["peak_memory_bytes"] is not None:
                    used = mine[name]["peak_memory_bytes"] / 1e9
                    found.append(Goal(f"{case}: {name} takes {used:.2f} GB (goal {bar:g} GB)", used <= bar))
        best = min((p for p in THREE_PRODUCTS if p in mine), key=lambda p: mine[p]["median_ms"], default=None)
        for name, bar in {**TIMES, **({best: 1.05} if best else {})}.items():
            if (times_as_fast := ratio(records, case, name)) is not None:
                found.append(
                    Goal(f"{case}: {times_as_fast:.2f}x faster than {name} (goal {bar:g}x)", times_as_fast >= bar)
                )
    return found


def _errors(record: dict[str, Any]) -> dict[str, float]:
    """Return the errors of a record's gradients.

    The loss is left out: it is one number, which is right by chance now and then.
    """
    counts = record["counts"] or {}
    return {key: counts[key] for key in ("dX error", "dW error", "dW rest") if key in counts}
