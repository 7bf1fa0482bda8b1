"""Published implementations, which are peers of ours.

Padded forward passes with all logits, confidence remasking and the loops around it, as LLaDA, iLLaDA and Fast-dLLM
publish them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from illada.config import ModelConfig
from illada.model import Layer, MaskedDiffusionModel, rotary_tables, rotate


def forward(model: MaskedDiffusionModel, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Compute all logits [B, L, V] of padded rows [B, L].

    Torch's attention gets a mask of the keys, [B, 1, 1, L].

    Layers are recomputed in the backward pass where `activation_checkpointing` of the model says so.
    """
    cos, sin = rotary_tables(
        torch.arange(tokens.shape[1], device=tokens.device), model.config, model.embed_tokens.weight.dtype
    )
    x = model.embed_tokens(tokens)
    for layer in cast(Sequence[Layer], model.layers):
        if model.activation_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_layer, model.config, layer, x, cos, sin, key_mask, use_reentrant=False)
        else:
            x = _layer(model.config, layer, x, cos, sin, key_mask)
    return F.linear(model.norm(x), model.head_weight)


def _layer(config: ModelConfig, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return x [B, L, C] after one layer."""
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (y.unflatten(-1, (-1, config.head_size)) for y in attention.qkv_proj(h).split(config.qkv_sizes, dim=-1))
    q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    if key_mask is not None and x.is_cuda:  # there no fused kernel of torch takes a mask and shared keys
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, enable_gqa=True)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return token and confidence of each row of logits [N, V].

    The steps are float64 Gumbel noise, argmax, softmax and gather.
    """
    if temperature == 0:
        noisy = logits
    else:
        wide = logits.to(torch.float64)
        noise = torch.rand_like(wide, dtype=torch.float64)
        noisy = wide.exp() / (-torch.log(noise)) ** temperature
    token = torch.argmax(noisy, dim=-1)
    p = torch.softmax(logits, dim=-1)
    confidence = torch.gather(p, dim=-1, index=token.unsqueeze(-1)).squeeze(-1)
    return token, confidence


def linear_sample(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return what `sample` does, of the logits hidden [N, C] @ weight [V, C]^T."""
    return sample(torch.mm(hidden, weight.t()), temperature)


def commit(
    canvas: Tensor, token: Tensor, confidence: Tensor, mask_id: int, *, quota: int = 0, threshold: float | None = None
) -> None:
    """Commit tokens as published, in place in `canvas` [B, L].

    This takes a topk of each sequence's confidences among its masks.

    quota: so many a sequence. threshold: all that reach it and the surest; here one comparison a sequence, where
    Fast-dLLM asks the device about every token.
    """
    token, confidence = (x.reshape(canvas.shape) for x in (token, confidence))
    mask = canvas == mask_id
    token = torch.where(mask, token, canvas)
    confidence = torch.where(mask, confidence, -torch.inf)
    transfer = torch.zeros_like(canvas, dtype=torch.bool)
    for j in range(confidence.shape[0]):
        if threshold is None:
            _, index = torch.topk(confidence[j], k=quota)
        else:
            surest, index = torch.topk(confidence[j], k=int(mask[j].sum()))
            keep = surest >= threshold
            keep[:1] = True
            index = index[keep]
        transfer[j, index] = True
    canvas[transfer] = token[transfer]


@torch.inference_mode()
def generate(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]],
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    var: bool,
) -> tuple[list[list[int]], int]:
    """Return (new tokens, forward passes) of LLaDA's `generate`, or with `var` of iLLaDA's `var_generate`.

    The latter takes one prompt, as published.

    Prompts of unequal lengths are padded on the left and masked. steps: of a block with `var`, else of all together.
    Temperature 0; nothing stops early.
    """  # fmt: skip
    mask_id, longest, device = model.config.mask_token_id, max(map(len, prompts)), model.embed_tokens.weight.device
    if var and len(prompts) > 1:
        raise ValueError(f"the published loop with growing blocks takes one prompt, got {len(prompts)}")
    lengths = torch.tensor([len(p) for p in prompts])
    canvas = torch.full((len(prompts), longest + (0 if var else gen_length)), mask_id, device=device)
    for row, prompt in zip(canvas, prompts, strict=True):
        row[longest - len(prompt) : longest] = torch.tensor(prompt, device=device)
    blocks, forwards = gen_length // block_length, 0
    steps = steps if var else steps // blocks
    for block in range(blocks):
        if var:
            canvas = torch.cat([canvas, torch.full((1, block_length), mask_id, device=device)], dim=1)
        end = longest + (block + 1) * block_length
        key_mask = None
        if int(lengths.min()) < longest:
            key_mask = (torch.arange(canvas.shape[1]) >= (longest - lengths)[:, None])[:, None, None, :].to(device)
        for step in range(steps):
            logits = forward(model, canvas, key_mask)
            forwards += 1
            token, confidence = sample(logits.flatten(0, 1), 0.0)
            confidence = confidence.view(canvas.shape).clone()
            confidence[:, : end - block_length] = -torch.inf
            confidence[:, end:] = -torch.inf
            quota = block_length // steps + (step < block_length % steps)
            commit(canvas, token, confidence, mask_id, quota=quota)
    return canvas[:, longest : longest + gen_length].tolist(), forwards
