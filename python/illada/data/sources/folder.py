"""The files of a folder as documents, and the count of those that are left out."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from illada.data.sources.arrow import read_parquet
from illada.data.sources.folder_kinds import folder_kind
from illada.data.sources.records import read_csv, read_jsonl, read_text_file

Reader = Callable[[Path, str], Iterator[Iterator[str]]]

_TEXT = (
    ".txt .text .md .markdown .rst .adoc .org .tex .pod .html .htm .json "
    ".py .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .java .js .ts .go .rs .sh"
).split()
_READERS: dict[str, Reader] = {
    **dict.fromkeys(_TEXT, read_text_file),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
_PACKED = (".gz", ".zst")
_MOST_REASONS = 12  # in the line of what was left out


class LeftOut:
    """The count of files that were left out, by reason.

    Attributes:
        files: how many files there were, those that were read included, hidden ones not.
        hidden: how many hidden files and folders were not looked at.
        reasons: how many were left out, by reason: a suffix or a few words.
        first: what was wrong with the first of a reason, where that is more than the reason says.
    """

    def __init__(self) -> None:
        self.files = self.hidden = 0
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, first: str | None = None, count: int = 1) -> None:
        """Count files that are left out; they count as `files` as well."""
        self.files += count
        self.reasons[reason] += count
        if first is not None:
            self.first.setdefault(reason, first)

    def __bool__(self) -> bool:
        return self.reasons.total() > 0

    def __str__(self) -> str:
        found = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{n:,} {why}" + (f" (first: {self.first[why]})" if why in self.first else "") for why, n in found]
        if len(named) > _MOST_REASONS:
            rest = sum(n for _, n in found[_MOST_REASONS:])
            named[_MOST_REASONS:] = [f"{rest:,} of other kinds"]
        hidden = f"; {self.hidden:,} hidden files and folders not looked at" if self.hidden else ""
        return f"{self.reasons.total():,} of {self.files:,} files left out: {', '.join(named)}{hidden}"


def reader_of(name: str) -> Reader | None:
    """Return the reader of a file by its suffix, in any case and of what is compressed; None: no known one."""
    return _READERS.get(_suffix(name).removesuffix(".gz").removesuffix(".zst"))


def read_folder(root: Path, column: str, left_out: LeftOut) -> Iterator[Iterator[str]]:
    """Yield the documents of the files of a folder and of the folders in it, in the order of their paths."""
    return read_files(_walk(root, left_out), column, left_out)


def read_files(paths: Iterable[Path], column: str, left_out: LeftOut) -> Iterator[Iterator[str]]:
    """Yield the documents of files. A file that cannot be read to its end is left out as a whole.

    ImportError: there is no package to read one of them.
    """
    for path in paths:
        read = reader_of(path.name) or read_text_file
        try:
            for piece in itertools.chain.from_iterable(read(path, column)):
                del piece
        except (ValueError, OSError) as error:
            unknown = "unreadable" if isinstance(error, OSError) else "damaged"
            left_out.add(getattr(error, "reason", unknown), str(error))
            continue
        left_out.files += 1
        yield from read(path, column)


def check_folder(path: Path, source: str) -> None:
    """Raise ValueError if a folder is no folder of text, but something that illada or datasets wrote."""
    kind = folder_kind(path)
    if kind is None:
        return
    hint = {
        "a saved dataset": f": hf:{path} reads it",
        "a prepared corpus": ", which is what prepare writes: train on it with data.path, or name the text it is of",
    }.get(kind, ", not text")
    raise ValueError(f"source {source!r}: {path} is {kind}{hint}")


def _walk(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the files with a known suffix, sorted by their paths' parts; a folder's names are in memory at a time."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        left_out.add("unreadable", str(error))
        return
    for entry in entries:
        path = folder / entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name.startswith("."):
            left_out.hidden += 1  # of which one is a folder that prepare writes here meanwhile
        elif is_folder:
            if kind := folder_kind(path):
                more = f": hf:{path} reads it" if kind == "a saved dataset" else ""
                left_out.add(f"in {kind}", f"{path}{more}", _count(path))
            else:
                yield from _walk(path, left_out)
        elif not entry.is_file():
            left_out.add("links to folders" if entry.is_dir() else "not files", str(path))
        elif reader_of(entry.name) is None:
            left_out.add(_suffix(entry.name).removeprefix(".") or "without a suffix")
        else:
            yield path


def _count(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _suffix(name: str) -> str:
    """Return the suffix of a name in lower case, with that of compression: ".txt", ".txt.gz", ".gz"."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + suffix if suffix in _PACKED else suffix
