"""A reader of text from outside (files, standard input, arguments) and of JSON in it.

Its errors name the place.

Text is UTF-8. A byte order mark is no part of it, and neither is a CR before a LF. What is not UTF-8 is an error that
names the file, the line and the byte, and says what it looks like.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from illada.schema import check_object
from illada.text.unpacking import open_unpacked

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "zip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
_POINTER = b"version https://git-lfs.github.com/spec"
_IS_POINTER = "is a Git LFS pointer, not the file it stands for: fetch that with git lfs pull"
_HEAD = 4096  # bytes looked at for what a file is
_BLOCK = 1 << 16  # bytes of a file in memory at a time, where it is read in pieces


class InputError(ValueError):
    """An input that cannot be read.

    Attributes:
        reason: why, in a few words, to count such inputs by.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_text(data: bytes, where: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark and with LF for CR LF.

    Raises:
        InputError: not UTF-8; names `where`, the line and the byte, and says what it looks like.
    """
    return "".join(decode_pieces([data], where))


def decode_pieces(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    """Apply `decode_text` to bytes that come in blocks, as text in pieces."""
    decoder, lines, held = codecs.getincrementaldecoder("utf-8")(), 1, ""
    number = at = 0
    for number, block in enumerate(itertools.chain(blocks, [b""])):
        if number == 0:
            _check_kind(block[:_HEAD], where)
            at = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
            block = block[at:]
        at += len(block)
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            lines += error.object.count(b"\n", 0, error.start)
            raise _not_utf8(f"{where}, line {lines}", at - len(error.object), error) from None
        held = "\r" if block and text.endswith("\r") else ""  # the LF may be in the next block
        lines += text.count("\n")
        if text := text.removesuffix(held).replace("\r\n", "\n"):
            yield text


def read_text(path: str | Path) -> str:
    """Return the text of a file; errors as of `decode_text`."""
    return "".join(read_pieces(path))


def read_pieces(path: str | Path, *, unpack: bool = False) -> Iterator[str]:
    """Yield the text of `read_text` in pieces, for files that do not fit in memory.

    unpack: also read files that are compressed with gzip or zstd; else they are an error.
    """
    with open_unpacked(path) if unpack else Path(path).open("rb") as file:
        yield from decode_pieces(iter(lambda: file.read(_BLOCK), b""), str(path))


def read_lines(path: str | Path, *, unpack: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (where, line) of a text file: `where` names file and line for errors. Only LF ends a line.

    unpack: as of `read_pieces`.
    """
    with open_unpacked(path) if unpack else Path(path).open("rb") as file:
        _check_kind(file.peek(_HEAD)[:_HEAD], str(path))  # and it may be a pipe
        yield from decode_lines(file, str(path))


def decode_lines(file: BinaryIO, where: str) -> Iterator[tuple[str, str]]:
    """Apply `read_lines` to an open file."""
    number = at = 0
    while line := file.readline():
        number += 1
        place = f"{where}, line {number}"
        at += len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(place, at - len(line), error) from None
        del line  # one copy of a long line is enough
        yield place, text.removesuffix("\n").removesuffix("\r")


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: naming `where`: no JSON, nested too deeply for Python, or half of a surrogate pair in a string.
    """
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD]", text):  # an escape such as \ud83d; a pair of them is one character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where} holds half of a surrogate pair (\\u{ord(half):x}), which is no character") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    return value


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file; errors as of `read_text` and `parse_json`, all of them a ValueError."""
    try:
        return parse_json(read_text(path), str(path))
    except ValueError:
        if said := looks_like(path):
            raise ValueError(f"{path} {said}") from None
        raise


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    ValueError, which names the file: it holds something else.
    """
    values: dict[str, Any] = read_json(file)
    check_object(values, {}, str(file))
    return values


def read_if_there(file: Path) -> dict[str, Any]:
    """Return the result of `read_json_object`, or an empty object where there is no file."""
    return read_json_object(file) if file.is_file() else {}


def looks_like(path: str | Path) -> str | None:
    """Return what a download left in the place of a file, for an error about it.

    None: nothing of that kind.
    """
    with Path(path).open("rb") as file:
        start = file.read(_HEAD).lstrip().lower()
    if start.startswith(_POINTER):
        return _IS_POINTER
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, which a download saved in place of the file: fetch the file itself"
    return None


def check_text(text: str, where: str) -> str:
    """Return the text itself.

    ValueError: it holds a lone surrogate, as Python makes of bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half of a surrogate pair, \\u{code:x}"
        raise ValueError(f"{where} is not UTF-8 text: {what} at character {error.start}") from None
    return text


def _check_kind(head: bytes, where: str) -> None:
    for mark, name in _MARKS:
        if head.startswith(mark):
            raise _other_encoding(where, name, name, name)
    if head.startswith(_POINTER):
        raise InputError(f"{where} {_IS_POINTER}", "Git LFS pointers")
    for mark, name in _COMPRESSED:
        if head.startswith(mark):
            raise InputError(f"{where} is compressed ({name}), not text; unpack it first", name)
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if len(head) >= 4 and max(zeros) > len(head) // 4:
        exact = "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
        raise _other_encoding(where, "UTF-16 without a byte order mark", exact, "UTF-16")


def _other_encoding(where: str, name: str, exact: str, reason: str) -> InputError:
    how = f"convert it to UTF-8, for example with iconv -f {exact} -t UTF-8"
    return InputError(f"{where} is not UTF-8 text: it looks like {name}; {how}", reason)


def _not_utf8(where: str, at: int, error: UnicodeDecodeError) -> InputError:
    """Return the error of bytes that begin `at` bytes into what is read."""
    byte, following = error.object[error.start], error.object[error.start + 1 : error.start + 2]
    # A byte alone before ASCII is what a one-byte encoding looks like; text that was cut, or binary data, is not.
    guess = "; it looks like a one-byte encoding, such as Latin-1 or Windows-1252" if following.isascii() else ""
    what = f"byte 0x{byte:02x} at position {at + error.start}{guess if following else ''}"
    return InputError(f"{where} is not UTF-8 text: {what}", "not UTF-8")
