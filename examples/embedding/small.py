"""Shared parts of the recipes beside this file: a small model, batches of unequal sizes, and the expected step."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
VOCAB, MASK, IGNORE = 97, 5, -100


class Block(nn.Module):
    """A layer of a Transformer; `attend` is attention on q, k, v [B, L, H, D]."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend, self.norm = attend, nn.RMSNorm(32)
        self.qkv, self.out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).unbind(-3)
        return x + self.out(self.attend(q, k, v).flatten(-2))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Decoder(nn.Module):
    """A small Transformer under torchtitan's names; `_skip_lm_head` leaves out the head."""

    _skip_lm_head = False

    def __init__(self, attend=sdpa) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings, self.norm = nn.Embedding(VOCAB, 32), nn.RMSNorm(32)
        self.layers = nn.ModuleDict({str(i): Block(attend) for i in range(2)})
        self.lm_head = nn.Linear(32, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        h = self.norm(h)
        return h if self._skip_lm_head else self.lm_head(h)


def small_qwen() -> nn.Module:
    """Return a small Qwen2 of transformers, which its config makes bidirectional, to compare `patch` with."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, is_causal=False, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def batches(rank: int = RANK) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of a process in one step: (tokens with masks, labels), no two with as many labels."""
    made = []
    for i in range(2):
        generator = torch.Generator().manual_seed(2 * rank + i)
        tokens = torch.randint(6, VOCAB, (2, 8 + 4 * i + rank), generator=generator)
        masked = torch.rand(tokens.shape, generator=generator) < 0.3 + 0.4 * i
        made.append((tokens.masked_fill(masked, MASK), tokens.masked_fill(~masked, IGNORE)))
    return made


def count(labels: list[Tensor]) -> Tensor:
    """Return the number of labels that all processes have in this step."""
    number = sum((x != IGNORE).sum() for x in labels)
    if dist.is_initialized():
        dist.all_reduce(number)
    return number


def expected(model: nn.Module, logits_of) -> dict[str, Tensor]:
    """Return the parameters after one step of SGD (learning rate 1) on all batches of all processes, in plain torch."""
    model = copy.deepcopy(model)
    every = [batch for rank in range(WORLD) for batch in batches(rank)]
    for tokens, labels in every:
        nll = F.cross_entropy(logits_of(model, tokens).flatten(0, 1), labels.flatten(), reduction="sum")
        (nll / sum((y != IGNORE).sum() for _, y in every)).backward()
    return {name: (p - p.grad).detach() for name, p in model.named_parameters()}


def compare(model: nn.Module, want: dict[str, Tensor]) -> None:
    """Raise AssertionError unless the parameters are those of the expected step."""
    for name, parameter in model.named_parameters():
        got = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(got.detach(), want[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    print(f"rank {RANK} of {WORLD}: the step is that of one pass over all batches in plain torch")
