"""The benchmarks and configurations that are beside the package in a checkout, and inside it when installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(name: str) -> Path:
    """Return the folder of that name: `illada/NAME` of an installation, else `NAME` of the checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    for folder in (PACKAGE / name, PACKAGE.parent.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"this installation of illada lacks its {name}; install it again, from a whole checkout")


def configuration(name: str) -> Path:
    """Return the path of a file, or of a configuration that comes with illada.

    `demo` is configs/demo.toml. With a folder or an ending it is a file.

    Raises:
        FileNotFoundError: a name that is neither.
    """
    given = Path(name)
    if given.exists() or given.name != name or given.suffix:
        return given
    try:
        known = {file.stem: file for file in shipped("configs").glob("*.toml")}
    except FileNotFoundError:
        return given
    if name not in known:
        raise FileNotFoundError(
            f"no configuration file at {name}; those that come with illada are {', '.join(sorted(known))}"
        )
    return known[name]
