"""What a training run takes: parameters, memory, FLOP and time, by arithmetic, without allocating anything.

Symbols are those of the glossary: C, H, G, D and V; F is intermediate_size, L the number of layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from illada.config import ModelConfig
from illada.ops.linear_loss.chunks import chunk_rows_of
from illada.train.config import TrainConfig
from illada.train.schedule import Schedule

GIB = 2**30
_BACKWARD_PRODUCTS = 2.5  # FLOP of attention's backward by those of its forward: 5 products by 2


@dataclass(frozen=True)
class Estimate:
    """The needs of a run.

    Attributes:
        parameters: Number of parameters, a tied head counted once.
        tokens_per_step: Tokens of an optimizer step.
        steps: Optimizer steps, by what is known before the run: fewer than train.steps if the decay ends it.
        tokens: Tokens of the whole run.
        flop_per_step: FLOP of a step's products, forward and backward, without recomputation: each window one sequence,
            half of its tokens masked.
        state_bytes: Weights, gradients and AdamW's two moments in float32 of one process.
        activation_bytes: What the backward pass needs of one micro-batch, without the loss.
        loss_bytes: Logits of the loss's largest chunk, and the gradient of the hidden states.
        ranks: Ranks over which FSDP shards the state in `sharded_bytes`.
        sharded_bytes: State of one rank under FSDP, with one layer gathered.
        seconds_per_step: Time of a step on `ranks` devices at the given rate and utilisation; None: no rate given.
    """

    parameters: int
    tokens_per_step: int
    steps: int
    tokens: int
    flop_per_step: float
    state_bytes: int
    activation_bytes: int
    loss_bytes: int
    ranks: int
    sharded_bytes: int
    seconds_per_step: float | None

    @property
    def peak_bytes(self) -> int:
        """Memory of one process that holds the whole state."""
        return self.state_bytes + self.activation_bytes + self.loss_bytes

    def to_dict(self) -> dict[str, float | int | None]:
        """Return all values by name, for JSON."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def estimate(
    config: TrainConfig, model: ModelConfig, *, ranks: int = 1, peak_tflops: float | None = None, mfu: float = 0.4
) -> Estimate:
    """Estimate what a run takes.

    Args:
        config: Of the run.
        model: Its architecture, `config.model_config(...)`.
        ranks: Devices that share the work of a step, and over which FSDP would shard the state.
        peak_tflops: Dense peak of one device in TFLOP/s, for example 989 for bfloat16 on H100 and H200.
        mfu: Share of that peak that a step reaches, in (0, 1].

    Returns:
        The estimate. Activations are those that autograd keeps for the layers as written; allocators add to them.

    Raises:
        ValueError: ranks, peak_tflops or mfu is out of range.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be positive, got {ranks}")
    if peak_tflops is not None and not 0 < peak_tflops < float("inf"):
        raise ValueError(f"peak_tflops must be positive, got {peak_tflops}")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be in (0, 1], got {mfu}")
    window, windows = config.data.window, config.train.windows_per_step
    steps = Schedule(config.train.steps, config.optimizer, config.schedule).end
    element = 2 if config.train.dtype == "bfloat16" else 4
    micro_tokens = config.train.windows_per_micro_batch * window
    layer = _layer_parameters(model)
    sharded = 16 * -(-model.num_parameters // ranks) + (4 * layer if ranks > 1 else 0)
    flop = flop_of(model, [window] * windows, masked=windows * window / 2)
    seconds = None if peak_tflops is None else flop / (peak_tflops * 1e12 * mfu * ranks)
    return Estimate(
        parameters=model.num_parameters,
        tokens_per_step=windows * window,
        tokens=windows * window * steps,
        steps=steps,
        flop_per_step=flop,
        state_bytes=16 * model.num_parameters,
        activation_bytes=_activation_bytes(model, micro_tokens, element, config.train.activation_checkpointing),
        loss_bytes=_loss_bytes(model, micro_tokens, config),
        ranks=ranks,
        sharded_bytes=sharded,
        seconds_per_step=seconds,
    )


def flop_of(model: ModelConfig, lengths: list[int], masked: float) -> float:
    """Return the FLOP of one forward and backward pass, products of the layers and of the head.

    Each parameter of a projection takes 2 FLOP a token in the forward pass and 4 in the backward pass. Attention takes
    4 H D n^2 in the forward pass of a sequence of n tokens.

    Args:
        model: The architecture.
        lengths: Tokens of each sequence.
        masked: Masked tokens, the only ones with logits.
    """
    projections = model.num_hidden_layers * _projection_parameters(model)
    attention = 4.0 * model.num_attention_heads * model.head_size * sum(n * n for n in lengths)
    return (
        6.0 * projections * sum(lengths)
        + (1 + _BACKWARD_PRODUCTS) * model.num_hidden_layers * attention
        + 6.0 * model.hidden_size * model.vocab_size * masked
    )


def _projection_parameters(model: ModelConfig) -> int:
    c = model.hidden_size
    return sum(model.qkv_sizes) * c + model.qkv_sizes[0] * c + 3 * c * model.intermediate_size


def _layer_parameters(model: ModelConfig) -> int:
    return _projection_parameters(model) + 2 * model.hidden_size + (sum(model.qkv_sizes) if model.qkv_bias else 0)


def _activation_bytes(model: ModelConfig, tokens: int, element: int, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps of `tokens` tokens: of all layers, or of one and each layer's input."""
    c, f, (q, k, _) = model.hidden_size, model.intermediate_size, model.qkv_sizes
    # The residual stream is float32: input and normalized input of a norm; lse as well. In the computation's dtype are
    # the results of two norms, q, k, v before and (q and k) within and after RoPE, out, and four tensors of the MLP.
    norm = 4 * 2 * c
    layer = 2 * norm + element * (2 * c + (q + 2 * k) + 2 * (q + k) + q + 4 * f) + 4 * model.num_attention_heads
    inputs = model.num_hidden_layers * 4 * c
    return tokens * (norm + (inputs + layer if checkpointing else model.num_hidden_layers * layer))


def _loss_bytes(model: ModelConfig, tokens: int, config: TrainConfig) -> int:
    """Return the bytes of one chunk of logits, and of the gradient of the hidden states."""
    dtype = getattr(torch, config.train.dtype)
    rows = chunk_rows_of(tokens, model.vocab_size, dtype, is_cuda=config.train.device != "cpu")
    return (min(rows, tokens) * model.vocab_size + tokens * model.hidden_size) * dtype.itemsize


def describe(found: Estimate, config: TrainConfig) -> list[str]:
    """Return the lines of `illada train --dry-run`."""
    windows, window = config.train.windows_per_step, config.data.window
    lines = [
        f"parameters        {found.parameters:,}",
        f"tokens a step     {found.tokens_per_step:,} ({windows:,} windows of {window:,}); "
        f"{found.tokens:,} in {found.steps:,} steps",
        f"FLOP a step       {found.flop_per_step:.3g} (half of the tokens masked); "
        f"{found.flop_per_step * found.steps:.3g} in the run",
        f"weights, gradients, moments (float32)   {_size(found.state_bytes)}",
        f"activations of a micro-batch            {_size(found.activation_bytes)}"
        + (" (recomputed in the backward pass)" if config.train.activation_checkpointing else ""),
        f"loss                                    {_size(found.loss_bytes)}",
        f"one process                             {_size(found.peak_bytes)}",
    ]
    if found.ranks > 1:
        total = found.sharded_bytes + found.activation_bytes + found.loss_bytes
        lines.append(f"one of {found.ranks:,} ranks, state sharded (FSDP)   {_size(total)}")
    if found.seconds_per_step is not None:
        run = found.seconds_per_step * found.steps
        lines.append(
            f"time on {found.ranks:,} device{'s' if found.ranks > 1 else ''}"
            f"   {found.seconds_per_step:.3g} s a step, {_duration(run)} in all"
        )
    return lines


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
