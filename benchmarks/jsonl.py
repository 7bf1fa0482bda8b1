"""Reading and appending of JSON lines.

What is read may be of a recent or an old run, complete or not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: str | Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append each value as one line of JSON.

    An unfinished line of a killed run stays a line of its own.
    """
    with Path(path).open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for value in values:
            file.write(json.dumps(value).encode() + b"\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects, with all of their keys.

    A line that is no object, as a killed run leaves one, is reported and skipped.

    OSError: there is no such file. ValueError: it has lines and none of them is an object.
    """
    found, faults = [], []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"an object is wanted, got {type(value).__name__}")
            found.append(value)
        except (ValueError, RecursionError) as error:
            faults.append(f"{path}, line {number}: {error}")
    if faults and not found:
        raise ValueError(f"no line is a JSON object; {faults[0]}")
    for fault in faults:
        print(f"skipped a damaged line: {fault}", file=sys.stderr)
    return found
