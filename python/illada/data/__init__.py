"""Corpora: from text to memory-mapped token files, and back as windows of tokens.

    sources   the documents of a source of text
    corpus    `prepare`: a source's documents become a corpus folder
    dataset   `TokenDataset`: one split of a corpus folder

Names load when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illada.data.corpus import prepare
    from illada.data.dataset import TokenDataset
    from illada.data.sources import read_source

__all__ = ["TokenDataset", "prepare", "read_source"]

_MODULES = {"TokenDataset": "dataset", "prepare": "corpus", "read_source": "sources"}


def __getattr__(name: str) -> Any:
    """Return a name of `__all__` at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'illada.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"illada.data.{_MODULES[name]}"), name)
