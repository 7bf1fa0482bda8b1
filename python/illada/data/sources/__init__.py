"""The sources of a corpus's text.

    records   readers of one file: text, JSON lines, csv
    arrow     readers of parquet files and of datasets that `datasets` saved
    folder    the files of a folder, and the count of those that are left out

Memory does not grow with the text. A document is an iterator of pieces of text, since a single one may be as large as
a machine's memory.
"""

from __future__ import annotations

import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from illada.data.sources.arrow import read_parquet, read_saved
from illada.data.sources.folder import LeftOut, check_folder, read_files, read_folder, reader_of
from illada.data.sources.folder_kinds import folder_kind
from illada.data.sources.records import PIECE, read_csv, read_jsonl, read_text_file

__all__ = ["PIECE", "LeftOut", "Source", "open_source", "open_sources", "read_source"]

_FILE_READERS = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}
_KINDS = ("dir", "file", "hf", *_FILE_READERS)
_NO_SUCH_KIND = (
    "source must be stdlib, the path of a folder or file, or one of "
    + ", ".join(f"{kind}:PATH" for kind in _KINDS[:-1])
    + f" and {_KINDS[-1]}:PATH"
)


class Source:
    """One source of documents.

    Attributes:
        name: as it was given to `open_sources`.
        count: how many documents the last `documents()` has yielded so far.
        left_out: the files that it left out, complete when it has ended.
    """

    def __init__(self, name: str, read: Callable[[LeftOut], Iterator[Iterator[str]]]) -> None:
        self.name, self._read = name, read
        self.count, self.left_out = 0, LeftOut()

    def documents(self) -> Iterator[Iterator[str]]:
        """Yield the documents in a fixed order, each in pieces, to be read before the next.

        A warning at the end counts the files that were left out.

        Raises:
            ValueError: a record without text, a file that is damaged or not UTF-8; names the file and the place.
        """
        self.count, self.left_out = 0, LeftOut()
        for pieces in self._read(self.left_out):
            self.count += 1
            yield pieces
        if self.left_out:
            warnings.warn(f"{self.name}: {self.left_out}", stacklevel=1)

    def check(self) -> None:
        """Read the first document, for the errors of it."""
        next(self._read(LeftOut()), None)


def read_source(source: str) -> Iterator[str]:
    """Return the documents of a source, each as one text; see `open_sources`."""
    return ("".join(pieces) for pieces in open_source(source))


def open_source(source: str, text_column: str | None = None) -> Iterator[Iterator[str]]:
    """Return the documents of one source; see `open_sources` and `Source.documents`."""
    return open_sources([source], text_column)[0].documents()


def open_sources(sources: str | Sequence[str], text_column: str | None = None) -> list[Source]:
    """Return sources of text, in the order in which they are given.

    A folder's text files, JSON lines, csv and parquet files are read, and those of the folders in it. What else is
    there is left out, and so are a file that cannot be read whole, hidden files and folders, and links to folders.

    Args:
        sources: each is "stdlib", the source code of the running Python's own library; a path; or, with what is there
            said, "dir:PATH" (a folder), "file:PATH" (one file, read as its suffix says, else as text), "jsonl:PATH"
            (one JSON object a line), "csv:PATH" (its first line names the columns), "parquet:PATH", or "hf:PATH" (what
            `datasets` saved with `save_to_disk`; of several splits the one called train, else "hf:PATH#SPLIT"). Files
            may be compressed with gzip or zstd.
        text_column: the field or column that holds the text, "text" if None.

    Raises:
        ValueError: an unknown kind of source; a folder that holds a corpus, a checkpoint or a tokenizer; no text in
            the first record of a file. FileNotFoundError: no such path. ImportError: no package for the kind.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise ValueError(f"there is no source; {_NO_SUCH_KIND.removeprefix('source ')}")
    places: dict[str, str] = {}
    for name in names:
        place = _place(name)
        if place in places:
            raise ValueError(f"source {name!r} is {places[place]!r} once more; data.weights makes a source count more")
        places[place] = name
    return [_open(name, text_column or "text") for name in names]


def _place(name: str) -> str:
    """Return what a source reads, in one spelling: a path without its kind, or the name of a source without one."""
    kind, _, rest = name.partition(":")
    path = rest if kind in _KINDS and rest else name
    return "stdlib" if name == "stdlib" else os.path.realpath(os.path.expanduser(path))


def _open(name: str, column: str) -> Source:
    if name == "stdlib":
        return Source(name, _read_stdlib)
    kind, _, rest = name.partition(":")
    if kind not in _KINDS or not rest:
        kind, rest = "", name
    path = Path(os.path.expanduser(rest))  # a shell expands ~ at the beginning of a word alone
    if not kind:
        if not path.exists():
            raise ValueError(f"{_NO_SUCH_KIND}; got {name!r}, which is no path that exists")
        kind = "file" if path.is_file() else "hf" if folder_kind(path) == "a saved dataset" else "dir"
    if kind == "dir":
        if not path.is_dir():
            hint = f"; file:{rest} reads one file" if path.is_file() else ""
            raise FileNotFoundError(f"source {name!r}: {path} is not a folder{hint}")
        check_folder(path, name)
        return Source(name, lambda left_out: read_folder(path, column, left_out))
    if kind == "hf":
        source = Source(name, lambda _: read_saved(path, column, name))
    else:
        if not path.is_file():
            hint = f"; dir:{rest} reads the files of a folder" if path.is_dir() else ""
            raise FileNotFoundError(f"source {name!r}: {path} is not a file{hint}")
        read = _FILE_READERS.get(kind) or reader_of(path.name) or read_text_file
        source = Source(name, lambda _: read(path, column))
    source.check()  # now, and not after the sources before it
    return source


def _read_stdlib(left_out: LeftOut) -> Iterator[Iterator[str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts))
    return read_files(paths, "text", left_out)
