"""The token files of a corpus: shards of a fixed number of tokens.

    NAME.bin    token ids, uint16 or uint32, documents end to end
    NAME.idx    a header, then where documents begin: uint64, ascending, in tokens from the start of the shard

A document is in the index of the shard that it begins in, and goes on in the next shard of its source. Little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 256 << 20  # of token ids
_MAGIC = b"illadidx"
_HEADER = struct.Struct("<8sIIQQQ")  # magic, version, bytes of a token, number of the shard, tokens, documents
_VERSION = 1
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class Shard:
    """A shard of a split.

    name: of its files, without suffix. source: index of its source. documents: how many begin in it.
    """

    name: str
    source: int
    tokens: int
    documents: int


def check_index(file: Path, shard: Shard, number: int, token_bytes: int) -> None:
    """Raise ValueError unless the header of an index is that of this shard.

    number: of the shard in its split.
    """
    with file.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    if len(head) != HEADER_BYTES or not head.startswith(_MAGIC):
        raise ValueError(f"{file} is damaged: it does not begin as the index of a shard")
    _, version, *found = _HEADER.unpack(head)
    if version != _VERSION:
        raise ValueError(f"{file} has format version {version}, this is {_VERSION}")
    expected = [token_bytes, number, shard.tokens, shard.documents]
    for name, value, wanted in zip(("bytes of a token", "number", "tokens", "documents"), found, expected, strict=True):
        if value != wanted:
            raise ValueError(f"{file} does not belong to {shard.name}.bin: its {name} is {value}, expected {wanted}")


class ShardWriter:
    """A writer of the shards of one split, in a folder.

    Args:
        folder: where the files go.
        split: the beginning of their names.
        dtype: of the token ids.
        shard_tokens: tokens of each shard but the last of a source.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, np.dtype(dtype), shard_tokens
        self._source = self._tokens = self._documents = 0
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files or ():
            file.close()
        self._files = None

    def write(self, ids: NDArray, starts: NDArray[np.int64]) -> None:
        """Append token ids. starts: where in `ids` documents begin, ascending."""
        while len(ids):
            if self._files is None:
                self._open()
            assert self._files is not None
            tokens, index = self._files
            room = self._shard_tokens - self._tokens
            here = int(np.searchsorted(starts, room))
            ids[:room].astype(self._dtype, copy=False).tofile(tokens)
            (starts[:here] + self._tokens).astype("<u8").tofile(index)
            self._tokens += len(ids[:room])
            self._documents += here
            ids, starts = ids[room:], starts[here:] - room
            if self._tokens == self._shard_tokens:
                self._close()

    def end_source(self) -> None:
        """End the shard of this source; what follows is another one's."""
        self._close()
        self._source += 1

    def _open(self) -> None:
        stem = self._folder / f"{self._split}-{len(self.shards):05}"
        self._files = stem.with_suffix(".bin").open("wb"), stem.with_suffix(".idx").open("wb")
        self._files[1].write(bytes(HEADER_BYTES))
        self._tokens = self._documents = 0

    def _close(self) -> None:
        if self._files is None:
            return
        number = len(self.shards)
        self.shards.append(Shard(f"{self._split}-{number:05}", self._source, self._tokens, self._documents))
        tokens, index = self._files
        index.seek(0)
        index.write(_HEADER.pack(_MAGIC, _VERSION, self._dtype.itemsize, number, self._tokens, self._documents))
        tokens.close()
        index.close()
        self._files = None
