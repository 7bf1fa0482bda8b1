"""A minimal trainer: `train(load_config("configs/demo.toml"))`, or `illada train configs/demo.toml`.

Names load when they are used: a configuration is read and checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illada.train.config import TrainConfig, load_config
    from illada.train.loop import TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "evaluate", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Return a name of `__all__` at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'illada.train' has no attribute {name!r}")
    module = "config" if name in ("TrainConfig", "load_config") else "loop"
    return getattr(importlib.import_module(f"illada.train.{module}"), name)
