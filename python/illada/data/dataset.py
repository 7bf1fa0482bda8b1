"""One split of a corpus folder, memory-mapped; `illada.data.corpus` describes the folder."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import shlex
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray

from illada.data.shards import HEADER_BYTES, Shard, check_index
from illada.schema import Count, NonNegativeFloat, Positive, check_object
from illada.text.files import read_json
from illada.text.training import MOST_IDS, SPECIAL_NAMES, tokenizer_sha256

FORMAT, FORMAT_VERSION = "illada-corpus", 2
SPLITS = ("train", "validation")
#: corpus.json, but for its format and version.
_HEADER = {
    "dtype": Literal["uint16", "uint32"],
    "vocab_size": Annotated[int, Gt(0), Le(MOST_IDS)],
    **{f"{name}_token_id": Count for name in SPECIAL_NAMES},
    "tokenizer_sha256": str,
    "splits": dict[str, dict[str, Any]],
    "validation_unigram_entropy": NonNegativeFloat,
}
_SPLIT = {"documents": Count, "tokens": Count}
_SHARD = {"name": str, "source": str, "documents": Count, "tokens": Positive}
_MOST_MAPS = 256  # files that are mapped at a time: the system allows about 65,000 of a process
_INDEX_CHUNK = 1 << 16  # entries of an index in memory at a time


class TokenDataset:
    """One split of a prepared corpus. Its files are mapped when they are first read, and none is read at opening.

    Attributes:
        header: corpus.json.
        sources: names of the sources, in the order of their tokens.
        shards: what the token files hold, in order.
        num_tokens, num_documents: of the split.

    Raises:
        FileNotFoundError: no corpus there. ValueError: not a corpus, another format version, or damaged files.
        RuntimeError, by what reads: the corpus was replaced meanwhile.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        if split not in SPLITS:
            raise ValueError(f"split must be {' or '.join(SPLITS)}, got {split!r}")
        header_file = self.path / "corpus.json"
        if not header_file.is_file():
            command = f"illada prepare --source SOURCE --out {shlex.quote(str(self.path))}"
            raise FileNotFoundError(f"{self.path} is not a corpus (no corpus.json); make one with `{command}`")
        self.header: dict[str, Any] = read_json(header_file)
        if not isinstance(self.header, dict) or self.header.get("format") != FORMAT:
            raise ValueError(f"{header_file} is not the header of an {FORMAT}")
        self._version = self.header.get("version")
        if self._version not in (1, FORMAT_VERSION) or isinstance(self._version, (bool, float)):
            raise ValueError(f"{header_file} has format version {self._version!r:.80}, this is {FORMAT_VERSION}")
        check_object(self.header, _HEADER, str(header_file))
        if wrong := [i for name in SPECIAL_NAMES if not (i := self.header[f"{name}_token_id"]) < self.vocab_size]:
            raise ValueError(f"{header_file}: token id {wrong[0]} is outside of the vocabulary of {self.vocab_size}")
        where = f"{header_file}, splits, {split}"
        expected = check_object(self.header["splits"].get(split), _SPLIT, where)
        self.num_tokens: int = expected["tokens"]
        self.num_documents: int = expected["documents"]
        self.sources, self.shards = self._read_shards(header_file, where)
        self._dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        self._maps: dict[str, tuple[mmap.mmap, NDArray]] = {}
        self._identity = _identity(header_file)
        #: First token of each shard in the split, with num_tokens last.
        self._starts = list(itertools.accumulate((shard.tokens for shard in self.shards), initial=0))
        #: First token of each source, likewise.
        self._source_starts = [
            sum(shard.tokens for shard in self.shards if shard.source < source)
            for source in range(len(self.sources) + 1)
        ]
        self._check_files()
        if tokenizer_sha256(self.path) != self.header["tokenizer_sha256"]:
            raise ValueError(f"{self.path / 'tokenizer.json'} is not the tokenizer that this corpus was made with")

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process needs; it maps the files itself."""
        return {**self.__dict__, "_maps": {}}

    def _read_shards(self, header_file: Path, where: str) -> tuple[list[str], list[Shard]]:
        """Return the names of the sources and the shards of this split, by the header."""
        if self._version == 1:
            one = Shard(self.split, 0, self.num_tokens, self.num_documents)
            return [str(self.header.get("source"))], [one] if self.num_tokens else []
        listed = check_object(self.header, {"sources": list[dict[str, Any]]}, str(header_file))["sources"]
        names = [check_object(one, {"name": str}, f"{header_file}, sources")["name"] for one in listed]
        if len(set(names)) != len(names):
            raise ValueError(f"{header_file}: sources must have different names")
        shards = check_object(self.header["splits"][self.split], {"shards": list[dict[str, Any]]}, where)["shards"]
        found: list[Shard] = []
        for number, values in enumerate(shards):
            shard = check_object(values, _SHARD, f"{where}, shards[{number}]")
            if shard["name"] != f"{self.split}-{number:05}":
                raise ValueError(
                    f"{where}, shards[{number}]: name must be {self.split}-{number:05}, got {shard['name']!r:.80}"
                )
            if shard["source"] not in names:
                raise ValueError(f"{where}, shards[{number}]: there is no source {shard['source']!r:.80}")
            found.append(Shard(shard["name"], names.index(shard["source"]), shard["tokens"], shard["documents"]))
        if any(before.source > after.source for before, after in itertools.pairwise(found)):
            raise ValueError(f"{where}: shards must be in the order of their sources")
        for key, total in (("tokens", self.num_tokens), ("documents", self.num_documents)):
            if (held := sum(getattr(shard, key) for shard in found)) != total:
                raise ValueError(f"{where}: its shards hold {held} {key}, not {total}")
        return names, found

    def _check_files(self) -> None:
        """Check sizes of files and heads of indices."""
        if self._version == 1:
            self._check_size(f"{self.split}.bin", self.num_tokens * self._dtype.itemsize)
            self._check_size(f"{self.split}.idx", (self.num_documents + 1) * 8)
            if self.num_tokens:
                ends = self._map(f"{self.split}.idx", np.dtype("<u8"))[[0, -1]]
                if ends[0] != 0 or ends[-1] != self.num_tokens:
                    raise ValueError(f"{self.path / f'{self.split}.idx'} does not belong to {self.split}.bin")
            return
        for number, shard in enumerate(self.shards):
            self._check_size(f"{shard.name}.bin", shard.tokens * self._dtype.itemsize)
            self._check_size(f"{shard.name}.idx", HEADER_BYTES + shard.documents * 8)
            check_index(self.path / f"{shard.name}.idx", shard, number, self._dtype.itemsize)

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (size := file.stat().st_size) != expected:
            raise ValueError(f"{file} is damaged: {size} bytes, expected {expected}")

    def _map(self, name: str, dtype: np.dtype, skip: int = 0) -> NDArray:
        """Return a file without its first bytes, mapped."""
        if name not in self._maps:
            while len(self._maps) >= _MOST_MAPS:
                del self._maps[next(iter(self._maps))]
            try:
                with (self.path / name).open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                replaced = _identity(self.path / "corpus.json") != self._identity
            except FileNotFoundError:
                replaced = True
            if replaced:  # asked after the opening: a corpus is replaced as a whole, by a rename of its folder
                raise RuntimeError(f"the corpus {self.path} was replaced or removed while it was read; start again")
            self._maps[name] = mapped, np.frombuffer(mapped, dtype, offset=skip)
        return self._maps[name][1]

    def _release(self, name: str) -> None:
        """Give the pages of a mapped file back. They stay in the system's cache, but count no more for this process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            with contextlib.suppress(OSError):
                self._maps[name][0].madvise(mmap.MADV_DONTNEED)  # all: the system maps more than was touched

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.header["vocab_size"]

    def read(self, start: int, count: int) -> NDArray:
        """Return a copy of `count` tokens from position `start` of the split."""
        tokens = np.empty(count, self._dtype)
        number, done = bisect_right(self._starts, start) - 1, 0
        while done < count:
            name, begin = f"{self.shards[number].name}.bin", start + done - self._starts[number]
            part = self._map(name, self._dtype)[begin : begin + count - done]
            tokens[done : done + len(part)] = part
            self._release(name)
            number, done = number + 1, done + len(part)
        return tokens

    def windows_of_sources(self, length: int) -> list[int]:
        """Return the number of whole windows of `length` tokens in each source."""
        return [(end - start) // length for start, end in itertools.pairwise(self._source_starts)]

    def num_windows(self, length: int) -> int:
        """Return the number of whole windows of `length` tokens; no window has tokens of two sources.

        ValueError: there is none.
        """
        count = sum(self.windows_of_sources(length))
        if count == 0:
            more = " or hold out more of it (--validation-fraction)" if self.split == "validation" else ""
            each = f" in {len(self.sources)} sources, each" if len(self.sources) > 1 else ","
            raise ValueError(
                f"the {self.split} split of {self.path} has {self.num_tokens} tokens{each} less than one window of "
                f"{length}; prepare more text{more}, or train on shorter windows (data.window)"
            )
        return count

    def windows(self, indices: NDArray[np.int64], length: int) -> NDArray:
        """Return the windows [B, length] of these indices, which count through the sources in order.

        ValueError: a token id is outside of the vocabulary.
        """
        firsts = list(itertools.accumulate(self.windows_of_sources(length), initial=0))
        out = np.empty((len(indices), length), self._dtype)
        for row, index in enumerate(np.asarray(indices).tolist()):
            if not 0 <= index < firsts[-1]:
                raise IndexError(f"window {index} of {firsts[-1]}")
            source = bisect_right(firsts, index) - 1
            out[row] = self.read(self._source_starts[source] + (index - firsts[source]) * length, length)
        if int(out.max(initial=0)) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token id {int(out.max())}, outside of its vocabulary of {self.vocab_size}"
            )
        return out

    def documents(self) -> Iterator[NDArray]:
        """Yield the tokens of each document, its eos token included.

        ValueError: an index is damaged.
        """
        begin: int | None = None
        for at, name in self._document_starts():
            if begin is not None:
                if at <= begin:
                    raise ValueError(f"{self.path / name} is damaged: documents must start in ascending order")
                yield self.read(begin, at - begin)
            elif at != 0:
                raise ValueError(f"{self.path / name} is damaged: the first document must start at 0")
            begin = at

    def _document_starts(self) -> Iterator[tuple[int, str]]:
        """Yield where documents start in the split, with num_tokens last, and the file that says so."""
        name = "corpus.json"
        for shard, first in zip(self.shards, self._starts, strict=False):
            name = f"{shard.name}.idx"
            skip = 0 if self._version == 1 else HEADER_BYTES
            for chunk in range(0, shard.documents, _INDEX_CHUNK):
                starts = self._map(name, np.dtype("<u8"), skip)[chunk : min(chunk + _INDEX_CHUNK, shard.documents)]
                if bool((starts >= shard.tokens).any()):
                    raise ValueError(f"{self.path / name} is damaged: documents must start within {shard.name}.bin")
                yield from ((first + at, name) for at in starts.tolist())
        if self.shards:
            yield self.num_tokens, name

    def fingerprint(self) -> str:
        """Return a hash of what decides the order of the windows: sources, shards and their sizes."""
        shards = [(self.sources[shard.source], shard.tokens, shard.documents) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.header["tokenizer_sha256"], shards]).encode()).hexdigest()

    def unigram_entropy(self) -> float:
        """Return the entropy of the held-out tokens' own frequencies, in nats.

        It is the loss of a model that knows no context.
        """
        return self.header["validation_unigram_entropy"]


def _identity(file: Path) -> tuple[int, int]:
    """Return what tells a file from one that replaced it."""
    found = file.stat()
    return found.st_dev, found.st_ino
