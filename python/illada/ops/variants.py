"""Choices between instances of the CUDA kernels that only a measurement on a GPU can make.

All values of a choice give correct results; they differ in speed. Product code takes what the environment variable of
the choice says, else the default. Benchmarks switch between values within a process.
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
    environment: str  # the variable that chooses
    description: str
    values: tuple[str, ...]  # allowed; the first one is the default
    value: str  # in use

    @property
    def default(self) -> str:
        """The value without an environment variable."""
        return self.values[0]


def variants() -> list[Variant]:
    """All choices of this build; none where it has no CUDA kernels.

    ValueError: an environment variable holds a value that is not allowed.
    """
    return [Variant(*fields) for fields in _native.native().variants()] if _native.has_cuda() else []


def set_variant(name: str, value: str | None) -> None:
    """Use `value` for all later calls of this process; None goes back to the environment's value or the default.

    Workspace sizes depend on it, and CUDA graphs keep what they were captured with. An attention plan stays valid;
    make it again to measure a choice, which also decides how a plan is cut. ValueError: an unknown name or value, or a
    build without CUDA kernels.
    """
    if not _native.has_cuda():
        raise ValueError(f"set_variant: this build has no CUDA kernels, so there is no choice {name!r}")
    _native.native().set_variant(name, value or "")


@contextmanager
def use_variants(**values: str) -> Iterator[None]:
    """Within the context these choices have these values; afterwards, what they had before."""
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
    """The choices in use that are not the default, as "name=value, name=value"; "default" where all are."""
    return ", ".join(f"{c.name}={c.value}" for c in variants() if c.value != c.default) or "default"
