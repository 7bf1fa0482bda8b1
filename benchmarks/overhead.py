"""A benchmark of what a call costs beside its work.

Tensors are tiny, so that the kernels need next to no time.

    OP no grad    under torch.no_grad()
    OP grad       the forward pass, whose results know how to go back
    OP both       the forward pass and backward()

`illada raw` calls the kernels with tensors that are already there, `illada registered` is the op of torch.ops.illada,
`illada` the public function, and `torch` is torch's counterpart: scaled_dot_product_attention, cross_entropy weighted
by hand, linear_cross_entropy (the head's product and cross_entropy before torch 2.12), softmax and multinomial. A plan
of attention has none: its peer is the attention that it precedes.

`torch empty op` is the floor: an op of the same schema, registered by torch.library, whose kernel in Python allocates
the results and whose derivative keeps them. For the head's loss it computes the products as well, three with gradients.
No op that is written in Python is cheaper to call through torch's dispatcher. Each timed call is CALLS calls, and its
time is of the processor, not of the clock: what this thread does for a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import illada
from illada.ops import raw

from .runner import Case, Goal, Provider, generator
from .timing import CPU, ThreadClock

DEVICES = ("cpu", "cuda")
MODES = ("no grad", "grad", "both")
#: Calls in one timed call: so many that the clock costs nothing, so few that a turn is short.
CALLS = 40
REPEATS = 9

LENGTH, HEADS = 8, 2  # of the only sequence
ROWS, WIDTH, VOCAB = 8, 16, 32

Calls = dict[str, Callable[[], Any] | None]  # of each provider; None: it has no such call


def _loop(call: Callable[[], Any], mode: str, leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """Return a function that runs `call` CALLS times; `call` returns the tensor that is differentiated."""

    def without_grad() -> None:
        with torch.no_grad():
            for _ in range(CALLS):
                call()

    def forward() -> None:
        for _ in range(CALLS):
            call()

    def both() -> None:
        for _ in range(CALLS):
            out = call()
            out.backward(ones)
            for leaf in leaves:
                leaf.grad = None

    if mode == "both":  # a gradient of ones for what is no scalar, made once
        ones = torch.ones_like(call())
    return {"no grad": without_grad, "grad": forward, "both": both}[mode]


def _empty_op(name: str, kernel: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Return an op with the schema of `illada::name`, this kernel, and a derivative that keeps the results."""
    library = torch.library.Library("illada_overhead", "FRAGMENT")
    _LIBRARIES.append(library)
    overload = getattr(torch.ops.illada, name).default
    defined = library.define(str(overload._schema).removeprefix("illada::").replace(name, f"{name}{len(_LIBRARIES)}"))

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = kernel(*inputs)
            ctx.inputs = inputs
            ctx.save_for_backward(*outputs)
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            assert ctx.saved_tensors
            return tuple(
                torch.empty_like(x) if wanted else None
                for x, wanted in zip(ctx.inputs, ctx.needs_input_grad, strict=True)
            )

    apply = super(torch.autograd.Function, Formula).apply

    def differentiable(keyset: Any, *inputs: Any) -> Any:
        return apply(*inputs) if torch.is_grad_enabled() else kernel(*inputs)

    library.impl(defined, kernel, "CompositeExplicitAutograd")
    library.impl(defined, differentiable, "Autograd", with_keyset=True)
    return getattr(torch.ops.illada_overhead, defined)


_LIBRARIES: list[torch.library.Library] = []  # collected libraries would lose their ops


def _allocating(*like: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Return a kernel that allocates results like these and does nothing else."""
    like = tuple(tensor.detach() for tensor in like)
    return lambda *inputs: tuple(torch.empty_like(tensor) for tensor in like)


def _attention(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    dim, dtype = (16, torch.float32) if device.type == "cpu" else (64, torch.bfloat16)
    q, k, v = (
        torch.randn(LENGTH, HEADS, dim, generator=generator(device, seed), device=device).to(dtype).requires_grad_(grad)
        for seed in range(3)
    )
    batch = [x.detach().transpose(0, 1)[None].contiguous().requires_grad_(grad) for x in (q, k, v)]
    starts = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    plan = illada.attention_plan(starts, num_heads=HEADS, num_kv_heads=HEADS, head_dim=dim, total_q=LENGTH)
    scale = dim**-0.5
    out, lse = torch.empty_like(q), torch.empty(HEADS, LENGTH, device=device)
    bytes_needed = raw.varlen_attention_workspace(LENGTH, 1, HEADS, HEADS, dim) if device.type == "cuda" else 0
    workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=device) if bytes_needed else None

    def raw_call() -> None:
        raw.varlen_attention(out, lse, q, k, v, plan.work, 1, scale, workspace=workspace)

    empty = _empty_op("varlen_attention_fwd", _allocating(out, lse))
    calls: Calls = {
        "illada raw": None if grad else raw_call,
        "illada registered": lambda: torch.ops.illada.varlen_attention_fwd(q, k, v, plan.work, 1, scale, False)[0],
        "illada": lambda: illada.varlen_attention(q, k, v, starts, plan=plan),
        "torch empty op": lambda: empty(q, k, v, plan.work, 1, scale, False)[0],
        "torch": lambda: F.scaled_dot_product_attention(batch[0], batch[1], batch[2]),
    }
    return calls, [q, k, v, *batch]


def _attention_with_plan(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    """Return the calls of attention that make the plan in each call, as callers who keep none do."""
    calls, leaves = _attention(device, grad)
    q, k, v = leaves[:3]
    starts = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    ours = {"illada": lambda: illada.varlen_attention(q, k, v, starts)}
    missing: Calls = {"illada raw": None, "illada registered": None, "torch empty op": None}
    return {**missing, **ours, "torch": calls["torch"]}, leaves


def _plan(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    calls, leaves = _attention(device, grad)
    starts = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    dim = leaves[0].shape[2]
    sizes: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": HEADS, "head_dim": dim, "total_q": LENGTH}
    numbers = (LENGTH, LENGTH, HEADS, HEADS, dim)
    empty = _empty_op("attention_plan", lambda *inputs: starts.new_empty(2, 4))
    return {
        "illada raw": None,
        "illada registered": lambda: torch.ops.illada.attention_plan(starts, None, None, *numbers),
        "illada": lambda: illada.attention_plan(starts, **sizes),
        "torch empty op": lambda: empty(starts, None, None, *numbers),
        "torch": calls["torch"],
    }, leaves


def _tokens(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (targets, token_weights); a half of the tokens have a weight."""
    targets = torch.randint(VOCAB, (ROWS,), generator=generator(device), device=device)
    return targets, 2.0 * (torch.arange(ROWS, device=device) % 2)


def _cross_entropy(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    logits = torch.randn(ROWS, VOCAB, generator=generator(device), device=device).requires_grad_(grad)
    targets, weights = _tokens(device)
    nll, lse, lse_parts = torch.empty(ROWS, device=device), torch.empty(ROWS, device=device), logits.new_empty(ROWS, 2)
    fwd = torch.ops.illada.masked_ce_fwd
    empty = _empty_op("masked_ce_fwd", _allocating(nll.new_empty(()), nll, lse, lse_parts))
    return {
        "illada raw": None
        if grad
        else lambda: raw.masked_cross_entropy(logits, targets, weights, nll=nll, lse=lse, lse_parts=lse_parts),
        "illada registered": lambda: fwd(logits, targets, weights, None, 1 / ROWS, False)[0],
        "illada": lambda: illada.masked_cross_entropy(logits, targets, weights, normalizer=ROWS),
        "torch empty op": lambda: empty(logits, targets, weights, None, 1 / ROWS, False)[0],
        "torch": lambda: (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / ROWS,
    }, [logits]


def _linear_cross_entropy(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    hidden, weight = (
        torch.randn(size, WIDTH, generator=generator(device), device=device).to(dtype).requires_grad_(grad)
        for size in (ROWS, VOCAB)
    )
    targets, weights = _tokens(device)

    arguments = (hidden, weight, targets, weights, None, None, 1 / ROWS, 0, grad, grad, dtype, torch.float32, 0.0)
    nll, nothing = torch.empty(ROWS, device=device), hidden.detach().new_empty(0)

    def multiply(*inputs: Any) -> tuple[Tensor, ...]:
        logits = F.linear(inputs[0], inputs[1])
        gradients = (
            (logits @ inputs[1], logits.t() @ inputs[0])
            if grad
            else (torch.empty_like(nothing), torch.empty_like(nothing))
        )
        return torch.empty((), device=device), torch.empty_like(nll), *gradients

    empty = _empty_op("linear_masked_ce_fwd", multiply)

    def theirs() -> Tensor:
        if hasattr(F, "linear_cross_entropy"):
            return F.linear_cross_entropy(hidden, weight, targets)
        return F.cross_entropy(F.linear(hidden, weight), targets)

    return {
        "illada raw": None,
        "illada registered": lambda: torch.ops.illada.linear_masked_ce_fwd(*arguments)[0],
        "illada": lambda: illada.linear_masked_cross_entropy(hidden, weight, targets, weights, normalizer=ROWS),
        "torch empty op": lambda: empty(*arguments)[0],
        "torch": theirs,
    }, [hidden, weight]


def _sample(device: torch.device, grad: bool) -> tuple[Calls, list[Tensor]]:
    logits = torch.randn(ROWS, VOCAB, generator=generator(device), device=device)
    out = illada.sample_tokens(logits)
    nothing = logits.new_empty(0)
    empty = _empty_op("sample_tokens", _allocating(*out[:3], nothing, nothing))
    arguments = (logits, 1.0, 0, 0, *(None,) * 6, 0, 0, 1.0, None, None, False, False, False)
    return {
        "illada raw": lambda: raw.sample_tokens(out, logits, 1.0),
        "illada registered": lambda: torch.ops.illada.sample_tokens(*arguments)[0],
        "illada": lambda: illada.sample_tokens(logits, temperature=1.0),
        "torch empty op": lambda: empty(*arguments)[0],
        "torch": lambda: torch.multinomial(torch.softmax(logits, -1), 1),
    }, []


#: For each op, a function of a device and of whether gradients are wanted. It returns the op's calls and the tensors
#: that get gradients.
OPS: dict[str, Callable[[torch.device, bool], tuple[Calls, list[Tensor]]]] = {
    "masked_cross_entropy": _cross_entropy,
    "linear_masked_cross_entropy": _linear_cross_entropy,
    "varlen_attention": _attention,
    "varlen_attention without a plan": _attention_with_plan,
    "attention_plan": _plan,
    "sample_tokens": _sample,
}
#: The ops without gradients.
NO_GRADIENTS = ("attention_plan", "sample_tokens")


def case(op: str, mode: str, device: torch.device = CPU) -> Case:
    """Return the case of one op in one mode."""

    def make() -> list[Provider]:
        calls, leaves = OPS[op](device, mode != "no grad")
        return [
            Provider(name, _loop(call, mode, leaves), calls=CALLS)
            if call is not None
            else Provider(name, print, unavailable="no such call")
            for name, call in calls.items()
        ]

    return Case(f"{op} {mode}", make, repeats=REPEATS, timer=ThreadClock())


def cases(device: torch.device = CPU) -> list[Case]:
    """Return the cases of every op without gradients, with them, and with the backward.

    Plans and samples have no gradients.
    """
    return [case(op, mode, device) for op in OPS for mode in (MODES[:1] if op in NO_GRADIENTS else MODES)]


def quick(device: torch.device = CPU) -> list[Case]:
    """Return the cases of an op that takes a plan and of one that takes none."""
    return [case(op, mode, device) for op in ("varlen_attention", "masked_cross_entropy") for mode in MODES[:2]]


def providers(device: torch.device = CPU) -> list[str]:
    """Return the names of the bench's providers on a device."""
    return ["illada raw", "illada registered", "illada", "torch empty op", "torch"]


def rivals(provider: str) -> bool:
    """Return False: no provider is a rival, because the goals are about torch's own overhead."""
    return False


def goals(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals: a registered op takes at most 1.5 times the time of torch's own op."""
    times = {(r["case"], r["provider"]): r["median_ms"] for r in records}
    found = []
    for (name, provider), time in times.items():
        if provider == "illada registered" and (theirs := times.get((name, "torch"))):
            empty = times.get((name, "torch empty op"))
            floor = f"; an empty op: {empty / theirs:.2f}" if empty else ""
            ratio = time / theirs
            found.append(Goal(f"{name}: the op takes {ratio:.2f} of torch's time, at most 1.5{floor}", ratio <= 1.5))
    return found
