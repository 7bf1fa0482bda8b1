"""The providers of a weighted cross-entropy of hidden states against a head, and of its gradients.

    illada                   the public op on all tokens; it finds the rows with a weight itself
    illada rows              the same, given them, as a data loader would
    illada chunk_rows=1024   the same, with the logits of 1024 rows at a time: least memory
    illada grad_weight       the same, adding the weight's gradient to a given float32 buffer, which is not its memory
    illada filter_eps=2^-12  the same, inexact: without gradients of blocks of small probabilities; fused kernels alone
    eager, compile           F.linear and F.cross_entropy in float32, and the same under torch.compile
    torch chunked            F.linear_cross_entropy with its default chunks; torch 2.13 and newer
    liger                    Liger's fused linear cross-entropy, its logits in as many rows as it likes
    liger tuned              the same with chunks of 4096 rows: fewer passes over the weight's gradient
    liger scaled             Liger's FusedLinearScaledCrossEntropy: sm_90 kernels, elsewhere chunks in plain torch
    cce, cce exact           cut-cross-entropy with and without its filter of small gradients
    quack                    QuACK's chunked_linear_cross_entropy

Peers get the rows with a weight alone, gathered before and not timed. Beyond that in their names:

    all          they get all tokens, those without a weight with the target -100 that peers ignore
    unweighted   they sum over the tokens without weights: all that QuACK can, and what is fastest in others, whose
                 per-token losses need the logits again for the gradients
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import illada

from .runner import compiled, generator, no_compiler
from .timing import CPU

IGNORED = -100  # the target that all peers skip
TUNED_ROWS = 4096

FILTER_EPS = 2.0**-12  # as cut-cross-entropy's for bfloat16

Loss = Callable[..., Tensor]  # (hidden, weight) -> scalar


@dataclass(frozen=True)
class Job:
    """Tokens, some of them with a weight, and the head that their loss is computed with.

    total, masked: the number of tokens, and the share of them that has a weight. The head is [vocab, width].

    spread: standard deviation of a row's logits. 1 is a model at initialisation, whose every probability is small; at 8
        a row's likeliest token has 0.6 of 155,136, as in a trained model. Targets are drawn from the softmax.
    """

    total: int
    masked: float
    width: int
    vocab: int
    spread: float = 1.0
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU

    @property
    def name(self) -> str:
        """The job's part of the names of cases."""
        spread = "" if self.spread == 1 else f" spread={self.spread:g}"
        return f"{self.total} t={self.masked:g} {self.width}x{self.vocab}{spread}"

    @property
    def count(self) -> int:
        """The number of tokens with a weight."""
        return max(1, round(self.total * self.masked))

    def flops(self, direction: str) -> float:
        """Return the floating-point operations of the useful matrix products.

        These are the logits of the rows with a weight, and each of the two gradients.
        """
        return {"fwd": 2.0, "fwdbwd": 6.0}[direction] * self.count * self.vocab * self.width

    def inputs(self) -> Inputs:
        """Return random inputs, the same in every run."""
        random, device = generator(self.device), self.device
        hidden = torch.randn(self.total, self.width, generator=random, device=device).to(self.dtype)
        weight = torch.randn(self.vocab, self.width, generator=random, device=device)
        weight = weight.mul_(self.spread * self.width**-0.5).to(self.dtype)
        rows = torch.randperm(self.total, generator=random, device=device)[: self.count].sort().values
        # 1 / t, from token to token as unequal as the sequences of a pack: t is within half of `masked`, at most 1
        share = self.masked * (0.5 + torch.rand(self.count, generator=random, device=device))
        token_weights = torch.zeros(self.total, device=device)
        token_weights[rows] = 1 / share.clamp(max=1)
        targets = torch.randint(self.vocab, (self.total,), generator=random, device=device)
        for part in rows.split(128):
            probabilities = F.linear(hidden[part], weight).float().softmax(-1)
            targets[part] = torch.multinomial(probabilities, 1, generator=random).squeeze(-1)
        return Inputs(hidden, weight, targets, token_weights, rows.int(), self.total)


@dataclass(frozen=True)
class Inputs:
    """The tensors that a loss is computed from.

    hidden [T, C], weight [V, C], targets int64 [T], token_weights float32 [T], rows int32 [N]: those with a weight.

    normalizer: divides the sum of the losses.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor
    rows: Tensor
    normalizer: int

    @cached_property
    def compact(self) -> Inputs:
        """The inputs without the rows that have no weight."""
        rows = self.rows.long()
        hidden, targets, token_weights = (x[rows] for x in (self.hidden, self.targets, self.token_weights))
        every = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        return replace(self, hidden=hidden, targets=targets, token_weights=token_weights, rows=every)

    @cached_property
    def labels(self) -> Tensor:
        """The targets as peers take them: IGNORED where there is no weight."""
        return self.targets.where(self.token_weights != 0, IGNORED)

    def weigh(self, nll: Tensor) -> Tensor:
        """Return the loss from each token's negative log-likelihood."""
        return nll.float().dot(self.token_weights) / self.normalizer


@dataclass(frozen=True)
class LossProvider:
    """The function by which one provider computes the loss, and what it can do.

    make: inputs -> the loss as a function of (hidden, weight); raises where it cannot.
    everything: whether it gets all tokens, not only the rows with a weight.
    weighted: whether it weighs tokens.
    straight: whether the loss takes grad_weight=, a buffer to which it adds the weight's gradient.
    gradients_alone: whether it differs from another provider only in its gradients; it is not offered without them.
    """

    make: Callable[[Inputs], Loss]
    everything: bool = False
    weighted: bool = True
    straight: bool = False
    gradients_alone: bool = False


# ------------------------------------------------------------------------------------------------------------ providers


def illada_loss(inputs: Inputs, given_rows: bool = False, **more: Any) -> Loss:
    """Return the loss by the public op."""
    more |= {"rows": inputs.rows if given_rows else None, "normalizer": float(inputs.normalizer)}
    function: Callable[..., Any] = partial(illada.linear_masked_cross_entropy, **more)
    return lambda hidden, weight, **into: function(hidden, weight, inputs.targets, inputs.token_weights, **into)


def filtered_loss(inputs: Inputs) -> Loss:
    """Return the loss by the public op with FILTER_EPS.

    It exists only where the op filters: other kernels are exact.
    """
    if illada.ops.raw.linear_masked_cross_entropy_workspace(inputs.hidden, inputs.weight) is None:
        raise NotImplementedError("filter_eps needs the fused kernels: bfloat16 on sm_90a")
    return illada_loss(inputs, filter_eps=FILTER_EPS)


def eager_loss(inputs: Inputs) -> Loss:
    """Return the loss from all logits, which the softmax reads in float32, as under autocast."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return inputs.weigh(F.cross_entropy(logits, inputs.labels, reduction="none", ignore_index=IGNORED))

    return loss


def compiled_loss(inputs: Inputs) -> Loss:
    """Return the loss of `eager_loss` under torch.compile."""
    if why := no_compiler():
        raise NotImplementedError(why)
    return compiled(eager_loss(inputs))


def torch_loss(inputs: Inputs, weighted: bool = True) -> Loss:
    """Return the loss by `F.linear_cross_entropy`, with options: without them it is the same as `eager`."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy; 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return _reduced(inputs, partial(F.linear_cross_entropy, options=options), weighted)


def liger_loss(inputs: Inputs, weighted: bool = True, tuned: bool = False) -> Loss:
    """Return the loss by `liger_fused_linear_cross_entropy`.

    tuned: its chunk_mem_const is such that TUNED_ROWS rows go at once.
    """
    module = _gpu_package(inputs, "liger_kernel.transformers.functional", "liger-kernel")
    rows, width = inputs.hidden.shape
    more = {"chunk_mem_const": liger_constant(rows, width, len(inputs.weight))} if tuned else {}
    return _reduced(inputs, partial(module.liger_fused_linear_cross_entropy, **more), weighted)


def liger_constant(rows: int, width: int, vocab: int) -> int:
    """Return Liger's chunk_mem_const for chunks of TUNED_ROWS rows.

    Liger's chunks have next_power_of_2(rows / ceil(V / (constant C))) rows.
    """
    return -(-vocab // (width * max(1, rows // TUNED_ROWS)))


def liger_scaled_loss(inputs: Inputs) -> Loss:
    """Return the loss by Liger's per-token losses, whose gradients may be weighed."""
    module = _gpu_package(inputs, "liger_kernel.ops", "'liger-kernel[cutedsl]'")
    function = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return lambda hidden, weight: inputs.weigh(function(hidden, weight, inputs.labels))


def cce_loss(inputs: Inputs, exact: bool = False) -> Loss:
    """Return the loss by `cut_cross_entropy.linear_cross_entropy`.

    exact: no gradient is so small that it is left out.
    """
    module = _gpu_package(inputs, "cut_cross_entropy", "cut-cross-entropy")
    return _reduced(inputs, partial(module.linear_cross_entropy, **({"filter_eps": None} if exact else {})), True)


def quack_loss(inputs: Inputs) -> Loss:
    """Return the loss by quack's `chunked_linear_cross_entropy`, which knows no weights.

    Its chunks are the default ones of 4096 rows.
    """
    module = _gpu_package(inputs, "quack.linear_cross_entropy", "quack-kernels")
    return _reduced(inputs, module.chunked_linear_cross_entropy, False)


def _gpu_package(inputs: Inputs, module: str, package: str) -> Any:
    """Return a package of kernels for GPUs; raise an error that says why, where it cannot run."""
    if inputs.hidden.device.type != "cuda":
        raise NotImplementedError("runs on GPUs alone")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; pip install {package} for this peer") from error


def _reduced(inputs: Inputs, function: Callable[..., Tensor], weighted: bool) -> Loss:
    """Return the loss by a function with the arguments (hidden, weight, targets, ignore_index=, reduction=)."""
    # Given here, not left to defaults: the unweighted sum must not become a mean over other tokens.
    function = partial(function, ignore_index=IGNORED, reduction="none" if weighted else "sum")
    if weighted:
        return lambda hidden, weight: inputs.weigh(function(hidden, weight, inputs.labels))
    return lambda hidden, weight: function(hidden, weight, inputs.labels) / inputs.normalizer


PROVIDERS: dict[str, LossProvider] = {
    "illada": LossProvider(illada_loss, everything=True),
    "illada rows": LossProvider(partial(illada_loss, given_rows=True), everything=True),
    "illada chunk_rows=1024": LossProvider(partial(illada_loss, chunk_rows=1024), everything=True),
    "illada grad_weight": LossProvider(illada_loss, everything=True, straight=True, gradients_alone=True),
    "illada filter_eps=2^-12": LossProvider(filtered_loss, everything=True, gradients_alone=True),
    "eager": LossProvider(eager_loss),
    "eager all": LossProvider(eager_loss, everything=True),
    "compile": LossProvider(compiled_loss),
    "compile all": LossProvider(compiled_loss, everything=True),
    "torch chunked": LossProvider(torch_loss),
    "torch chunked unweighted": LossProvider(partial(torch_loss, weighted=False), weighted=False),
    "liger": LossProvider(liger_loss),
    "liger tuned": LossProvider(partial(liger_loss, tuned=True)),
    "liger unweighted": LossProvider(partial(liger_loss, weighted=False), weighted=False),
    "liger tuned unweighted": LossProvider(partial(liger_loss, weighted=False, tuned=True), weighted=False),
    "liger all unweighted": LossProvider(partial(liger_loss, weighted=False), everything=True, weighted=False),
    "liger scaled": LossProvider(liger_scaled_loss),
    "cce": LossProvider(cce_loss),
    "cce all": LossProvider(cce_loss, everything=True),
    "cce exact": LossProvider(partial(cce_loss, exact=True)),
    "quack unweighted": LossProvider(quack_loss, weighted=False),
    "quack all unweighted": LossProvider(quack_loss, everything=True, weighted=False),
}
