"""Whether a linear module is its weight alone, so that an op may take the weight in place of a call."""

from __future__ import annotations

from torch import nn


def does_more(linear: nn.Module) -> bool:
    """Return whether calling `linear` does more than multiply by its weight and add its bias.

    Adapters and quantised weights replace the forward. FSDP2 has hooks, which gather the weight.
    """
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return any(hooks) or type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__


def more_than_weight(head: object) -> str | None:
    """Return what keeps an op that takes only a weight from standing in for `head`, or None: nothing does.

    Hooks of FSDP2 are allowed: they gather the weight, a DTensor, for the head's call.
    """
    if not isinstance(head, nn.Linear) or (does_more(head) and not hasattr(head.weight, "full_tensor")):
        return (
            f"a {type(head).__name__} that does more than multiply by its weight (adapter, quantised weight, hooks, a "
            "forward of its own)"
        )
    return f"a {type(head).__name__} with a bias" if head.bias is not None else None
