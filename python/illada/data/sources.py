"""The sources of a corpus's text.

Memory does not grow with the text. A document is an iterator of pieces of text, since a single one may be as large as
a machine's memory.
"""

from __future__ import annotations

import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from illada.text.files import parse_json, read_lines, read_pieces

PIECE = 1 << 16  # characters of a piece

_TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".html",
    ".tex",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cu",
    ".json",
    ".pod",
    ".org",
}


def read_source(source: str) -> Iterator[str]:
    """Return the documents of a source, each as one text; see `open_source`."""
    return ("".join(pieces) for pieces in open_source(source))


class Source:
    """A source of text.

    Attributes:
        name: of the source, by which a training configuration can weigh it.
        left_out: what of it is not text, counted by kind; complete after `documents` was read to its end.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_out: dict[str, int] = {}
        self._documents = open_source(name)

    def documents(self) -> Iterator[Iterator[str]]:
        """Return the documents, each in pieces, to be read before the next."""
        return self._documents


def open_sources(sources: Iterable[str], text_column: str | None = None) -> list[Source]:
    """Return the sources of these names; errors as of `open_source`."""
    if text_column is not None:
        raise ValueError("text_column is for sources with columns")
    return [Source(source) for source in sources]


def open_source(source: str) -> Iterator[Iterator[str]]:
    """Return the documents of a source in a fixed order, each in pieces, to be read before the next.

    Files of a folder that are not UTF-8 text are left out, with a warning that counts them.

    Args:
        source: "stdlib", the source code of the running Python's own library; "dir:PATH", every text file below a
            folder; or "jsonl:PATH", one JSON object a line with its text under "text".

    Raises:
        ValueError: an unknown kind of source, a line without text. FileNotFoundError: no such path.
    """
    kind, _, path = source.partition(":")
    path = os.path.expanduser(path)  # a shell expands ~ at the beginning of a word alone
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return _read_files(p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts))
    if kind == "dir" and path:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"source {source!r}: {path} is not a folder")
        return _read_files(p for p in sorted(Path(path).rglob("*")) if p.suffix in _TEXT_SUFFIXES and p.is_file())
    if kind == "jsonl" and path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"source {source!r}: {path} is not a file")
        return _read_jsonl(Path(path))
    raise ValueError(f"source must be stdlib, dir:PATH or jsonl:PATH, got {source!r}")


def _read_files(paths: Iterable[Path]) -> Iterator[Iterator[str]]:
    left_out: list[str] = []
    for path in paths:
        try:
            blank = not [None for piece in read_pieces(path) if piece.strip()]  # to its end: all of it must be text
        except (ValueError, OSError) as error:
            left_out.append(str(error))
            continue
        if not blank:
            yield read_pieces(path)
    if left_out:
        warnings.warn(f"left out {len(left_out)} files that are not UTF-8 text; the first: {left_out[0]}", stacklevel=1)


def _read_jsonl(path: Path) -> Iterator[Iterator[str]]:
    for where, line in read_lines(path):
        if not line or line.isspace():
            continue
        value = parse_json(line, where)
        del line  # it may be large, as the text in it
        try:
            text = value["text"]
        except (KeyError, TypeError):
            raise ValueError(f'{where}: expected a JSON object with a "text" field') from None
        del value
        if not isinstance(text, str):
            raise ValueError(f'{where}: "text" must be a string, got {type(text).__name__}')
        if text and not text.isspace():
            yield (text[at : at + PIECE] for at in range(0, len(text), PIECE))
