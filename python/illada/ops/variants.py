"""Variants: choices between instances of the CUDA kernels that need a measurement on a GPU.

All values of a choice give correct results; they differ in speed. Product code uses the value of the choice's
environment variable, otherwise the default. Benchmarks switch between values within a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from illada import _native


@dataclass(frozen=True)
class Variant:
    """One choice, as `illada/variants.h` defines it."""

    name: str
    environment: str  # environment variable that selects a value
    description: str
    values: tuple[str, ...]  # allowed values; the first one is the default
    value: str  # value in use

    @property
    def default(self) -> str:
        """Value in use without an environment variable."""
        return self.values[0]


def variants() -> list[Variant]:
    """Return all choices of this build; an empty list where it has no CUDA kernels.

    Raises:
        ValueError: An environment variable holds a value that is not allowed.
    """
    return [Variant(*fields) for fields in _native.native().variants()] if _native.has_cuda() else []


def set_variant(name: str, value: str | None) -> None:
    """Use `value` for all later calls of this process.

    Workspace sizes depend on it. CUDA graphs keep the value they were captured with. An attention plan stays valid, but
    the choice also decides how the plan divides work: make the plan again to measure a choice.

    Args:
        name: Name of the choice.
        value: One of its values; None restores the environment's value or the default.

    Raises:
        ValueError: An unknown name or value, or a build without CUDA kernels.
    """
    if not _native.has_cuda():
        raise ValueError(f"set_variant: this build has no CUDA kernels, so there is no choice {name!r}")
    _native.native().set_variant(name, value or "")


@contextmanager
def use_variants(**values: str) -> Iterator[None]:
    """Set these choices within the context, and restore their former values afterwards; errors as `set_variant`."""
    before = {choice.name: choice.value for choice in variants()}
    try:
        for name, value in values.items():
            set_variant(name, value)
        yield
    finally:
        for name in values:
            if name in before:
                set_variant(name, before[name])


def describe() -> str:
    """Return the choices that differ from their default, as "name=value, name=value"; "default" if none does."""
    return ", ".join(f"{c.name}={c.value}" for c in variants() if c.value != c.default) or "default"
