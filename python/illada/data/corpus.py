"""Preparation of a corpus: the documents of its sources become files of tokens.

A prepared corpus is a folder:

    corpus.json                     what it is: format, sources, shards, dtype, special ids, hash of the tokenizer
    tokenizer.json                  as the `tokenizers` library reads it
    train-00000.bin train-00000.idx validation-00000.bin ...
                                    shards of token ids, and where documents begin in them: see `illada.data.shards`

Every document ends with the eos token. A source has shards of its own, in the order of its documents. Documents are
held out for validation by a hash of their content, so the split does not depend on their order or the machine; where
those of a source are too few or too unequal for that, the end of each is.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from illada.data.dataset import FORMAT, FORMAT_VERSION, SPLITS
from illada.data.encoding import Encoder, TextEncoder, at_a_word, cut
from illada.data.encoding_process import EncoderProcesses, processes_for
from illada.data.shards import SHARD_BYTES, ShardWriter
from illada.data.sources import PIECE, Source, open_sources
from illada.files import folder_to_write, recover, staged_directory
from illada.terminal import shows
from illada.text.tokenizer_files import control_tokens, load_tokenizer
from illada.text.training import special_ids, tokenizer_sha256, train_tokenizer, vocab_size_of

SAMPLE = 1 << 25  # characters that a tokenizer is trained on, where there are more
_RECORDS = 1 << 12  # of documents in memory at a time


def prepare(
    source: str | Sequence[str],
    out_dir: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    special: dict[str, int] | None = None,
    text_column: str | None = None,
    validation_fraction: float = 0.05,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn text into a corpus folder, in memory that does not grow with the text.

    Args:
        source: one or several, see `illada.data.sources.open_sources`. Their text is kept in files beside out_dir
            meanwhile.
        out_dir: the folder to make. It appears complete or not at all.
        vocab_size: of the tokenizer to train; not used with `tokenizer`. It learns from at most `SAMPLE` characters:
            of longer text, from stretches of 65,536 characters at equal distances.
        tokenizer: a given tokenizer.json.
        special: special ids of `tokenizer`, {name: id}, where it does not use iLLaDA's names.
        text_column: see `illada.data.sources.open_sources`.
        validation_fraction: share of each source to hold out, in whole documents; if that misses it by a factor of two
            (a few large files), the last part of each document is held out instead.
        shard_bytes: of token ids in a shard.
        overwrite: replace an existing corpus.
        progress: show progress bars on a terminal.

    Returns:
        The header, as written to corpus.json.

    Raises:
        FileExistsError: out_dir exists and overwrite is off. ValueError: bad arguments, too little text.
    """
    out_dir = Path(out_dir)
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in (0, 1), got {validation_fraction}")
    if shard_bytes < 4:
        raise ValueError(f"shard_bytes must be at least 4, got {shard_bytes}")
    recover(out_dir)
    folder_to_write(out_dir)  # its errors come first
    if out_dir.exists() and not overwrite:
        raise FileExistsError(f"{out_dir} exists; overwrite it with overwrite=True (--overwrite), or choose another")
    if out_dir.exists() and not (out_dir / "corpus.json").exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} exists and is not a corpus; choose another folder")
    progress = shows(progress)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    sources = open_sources(source, text_column)
    with staged_directory(out_dir) as folder, _Texts(folder, sources) as texts:
        texts.read(validation_fraction, progress)
        if any(next(texts.parts(split), None) is None for split in SPLITS):
            named = ", ".join(repr(one.name) for one in sources)
            count = sum(map(len, texts.documents))
            raise ValueError(f"source {named} has {count} documents, too little text to hold any of it out")
        trained = train_tokenizer(texts.sample(SAMPLE), vocab_size, progress=progress) if given is None else given
        ids = special_ids(trained, special)
        control = control_tokens(trained, ids.values())
        trained.encode_special_tokens = True  # a document that spells "<[MASK]>" is text, not a mask
        trained.save(str(folder / "tokenizer.json"))
        size = vocab_size_of(trained)
        dtype = "uint16" if size <= 1 << 16 else "uint32"
        text_encoder = TextEncoder(trained, control, dtype)
        characters = sum(documents.characters for documents in texts.documents)
        splits, counts = {}, np.zeros(size, dtype=np.int64)
        with EncoderProcesses(text_encoder, processes_for(text_encoder, characters)) as processes:
            encoder = Encoder(text_encoder, ids["eos"], processes.encode_batches if len(processes) else None)
            for split in SPLITS:
                splits[split] = _write(texts, split, encoder, folder, shard_bytes, counts, progress)
        encoder.warn()
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "dtype": dtype,
            "vocab_size": size,
            **{f"{name}_token_id": i for name, i in ids.items()},
            "tokenizer_sha256": tokenizer_sha256(folder),
            "sources": [
                {
                    "name": one.name,
                    "held_out": held_out,
                    "documents": len(texts.documents[i]),
                    **{key: sum(splits[split]["by_source"][i][key] for split in SPLITS) for key in ("tokens", "bytes")},
                    "left_out": dict(one.left_out.reasons),
                }
                for i, (one, held_out) in enumerate(zip(sources, texts.held_out, strict=True))
            ],
            "splits": {split: {k: v for k, v in found.items() if k != "by_source"} for split, found in splits.items()},
            "validation_unigram_entropy": _entropy(counts),
        }
        (folder / "corpus.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return header


_SIZES = ("documents", "tokens", "bytes")


def _write(
    texts: _Texts,
    split: str,
    encoder: Encoder,
    folder: Path,
    shard_bytes: int,
    counts: NDArray[np.int64],
    progress: bool,
) -> dict[str, Any]:
    """Write the shards of a split, and return its entry of the header, with sizes "by_source".

    counts: of each token id; those of the validation split are added.
    """
    by_source = []
    with (
        ShardWriter(folder, split, encoder.dtype.name, shard_bytes // encoder.dtype.itemsize) as writer,
        tqdm(desc=f"encoding {split}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for source in range(len(texts.sources)):
            sizes = dict.fromkeys(_SIZES, 0)
            for ids, starts, read in encoder.batches(texts.parts(split, source)):
                writer.write(ids, starts)
                if split == "validation":
                    counts += np.bincount(ids, minlength=len(counts))
                for key, value in zip(_SIZES, (len(starts), len(ids), read), strict=True):
                    sizes[key] += value
                bar.update(read)
            writer.end_source()
            by_source.append(sizes)
    return {
        **{key: sum(sizes[key] for sizes in by_source) for key in _SIZES},
        "shards": [
            {
                "name": shard.name,
                "source": texts.sources[shard.source].name,
                "documents": shard.documents,
                "tokens": shard.tokens,
            }
            for shard in writer.shards
        ],
        "by_source": by_source,
    }


class Document(NamedTuple):
    """Where a document is in the file of its source, and how much of it."""

    start: int  # in bytes
    size: int  # in bytes
    length: int  # in characters
    score: float  # in [0, 1), by a hash of the text


_RECORD = np.dtype([("start", "u8"), ("size", "u8"), ("length", "u8"), ("score", "f8")])


class Documents:
    """Documents of a source in an unnamed temporary file, one after the other, with a record of each in a second file.

    Args:
        folder: where the files are; they need the room of the text.
    """

    def __init__(self, folder: Path) -> None:
        self._text = cast(IO[bytes], tempfile.TemporaryFile(dir=folder))
        self._records = cast(IO[bytes], tempfile.TemporaryFile(dir=folder))
        self._size = self._count = 0
        self.characters = 0

    def __enter__(self) -> Documents:
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self._records.close()

    def __len__(self) -> int:
        return self._count

    def add(self, pieces: Iterable[str]) -> None:
        """Add one more document."""
        length, digest, size = 0, hashlib.sha256(), 0
        self._text.seek(self._size)
        for piece in pieces:
            data = piece.encode()
            length, size = length + len(piece), size + len(data)
            digest.update(data)
            self._text.write(data)
        score = int.from_bytes(digest.digest()[:8], "big") / 2**64
        self._records.seek(self._count * _RECORD.itemsize)
        self._records.write(np.array([(self._size, size, length, score)], _RECORD).tobytes())
        self._size, self._count, self.characters = self._size + size, self._count + 1, self.characters + length

    def __iter__(self) -> Iterator[Document]:
        for at in range(0, self._count, _RECORDS):
            self._records.seek(at * _RECORD.itemsize)
            data = self._records.read(_RECORDS * _RECORD.itemsize)
            yield from map(Document._make, np.frombuffer(data, _RECORD).tolist())

    def pieces(self, document: Document, start: int = 0, end: int | None = None) -> Iterator[str]:
        """Yield characters [start, end) of a document, in pieces of `PIECE` at most."""
        at, end = 0, document.length if end is None else end
        for piece in codecs.iterdecode(self._blocks(document.start, document.start + document.size), "utf-8"):
            if at >= end:
                return
            if part := piece[max(0, start - at) : end - at]:
                yield part
            at += len(piece)

    def _blocks(self, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            self._text.seek(start)
            yield self._text.read(min(PIECE, end - start))
            start += PIECE


class HeldOut:
    """The division of a source's text between the splits.

    Attributes:
        what: is held out: "documents" (each is as a whole in one split) or "ends".
    """

    def __init__(self, documents: Documents, fraction: float) -> None:
        self._documents, self._fraction = documents, fraction
        held = [document.length for document in documents if document.score < fraction]
        share = sum(held) / max(1, documents.characters)
        whole = len(held) < len(documents) and fraction / 2 <= share <= 2 * fraction
        self.what = "documents" if whole else "ends"

    def start(self, document: Document) -> int:
        """Return the character at which the held-out part of a document begins."""
        if self.what == "documents":
            return 0 if document.score < self._fraction else document.length
        return _end(self._documents, document, self._fraction)


def _end(documents: Documents, document: Document, fraction: float) -> int:
    """Return where the held-out end of a document begins.

    It is not within a line or word, unless that would hold out twice as much.
    """
    length = document.length
    end = int((1 - fraction) * length)
    earliest = max(0, 2 * end - length)
    at, line, word = earliest, 0, 0
    for piece in documents.pieces(document, earliest, end):
        line = at + piece.rfind("\n") + 1 if "\n" in piece else line
        word = at + piece.rfind(" ") + 1 if " " in piece else word
        at += len(piece)
    return line or word or end


class _Texts:
    """The documents of all sources, in files.

    Args:
        folder: where the files are.
        sources: to be read.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.documents = [Documents(folder) for _ in sources]
        self._divided: list[HeldOut] = []

    def __enter__(self) -> _Texts:
        return self

    def __exit__(self, *_: object) -> None:
        for documents in self.documents:
            documents.__exit__()

    @property
    def held_out(self) -> list[str]:
        """What is held out of each source."""
        return [divided.what for divided in self._divided]

    def read(self, fraction: float, progress: bool) -> None:
        """Read the sources, and divide each between the splits."""
        with tqdm(desc="reading", unit=" documents", disable=not progress) as bar:
            for source, documents in zip(self.sources, self.documents, strict=True):
                for pieces in source.documents():
                    documents.add(pieces)
                    bar.update()
                self._divided.append(HeldOut(documents, fraction))

    def parts(self, split: str, source: int | None = None) -> Iterator[Iterator[str]]:
        """Yield the text of each document that lies in a split, in pieces; of one source, or of all.

        Texts of nothing but space are left out.
        """
        for documents, document, bounds in self._bounds(split, source):
            pieces = documents.pieces(document, *bounds)
            if (first := next(pieces, None)) is None:
                continue
            if first.strip() or any(piece.strip() for piece in pieces):
                yield documents.pieces(document, *bounds)

    def _bounds(self, split: str, source: int | None = None) -> Iterator[tuple[Documents, Document, tuple[int, int]]]:
        """Yield documents, and where their part of a split begins and ends, in characters."""
        for i in range(len(self.sources)) if source is None else [source]:
            documents, divided = self.documents[i], self._divided[i]
            for document in documents:
                start = divided.start(document)
                bounds = (0, start) if split == "train" else (start, document.length)
                if bounds[0] < bounds[1]:
                    yield documents, document, bounds

    def sample(self, most: int) -> Iterator[str]:
        """Yield the text of all documents, in pieces that end with words.

        Of more than `most` characters, every k-th stretch of PIECE characters: the pieces that begin in it.
        """
        every = max(1, -(-sum(documents.characters for documents in self.documents) // most))
        at = 0
        for documents in self.documents:
            for document in documents:
                stretches = range(at // PIECE, (at + document.length) // PIECE + 1)
                if any(stretch % every == 0 for stretch in stretches[:every]):
                    begin = at
                    for piece in cut(documents.pieces(document), at_a_word):
                        if begin // PIECE % every == 0:
                            yield piece
                        begin += len(piece)
                at += document.length


def _entropy(counts: NDArray) -> float:
    """Return the entropy of the empirical distribution, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
