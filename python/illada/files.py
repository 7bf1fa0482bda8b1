"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from illada.text import read_json


@contextlib.contextmanager
def staged_directory(target: str | Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write into; on success it is synced to disk and renamed to `target`.

    A folder already at `target` steps aside for the rename and is removed after it, so that at every moment, a kill or
    a power cut included, one complete folder is there (or, between two renames, beside it). On an error the hidden
    folder is removed and `target` stays as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.new.", dir=target.parent))
    try:
        yield staging
        os.chmod(staging, 0o777 & ~_umask())
        for path in staging.rglob("*"):
            _sync(path)
        _sync(staging)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old / target.name)
        os.rename(staging, target)
        _sync(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_text(file: str | Path, text: str) -> None:
    """Write a text file beside and rename it: readers see the old text or the new one, never a part."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object. ValueError, which names the file: it does not."""
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return values


def read_if_there(file: Path) -> dict[str, Any]:
    """`read_json_object`, empty where there is no file."""
    return read_json_object(file) if file.is_file() else {}


def remove_directory(path: str | Path) -> None:
    """Remove a folder: it is hidden by a rename first, so a kill never leaves a part of it under its name."""
    path = Path(path)
    gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.gone.", dir=path.parent))
    os.rename(path, gone)
    _sync(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_stale(parent: str | Path) -> None:
    """Remove hidden folders that a killed `staged_directory` or `remove_directory` left in `parent`."""
    for pattern in (".*.new.*", ".*.gone.*"):
        for path in Path(parent).glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
