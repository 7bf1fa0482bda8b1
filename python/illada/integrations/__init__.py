"""Integrations of illada into other frameworks.

Each module imports its framework, so none is imported from here.

`patch(model)` and `unpatch(model)` are those of `illada.integrations.patching`, loaded when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illada.integrations.patching import patch, unpatch

__all__ = ["patch", "unpatch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from illada.integrations import patching

    return getattr(patching, name)
