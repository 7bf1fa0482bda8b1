"""Preparation of a corpus: the documents of a source become files of tokens.

A prepared corpus is a folder:

    corpus.json                 what it is: format, dtype, sizes, special ids, hash of the tokenizer
    tokenizer.json              as the `tokenizers` library reads it
    train.bin validation.bin    token ids, uint16 where the vocabulary fits, else uint32, documents end to end
    train.idx validation.idx    where each document starts, uint64, with the number of tokens as last entry

Every document ends with the eos token. Documents are held out for validation by a hash of their content, so the split
does not depend on their order or the machine; where they are too few or too unequal for that, the end of each is.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from illada.data.dataset import FORMAT, FORMAT_VERSION, SPLITS
from illada.data.sources import PIECE, open_sources
from illada.files import folder_to_write, recover, staged_directory
from illada.terminal import shows
from illada.text.tokenizer_files import control_tokens, encode_as_text, library_errors, load_tokenizer
from illada.text.training import special_ids, tokenizer_sha256, train_tokenizer, vocab_size_of

_BATCH = 1 << 20  # characters handed to the tokenizer's threads at a time: it needs about 70 bytes for each
_MARGIN = 256  # characters on both sides of a cut that decide whether it changes the tokens
_TRIES = 16  # places tried for a cut


def prepare(
    source: str | Sequence[str],
    out_dir: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    special: dict[str, int] | None = None,
    validation_fraction: float = 0.05,
    text_column: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn text into a corpus folder.

    Args:
        source: one or several, see `illada.data.sources.open_sources`. Their text is kept in a file beside out_dir
            meanwhile, not in memory.
        out_dir: the folder to make. It appears complete or not at all.
        vocab_size: of the tokenizer to train; not used with `tokenizer`.
        tokenizer: a given tokenizer.json.
        special: special ids of `tokenizer`, {name: id}, where it does not use iLLaDA's names.
        validation_fraction: share of the text to hold out, in whole documents; if that misses it by a factor of two (a
            few large files), the last part of each document is held out instead.
        text_column: see `illada.data.sources.open_sources`.
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
    recover(out_dir)
    folder_to_write(out_dir)  # its errors come first
    if out_dir.exists() and not overwrite:
        raise FileExistsError(f"{out_dir} exists; overwrite it with overwrite=True (--overwrite), or choose another")
    if out_dir.exists() and not (out_dir / "corpus.json").exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} exists and is not a corpus; choose another folder")
    progress = shows(progress)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    sources = open_sources(source, text_column)
    with staged_directory(out_dir) as folder, Documents(folder) as documents:
        found = itertools.chain.from_iterable(one.documents() for one in sources)
        for pieces in tqdm(found, desc="reading", unit=" documents", disable=not progress):
            documents.add(pieces)
        starts, held_out = hold_out(documents, validation_fraction)
        if any(next(_parts(documents, starts, split), None) is None for split in SPLITS):
            named = ", ".join(repr(one.name) for one in sources)
            raise ValueError(f"source {named} has {len(documents)} documents, too little text to hold any of it out")
        if given is None:
            texts = (piece for i in range(len(documents)) for piece in _cut(documents.pieces(i), _at_a_word))
            trained = train_tokenizer(texts, vocab_size, progress=progress)
        else:
            trained = given
        ids = special_ids(trained, special)
        control = control_tokens(trained, ids.values())
        trained.encode_special_tokens = True  # a document that spells "<[MASK]>" is text, not a mask
        trained.save(str(folder / "tokenizer.json"))
        size = vocab_size_of(trained)
        dtype = "uint16" if size <= 1 << 16 else "uint32"
        writer = _Writer(trained, ids["eos"], control, dtype)
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "sources": [{"name": one.name, "documents": one.count} for one in sources],
            "dtype": dtype,
            "vocab_size": size,
            **{f"{name}_token_id": i for name, i in ids.items()},
            "tokenizer_sha256": tokenizer_sha256(folder),
            "held_out": held_out,
            "splits": {
                split: writer.write(_parts(documents, starts, split), folder / split, progress) for split in SPLITS
            },
        }
        writer.warn()
        header["validation_unigram_entropy"] = _entropy(_count(folder / "validation.bin", dtype))
        (folder / "corpus.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return header


class Documents:
    """Documents in an unnamed temporary file, one after the other.

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
        """Add one more document."""
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
        """Yield characters [start, end) of a document, in pieces of `PIECE` at most."""
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
    """Divide the text between the splits.

    Return the character of each document at which its held-out part begins, and what is held out: "documents" (each is
    as a whole in one split) or "ends".
    """
    held_out = [score < fraction for score in documents.scores]
    share = sum(length for length, held in zip(documents.lengths, held_out, strict=True) if held)
    if not all(held_out) and fraction / 2 <= share / max(1, sum(documents.lengths)) <= 2 * fraction:
        starts = (0 if held else length for length, held in zip(documents.lengths, held_out, strict=True))
        return array("Q", starts), "documents"
    return array("Q", (_end(documents, index, fraction) for index in range(len(documents)))), "ends"


def _end(documents: Documents, index: int, fraction: float) -> int:
    """Return where the held-out end of a document begins.

    It is not within a line or word, unless that would hold out twice as much.
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


def _parts(documents: Documents, starts: Sequence[int], split: str) -> Iterator[Iterator[str]]:
    """Yield the text of each document that lies in a split, in pieces.

    Texts of nothing but space are left out.
    """
    for i, start in enumerate(starts):
        bounds = (0, start) if split == "train" else (start, documents.lengths[i])
        if any(piece.strip() for piece in documents.pieces(i, *bounds)):
            yield documents.pieces(i, *bounds)


def _cut(pieces: Iterable[str], place: Callable[[str], int]) -> Iterator[str]:
    """Yield the same text in pieces that end where `place(text)` says.

    place: is given at least PIECE + _MARGIN characters.
    """
    text = ""
    for piece in pieces:
        text += piece
        while len(text) >= PIECE + _MARGIN:
            at = place(text)
            yield text[:at]
            text = text[at:]
    if text:
        yield text


def _at_a_word(text: str, good: Callable[[int], bool] = lambda at: True) -> int:
    """Return where a long text can be cut.

    It is the last `good` end of a word in its first PIECE characters, preferably before space; PIECE if there is none.
    """
    for end in (r"(?<=\w)(?=\s)", r"(?<=\w)(?=\W)"):
        for start in (PIECE - 1024, 1):  # nearby, or anywhere
            places = [match.start() for match in re.finditer(end, text[start:PIECE])][-_TRIES:]
            if found := next((start + at for at in reversed(places) if good(start + at)), None):
                return found
    return PIECE


class _Writer:
    """The writer of a split's files, which also encodes the documents.

    It counts the cuts of long documents that change their tokens.
    """

    def __init__(self, tokenizer: Tokenizer, eos: int, control: dict[int, str], dtype: str) -> None:
        self.tokenizer, self.eos, self.control, self.dtype = tokenizer, eos, control, dtype
        self.never = np.array(list(control), dtype=np.int64)
        self.rough = 0

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def place(self, text: str) -> int:
        """Return a place where `text` can be cut without a change of its tokens.

        Without such a place, return where it is cut all the same.
        """

        def good(at: int) -> bool:
            before, behind = text[max(0, at - _MARGIN) : at], text[at : at + _MARGIN]
            return self.encode(before) + self.encode(behind) == self.encode(before + behind)

        at = _at_a_word(text, good)
        if at == PIECE and not good(at):
            self.rough += 1
            at = _at_a_word(text)
        return at

    def write(self, documents: Iterable[Iterable[str]], stem: Path, progress: bool) -> dict[str, int]:
        """Write stem.bin and stem.idx, and return how many documents, tokens and bytes of text they hold."""
        offsets, tokens, size = array("Q", [0]), 0, 0
        with (
            stem.with_suffix(".bin").open("wb") as file,
            tqdm(desc=f"encoding {stem.name}", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            for batch in self._batches(documents):
                texts = [text for text, _ in batch]
                with library_errors("the tokenizer cannot encode the text"):
                    encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for (text, ends), encoding in zip(batch, encodings, strict=True):
                    ids = encoding.ids
                    if np.isin(ids, self.never).any():
                        ids = encode_as_text(self.encode, self.control, text)
                    if ends:
                        ids = [*ids, self.eos]
                    np.asarray(ids, dtype=self.dtype).tofile(file)
                    tokens += len(ids)
                    if ends:
                        offsets.append(tokens)
                read = sum(len(text.encode()) for text in texts)
                size += read
                bar.update(read)
        np.frombuffer(offsets, dtype=np.uint64).tofile(stem.with_suffix(".idx"))
        return {"documents": len(offsets) - 1, "tokens": tokens, "bytes": size}

    def _batches(self, documents: Iterable[Iterable[str]]) -> Iterator[list[tuple[str, bool]]]:
        """Yield lists of (text, whether it ends its document), of about `_BATCH` characters."""
        batch: list[tuple[str, bool]] = []
        room = _BATCH
        for pieces in documents:
            held: str | None = None
            for text in itertools.chain(_cut(pieces, self.place), [None]):
                if held is not None:
                    batch.append((held, text is None))
                    room -= len(held) + 64  # an empty text is not free
                if room <= 0:
                    yield batch
                    batch, room = [], _BATCH
                held = text
        if batch:
            yield batch

    def warn(self) -> None:
        """Report how many cuts change tokens."""
        if self.rough:
            warnings.warn(
                f"documents of more than {PIECE:,} characters were encoded in pieces, and at {self.rough:,} of the "
                "cuts this tokenizer may give other tokens than for the whole: no word ends there, or it treats the "
                "start of a text in its own way",
                stacklevel=3,
            )


def _count(file: Path, dtype: str) -> NDArray:
    """Return how often each id is in a file of tokens."""
    tokens: NDArray = np.memmap(file, dtype=dtype, mode="r")
    counts = np.zeros(int(tokens.max()) + 1, dtype=np.int64)
    for at in range(0, len(tokens), _BATCH):
        counts += np.bincount(tokens[at : at + _BATCH], minlength=len(counts))
    return counts


def _entropy(counts: NDArray) -> float:
    """Return the entropy of the empirical distribution, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
