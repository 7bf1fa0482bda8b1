"""Loading, saving and conversion of checkpoints, in the formats of `illada.checkpoints.formats`.

Names load when they are used: a folder is found without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illada.checkpoints.weights import convert_checkpoint, load_pretrained, save_pretrained

__all__ = ["convert_checkpoint", "load_pretrained", "save_pretrained"]


def __getattr__(name: str) -> Any:
    """Return a name of `__all__` at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'illada.checkpoints' has no attribute {name!r}")
    return getattr(importlib.import_module("illada.checkpoints.weights"), name)
