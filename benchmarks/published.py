"""Confidence remasking as LLaDA, iLLaDA and Fast-dLLM publish it: what people run today, and the peer of ours."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token and confidence of each row of logits [N, V]: float64 Gumbel noise, argmax, softmax, gather."""
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
    """The same of the logits hidden [N, C] @ weight [V, C]^T."""
    return sample(torch.mm(hidden, weight.t()), temperature)


def commit(
    canvas: Tensor, token: Tensor, confidence: Tensor, mask_id: int, *, quota: int = 0, threshold: float | None = None
) -> None:
    """The published transfer: a topk of each sequence's confidences among its masks. canvas [B, L], in place.

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
