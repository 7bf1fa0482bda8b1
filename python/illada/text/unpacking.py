"""Files that may be compressed with gzip or zstd, read as what is in them.

What they begin with says so, not their names: a download may have unpacked a file and kept its name.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPED = tuple(bytes([0x50 + i, 0x2A, 0x4D, 0x18]) for i in range(16))  # a zstd frame without text, as pzstd writes
_BLOCK = 1 << 16  # bytes unpacked at a time
_PACKED = 1 << 9  # bytes of a zstd file unpacked at a time: of text they become 2 KB, of bytes made for it 16 MB


def open_unpacked(path: str | Path) -> io.BufferedReader:
    """Open a file for reading, unpacked if it is compressed with gzip or zstd.

    A reader of it gets a ValueError that names the file where it is damaged or cut.

    Raises:
        ImportError: zstd, and no zstandard package.
    """
    file = Path(path).open("rb")
    try:
        head = file.peek(4)[:4]
        if head.startswith(_GZIP):
            return _reader(_gunzip(file, str(path)))
        if head.startswith((_ZSTD, *_SKIPPED)):
            return _reader(_unzstd(file, str(path)))
    except BaseException:
        file.close()
        raise
    return file


class _Blocks(io.RawIOBase):
    """A file of the bytes that an iterator yields."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        self._blocks.close()  # type: ignore[attr-defined]  # a generator: it closes its file
        super().close()


def _reader(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Blocks(blocks), _BLOCK)


def _gunzip(file: BinaryIO, where: str) -> Iterator[bytes]:
    with file, gzip.GzipFile(fileobj=file) as unpacked:
        while True:
            try:
                block = unpacked.read(_BLOCK)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{where} is damaged or cut (gzip): {error}") from None
            if not block:
                return
            yield block


def _unzstd(file: BinaryIO, where: str) -> Iterator[bytes]:
    with file:
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{where} is compressed with zstd: pip install 'illada[data]' ({error})") from None
        # Not zstandard's stream_reader, which ends without an error where a file is cut.
        frame = None
        while packed := file.read(_PACKED):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    block = frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise ValueError(f"{where} is damaged, or too large a window (zstd): {error}") from None
                packed = b""
                if frame.eof:
                    packed, frame = frame.unused_data, None
                yield block
        if frame is not None:
            raise ValueError(f"{where} is cut: its last zstd frame has no end")
