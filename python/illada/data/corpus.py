"""Corpora: from text to memory-mapped token files, and back as windows of tokens.

A prepared corpus is a folder:

    corpus.json                 what it is: format, dtype, sizes, special ids, hash of the tokenizer
    tokenizer.json              as the `tokenizers` library reads it
    train.bin validation.bin    token ids, uint16 where the vocabulary fits, else uint32, documents end to end
    train.idx validation.idx    where each document starts, uint64, with the number of tokens as last entry

Every document ends with the eos token. Documents are held out for validation by a hash of their content, so the split
does not depend on their order or the machine; where they are too few or too unequal for that, the end of each is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from illada.data.sources import PIECE, Documents, hold_out, open_source
from illada.files import folder_to_write, recover, staged_directory
from illada.schema import Count, NonNegativeFloat, check_object
from illada.terminal import shows
from illada.text.files import read_json
from illada.text.tokenizer_files import control_tokens, encode_as_text, library_errors, load_tokenizer

_MOST_IDS = 1 << 22  # of a vocabulary: the largest have a quarter of a million, and each id is counted
FORMAT, FORMAT_VERSION = "illada-corpus", 1
SPLITS = ("train", "validation")

#: iLLaDA's special tokens, in the order of their ids.
SPECIAL_TOKENS = {
    "bos": "<[begin▁of▁sentence]>",
    "pad": "<[PAD▁TOKEN]>",
    "eos": "<[end▁of▁sentence]>",
    "reserved_0": "<[reserved▁0]>",
    "reserved_1": "<[reserved▁1]>",
    "mask": "<[MASK]>",
}
_SPECIAL_NAMES = ("bos", "pad", "eos", "mask")
#: corpus.json, but for its format and version.
_HEADER = {
    "dtype": Literal["uint16", "uint32"],
    "vocab_size": Annotated[int, Gt(0), Le(_MOST_IDS)],
    **{f"{name}_token_id": Count for name in _SPECIAL_NAMES},
    "tokenizer_sha256": str,
    "splits": dict[str, dict[str, Any]],
    "validation_unigram_entropy": NonNegativeFloat,
}
_SPLIT = {"documents": Count, "tokens": Count}
_BATCH = 1 << 20  # characters handed to the tokenizer's threads at a time: it needs about 70 bytes for each
_MARGIN = 256  # characters on both sides of a cut that decide whether it changes the tokens
_TRIES = 16  # places tried for a cut


# --------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_sha256(path: str | Path) -> str:
    """What ties a corpus to a checkpoint: the SHA-256 of its tokenizer.json (of a folder's, for a folder)."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def train_tokenizer(documents: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer whose first ids are iLLaDA's special tokens: bos 0, pad 1, eos 2, mask 5."""
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and the special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def special_ids(tokenizer: Tokenizer, given: dict[str, int] | None = None) -> dict[str, int]:
    """Ids of bos, pad, eos and mask: as given, else by iLLaDA's names; an error says which are missing."""
    given = given or {}
    if unknown := set(given) - set(_SPECIAL_NAMES):
        raise ValueError(f"special ids may be given for {', '.join(_SPECIAL_NAMES)}, got {', '.join(sorted(unknown))}")
    found = {name: given.get(name, tokenizer.token_to_id(SPECIAL_TOKENS[name])) for name in _SPECIAL_NAMES}
    ids = {name: i for name, i in found.items() if i is not None}
    if missing := [name for name in _SPECIAL_NAMES if name not in ids]:
        raise ValueError(
            f"the tokenizer has none of iLLaDA's names for {', '.join(missing)}; give their ids, as in "
            f"--special {missing[0]}=ID"
        )
    size = _vocab_size(tokenizer)
    for name, i in ids.items():
        if not 0 <= i < size:
            raise ValueError(f"special id {name}={i} is outside of the vocabulary of {size}")
    return ids


def _vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is more than the number of tokens where ids are left out."""
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > _MOST_IDS:
        raise ValueError(f"the tokenizer's ids must be below {_MOST_IDS}, got {size - 1}")
    return size


# ------------------------------------------------------------------------------------------------------------ prepare


def prepare(
    source: str,
    out_dir: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    special: dict[str, int] | None = None,
    validation_fraction: float = 0.05,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn text into a corpus folder.

    Args:
        source: see `illada.data.sources.open_source`. Its text is kept in a file beside out_dir meanwhile, not in
            memory.
        out_dir: the folder to make. It appears complete or not at all.
        vocab_size: of the tokenizer to train; not used with `tokenizer`.
        tokenizer: a given tokenizer.json; `special` holds its special ids where it does not use iLLaDA's names.
        validation_fraction: share of the text to hold out, in whole documents; if that misses it by a factor of two (a
            few large files), the last part of each document is held out instead.
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
    found = open_source(source)
    with staged_directory(out_dir) as folder, Documents(folder) as documents:
        for pieces in tqdm(found, desc="reading", unit=" documents", disable=not progress):
            documents.add(pieces)
        starts, held_out = hold_out(documents, validation_fraction)
        if any(next(_parts(documents, starts, split), None) is None for split in SPLITS):
            raise ValueError(f"source {source!r} has {len(documents)} documents, too little text to hold any of it out")
        if given is None:
            texts = (piece for i in range(len(documents)) for piece in _cut(documents.pieces(i), _at_a_word))
            trained = train_tokenizer(texts, vocab_size, progress=progress)
        else:
            trained = given
        ids = special_ids(trained, special)
        control = control_tokens(trained, ids.values())
        trained.encode_special_tokens = True  # a document that spells "<[MASK]>" is text, not a mask
        trained.save(str(folder / "tokenizer.json"))
        size = _vocab_size(trained)
        dtype = "uint16" if size <= 1 << 16 else "uint32"
        writer = _Writer(trained, ids["eos"], control, dtype)
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "source": source,
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


def _parts(documents: Documents, starts: Sequence[int], split: str) -> Iterator[Iterator[str]]:
    """What of each document is in a split, in pieces, where that is more than space."""
    for i, start in enumerate(starts):
        bounds = (0, start) if split == "train" else (start, documents.lengths[i])
        if any(piece.strip() for piece in documents.pieces(i, *bounds)):
            yield documents.pieces(i, *bounds)


def _cut(pieces: Iterable[str], place: Callable[[str], int]) -> Iterator[str]:
    """The same text in pieces that end at a `place(text)`, which is given at least PIECE + _MARGIN characters."""
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
    """Where a long text can be cut: the last `good` end of a word in its first PIECE characters, one before space if it
    can be; PIECE if there is none.
    """
    for end in (r"(?<=\w)(?=\s)", r"(?<=\w)(?=\W)"):
        for start in (PIECE - 1024, 1):  # nearby, or anywhere
            places = [match.start() for match in re.finditer(end, text[start:PIECE])][-_TRIES:]
            if found := next((start + at for at in reversed(places) if good(start + at)), None):
                return found
    return PIECE


class _Writer:
    """Encodes documents and writes a split's files; counts the cuts of long documents that change their tokens."""

    def __init__(self, tokenizer: Tokenizer, eos: int, control: dict[int, str], dtype: str) -> None:
        self.tokenizer, self.eos, self.control, self.dtype = tokenizer, eos, control, dtype
        self.never = np.array(list(control), dtype=np.int64)
        self.rough = 0

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def place(self, text: str) -> int:
        """Where `text` can be cut and gives the same tokens; else where it is cut all the same."""

        def good(at: int) -> bool:
            before, behind = text[max(0, at - _MARGIN) : at], text[at : at + _MARGIN]
            return self.encode(before) + self.encode(behind) == self.encode(before + behind)

        at = _at_a_word(text, good)
        if at == PIECE and not good(at):
            self.rough += 1
            at = _at_a_word(text)
        return at

    def write(self, documents: Iterable[Iterable[str]], stem: Path, progress: bool) -> dict[str, int]:
        """Write stem.bin and stem.idx; how many documents, tokens and bytes of text they hold."""
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
        """Lists of (text, is it the end of its document), of about `_BATCH` characters."""
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
        """Say how many cuts change tokens."""
        if self.rough:
            warnings.warn(
                f"documents of more than {PIECE:,} characters were encoded in pieces, and at {self.rough:,} of the "
                "cuts this tokenizer may give other tokens than for the whole: no word ends there, or it treats the "
                "start of a text in its own way",
                stacklevel=3,
            )


def _count(file: Path, dtype: str) -> NDArray:
    """How often each id is in a file of tokens."""
    tokens: NDArray = np.memmap(file, dtype=dtype, mode="r")
    counts = np.zeros(int(tokens.max()) + 1, dtype=np.int64)
    for at in range(0, len(tokens), _BATCH):
        counts += np.bincount(tokens[at : at + _BATCH], minlength=len(counts))
    return counts


def _entropy(counts: NDArray) -> float:
    """Of the empirical distribution, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ------------------------------------------------------------------------------------------------------------ reading


class TokenDataset:
    """One split of a prepared corpus, memory-mapped.

    Attributes:
        header: corpus.json.
        tokens: the ids, uint16 or uint32 [num_tokens], not in memory.
        documents: uint64 [num_documents + 1], where each document starts, with num_tokens last.

    Raises:
        FileNotFoundError: no corpus there. ValueError: not a corpus, another format version, or damaged files.
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
        if (version := self.header.get("version")) != FORMAT_VERSION:
            raise ValueError(f"{header_file} has format version {version!r:.80}, this is {FORMAT_VERSION}")
        check_object(self.header, _HEADER, str(header_file))
        if wrong := [i for name in _SPECIAL_NAMES if not (i := self.header[f"{name}_token_id"]) < self.vocab_size]:
            raise ValueError(f"{header_file}: token id {wrong[0]} is outside of the vocabulary of {self.vocab_size}")
        expected = check_object(self.header["splits"].get(split), _SPLIT, f"{header_file}, splits, {split}")
        self.tokens: NDArray = self._map(f"{split}.bin", np.dtype(self.header["dtype"]), expected["tokens"])
        self.documents: NDArray = self._map(f"{split}.idx", np.dtype(np.uint64), expected["documents"] + 1)
        if int(self.documents[-1]) != expected["tokens"] or int(self.documents[0]) != 0:
            raise ValueError(f"{self.path / f'{split}.idx'} does not belong to {split}.bin")
        if bool((self.documents[1:] < self.documents[:-1]).any()):
            raise ValueError(f"{self.path / f'{split}.idx'} is damaged: documents must start in ascending order")
        if tokenizer_sha256(self.path) != self.header["tokenizer_sha256"]:
            raise ValueError(f"{self.path / 'tokenizer.json'} is not the tokenizer that this corpus was made with")

    def _map(self, name: str, dtype: np.dtype, count: int) -> NDArray:
        file = self.path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise ValueError(f"{file} is damaged: {size} bytes, expected {count * dtype.itemsize}")
        return np.memmap(file, dtype=dtype, mode="r") if count else np.empty(0, dtype)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self.header["vocab_size"]

    def num_windows(self, length: int) -> int:
        """Whole windows of `length` tokens; ValueError if there is none."""
        count = len(self.tokens) // length
        if count == 0:
            more = " or hold out more of it (--validation-fraction)" if self.split == "validation" else ""
            raise ValueError(
                f"the {self.split} split of {self.path} has {len(self.tokens)} tokens, less than one window of "
                f"{length}; prepare more text{more}, or train on shorter windows (data.window)"
            )
        return count

    def windows(self, indices: NDArray[np.int64], length: int) -> NDArray:
        """Windows [B, length] by index; ValueError for a token id outside of the vocabulary."""
        out = np.stack([self.tokens[i * length : (i + 1) * length] for i in np.asarray(indices).tolist()])
        if int(out.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token id {int(out.max())}, outside of its vocabulary of {self.vocab_size}"
            )
        return out

    def unigram_entropy(self) -> float:
        """Entropy of the held-out tokens' own frequencies, in nats: what knowing no context costs."""
        return self.header["validation_unigram_entropy"]


def parse_special(text: str) -> dict[str, int]:
    """`"eos=2,mask=5"` as a dict, for the command line."""
    try:
        return {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"special ids must look like eos=2,mask=5, got {text!r}") from None
