"""Readers of one file: each yields its documents in order, as iterators of pieces.

Their errors name the file and the line.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from illada.text.files import InputError, parse_json, read_lines, read_pieces

PIECE = 1 << 16  # characters of a piece
_MOST_NAMES = 20  # of columns, in an error


def read_text_file(path: Path, column: str) -> Iterator[Iterator[str]]:
    """Yield the text of a file as one document, if it is more than space."""
    if any(piece.strip() for piece in read_pieces(path, unpack=True)):
        yield read_pieces(path, unpack=True)


def read_jsonl(path: Path, column: str) -> Iterator[Iterator[str]]:
    """Yield the strings under `column` in a file of one JSON object a line."""
    for where, line in read_lines(path, unpack=True):
        if not line or line.isspace():
            continue
        value = parse_json(line, where)
        del line  # it may be large, as the text in it
        if not isinstance(value, dict) or column not in value:
            message = f'{where}: expected a JSON object with a "{column}" field'
            raise no_column(message, column, value if isinstance(value, dict) else ())
        text = value[column]
        del value
        if not isinstance(text, str):
            raise InputError(f'{where}: "{column}" must be a string, got {type(text).__name__}', "damaged")
        if text and not text.isspace():
            yield in_pieces(text)


def read_csv(path: Path, column: str) -> Iterator[Iterator[str]]:
    """Yield the fields of a column of a csv file, whose first line names the columns.

    Between fields are commas, or semicolons or tabs where the first line has the column's name between those.
    """
    lines = (line + "\n" for _, line in read_lines(path, unpack=True))
    first = next(lines, "")
    if not first.strip() and not any(line.strip() for line in lines):
        return
    delimiter, names = _header(first, column, path)
    # In strict mode, since a quote out of place would make one record of all that follows.
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where = f"{path}, line {rows.line_num + 2}"
        row = _next_row(rows, where)
        if row is None:
            return
        if row and len(row) != len(names):
            raise InputError(f"{where}: {len(row)} fields, but line 1 names {len(names)} columns", "damaged")
        text = row[names.index(column)] if row else ""
        del row
        if text and not text.isspace():
            yield in_pieces(text)


def in_pieces(text: str) -> Iterator[str]:
    """Return a text in pieces of `PIECE` characters."""
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def no_column(message: str, column: str, names: Sequence[str] | dict[str, object]) -> InputError:
    """Return the error that a record has no such column, which lists those that it has."""
    listed = ", ".join(f"{str(name):.40}" for name in itertools.islice(names, _MOST_NAMES))
    more = ", ..." if len(names) > _MOST_NAMES else ""
    hint = f"; there is {listed}{more} (--text-column NAME chooses one)" if names else ""
    return InputError(message + hint, f'without a column "{column}"')


def _header(line: str, column: str, path: Path) -> tuple[str, list[str]]:
    """Return the delimiter of a header with this column, and the names of all columns."""
    headers = {}
    for delimiter in ",;\t":
        with contextlib.suppress(InputError):
            row = csv.reader([line], delimiter=delimiter, strict=True)
            headers[delimiter] = _next_row(row, "") or []
    for delimiter, names in headers.items():
        if column in names:
            return delimiter, names
    names = max(headers.values(), key=len, default=[])
    raise no_column(f'{path}, line 1: expected a column "{column}"', column, names)


def _next_row(rows: Iterator[list[str]], where: str) -> list[str] | None:
    """Return the next row, None after the last, with fields of any size.

    The limit of their size is the process's; it changes for this row alone.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(rows, None)
    except csv.Error as error:
        raise InputError(f"{where} begins a record that is not csv: {error}", "damaged") from None
    finally:
        csv.field_size_limit(limit)
