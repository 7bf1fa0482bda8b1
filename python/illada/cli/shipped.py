"""What a checkout has beside the package, and an installation in it: the benchmarks, and configurations by name."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path:
    """The folder of that name: `illada/NAME` of an installation, else `NAME` of the checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    for folder in (PACKAGE / name, PACKAGE.parent.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of illada lacks its {name}; install it again, from a whole checkout")


def configuration(name: str) -> Path:
    """A file, or one of those that come with illada: `demo` is configs/demo.toml. What is neither stays as it is."""
    given = Path(name)
    if given.exists() or given.name != name or given.suffix:
        return given
    try:
        found = shipped("configs") / f"{name}.toml"
    except FileNotFoundError:
        return given
    return found if found.is_file() else given
