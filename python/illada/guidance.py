"""Classifier-free guidance, for generation and scoring."""

from __future__ import annotations

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Apply classifier-free guidance to hidden states: un + (w + 1) (cond - un), computed in float32.

    The head is linear, so guiding the hidden states guides the logits, and the head runs once.

    Args:
        conditional: [N, C], hidden states with the prompt.
        unconditional: [N, C], hidden states with the prompt masked.
        scale: w >= 0, or float32 [N, 1]; 0 returns `conditional`, up to rounding.

    Returns:
        [N, C], in the dtype of `conditional`.
    """
    with_prompt, without = conditional.float(), unconditional.float()
    return (without + (scale + 1) * (with_prompt - without)).to(conditional.dtype)
