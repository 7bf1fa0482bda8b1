"""Where the text of a corpus comes from, and a file that holds it meanwhile: memory does not grow with the text.

A document is an iterator of pieces of text, since a single one may be as large as a machine's memory.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
import tempfile
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

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
    """The documents of a source, each as one text; see `open_source`."""
    return ("".join(pieces) for pieces in open_source(source))


def open_source(source: str) -> Iterator[Iterator[str]]:
    """The documents of a source in a fixed order, each in pieces, to be read before the next. Files of a folder that
    are not UTF-8 text are left out, with a warning that counts them.

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


class Documents:
    """Documents in a file without a name, end to end.

    Args:
        folder: where the file is; it needs the room of the text.
    """

    def __init__(self, folder: Path) -> None:
        self._file = cast(IO[bytes], tempfile.TemporaryFile(dir=folder))
        self._ends = array("Q", [0])  # in bytes; where each document ends, after where the first begins
        self.lengths = array("Q")  # in characters
        self.scores = array("d")  # in [0, 1), by a hash of the text

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, pieces: Iterable[str]) -> None:
        """One more document."""
        length, digest, size = 0, hashlib.sha256(), self._ends[-1]
        self._file.seek(size)
        for piece in pieces:
            data = piece.encode()
            length, size = length + len(piece), size + len(data)
            digest.update(data)
            self._file.write(data)
        self.lengths.append(length)
        self._ends.append(size)
        self.scores.append(int.from_bytes(digest.digest()[:8], "big") / 2**64)

    def pieces(self, index: int, start: int = 0, end: int | None = None) -> Iterator[str]:
        """Characters [start, end) of a document, in pieces of `PIECE` at most."""
        at, end = 0, self.lengths[index] if end is None else end
        for piece in codecs.iterdecode(self._blocks(self._ends[index], self._ends[index + 1]), "utf-8"):
            if at >= end:
                return
            if part := piece[max(0, start - at) : end - at]:
                yield part
            at += len(piece)

    def _blocks(self, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            self._file.seek(start)
            yield self._file.read(min(PIECE, end - start))
            start += PIECE


def hold_out(documents: Documents, fraction: float) -> tuple[array[int], str]:
    """Share the text out to the splits: at which character of each document its held-out part begins, and what is held
    out, "documents" (each is as a whole in one split) or "ends".
    """
    held_out = [score < fraction for score in documents.scores]
    share = sum(length for length, held in zip(documents.lengths, held_out, strict=True) if held)
    if not all(held_out) and fraction / 2 <= share / max(1, sum(documents.lengths)) <= 2 * fraction:
        starts = (0 if held else length for length, held in zip(documents.lengths, held_out, strict=True))
        return array("Q", starts), "documents"
    return array("Q", (_end(documents, index, fraction) for index in range(len(documents)))), "ends"


def _end(documents: Documents, index: int, fraction: float) -> int:
    """Where the held-out end of a document begins: not within a line or word, unless that would hold out twice as
    much.
    """
    length = documents.lengths[index]
    cut = int((1 - fraction) * length)
    earliest = max(0, 2 * cut - length)
    at, line, word = earliest, 0, 0
    for piece in documents.pieces(index, earliest, cut):
        line = at + piece.rfind("\n") + 1 if "\n" in piece else line
        word = at + piece.rfind(" ") + 1 if " " in piece else word
        at += len(piece)
    return line or word or cut
