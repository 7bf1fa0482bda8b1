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
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from illada.files import staged_directory
from illada.text import parse_json, read_json, read_lines, read_text
from illada.tokenizer_files import control_tokens, encode_as_text, load_tokenizer

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
_TEXT_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".html",
    ".tex",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cu",
    ".json",
    ".pod",
    ".org",
}
_ENCODE_BATCH = 256  # documents handed to the tokenizer's threads at a time


# ------------------------------------------------------------------------------------------------------------ sources


def read_source(source: str) -> Iterator[str]:
    """Documents of a source, in a fixed order. Files of a folder that are not UTF-8 text are left out,
    with a warning that counts them.

    Args:
        source: "stdlib", the source code of the running Python's own library; "dir:PATH", every text file below a
            folder; or "jsonl:PATH", one JSON object a line with its text under "text".

    Raises:
        ValueError: an unknown kind of source, a line without text. FileNotFoundError: no such path.
    """
    kind, _, path = source.partition(":")
    path = os.path.expanduser(path)  # a shell expands ~ at the beginning of a word alone
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        return _read_files(p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts))
    if kind == "dir" and path:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"source {source!r}: {path} is not a folder")
        return _read_files(p for p in sorted(Path(path).rglob("*")) if p.suffix in _TEXT_SUFFIXES and p.is_file())
    if kind == "jsonl" and path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"source {source!r}: {path} is not a file")
        return _read_jsonl(Path(path))
    raise ValueError(f"source must be stdlib, dir:PATH or jsonl:PATH, got {source!r}")


def _read_files(paths: Iterable[Path]) -> Iterator[str]:
    left_out: list[str] = []
    for path in paths:
        try:
            text = read_text(path)
        except (ValueError, OSError) as error:
            left_out.append(str(error))
            continue
        if text.strip():
            yield text
    if left_out:
        warnings.warn(f"left out {len(left_out)} files that are not UTF-8 text; the first: {left_out[0]}", stacklevel=1)


def _read_jsonl(path: Path) -> Iterator[str]:
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            text = parse_json(line, where)["text"]
        except (KeyError, TypeError):
            raise ValueError(f'{where}: expected a JSON object with a "text" field') from None
        if not isinstance(text, str):
            raise ValueError(f'{where}: "text" must be a string, got {type(text).__name__}')
        if text.strip():
            yield text


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
    for name, i in ids.items():
        if not 0 <= i < tokenizer.get_vocab_size():
            raise ValueError(f"special id {name}={i} is outside of the vocabulary of {tokenizer.get_vocab_size()}")
    return ids


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
        source: see `read_source`.
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
    if out_dir.exists() and not overwrite:
        raise FileExistsError(f"{out_dir} exists; overwrite it with overwrite=True (--overwrite), or choose another")
    if out_dir.exists() and not (out_dir / "corpus.json").exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} exists and is not a corpus; choose another folder")
    progress = progress and sys.stderr.isatty()
    documents = list(tqdm(read_source(source), desc="reading", unit=" documents", disable=not progress))
    parts, held_out = hold_out(documents, validation_fraction)
    if not parts["train"] or not parts["validation"]:
        raise ValueError(f"source {source!r} has {len(documents)} documents, too little text to hold any of it out")
    if tokenizer is None:
        trained = train_tokenizer(documents, vocab_size, progress=progress)
    else:
        trained = load_tokenizer(tokenizer)
    ids = special_ids(trained, special)
    control = control_tokens(trained, ids.values())
    trained.encode_special_tokens = True  # a document that spells "<[MASK]>" is text, not a mask

    with staged_directory(out_dir) as folder:
        trained.save(str(folder / "tokenizer.json"))
        dtype = "uint16" if trained.get_vocab_size() <= 1 << 16 else "uint32"
        header: dict[str, Any] = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "source": source,
            "dtype": dtype,
            "vocab_size": trained.get_vocab_size(),
            **{f"{name}_token_id": i for name, i in ids.items()},
            "tokenizer_sha256": tokenizer_sha256(folder),
            "held_out": held_out,
            "splits": {
                split: _write_split(parts[split], trained, ids["eos"], control, folder / split, dtype, progress)
                for split in SPLITS
            },
        }
        counts = np.bincount(np.fromfile(folder / "validation.bin", dtype=dtype))
        header["validation_unigram_entropy"] = _entropy(counts)
        (folder / "corpus.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return header


def hold_out(documents: list[str], fraction: float) -> tuple[dict[str, list[str]], str]:
    """Share the text out to the splits: ({split: texts}, "documents" or "ends", what was held out)."""
    scores = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 for text in documents]
    parts = {
        "train": [text for text, score in zip(documents, scores, strict=True) if score >= fraction],
        "validation": [text for text, score in zip(documents, scores, strict=True) if score < fraction],
    }
    share = sum(map(len, parts["validation"])) / max(1, sum(map(len, documents)))
    if parts["train"] and fraction / 2 <= share <= 2 * fraction:
        return parts, "documents"
    parts = {split: [] for split in SPLITS}
    for text in documents:
        cut = int((1 - fraction) * len(text))
        earliest = max(0, 2 * cut - len(text))  # not within a line or word, unless that would hold out twice as much
        cut = text.rfind("\n", earliest, cut) + 1 or text.rfind(" ", earliest, cut) + 1 or cut
        parts["train"].append(text[:cut])
        parts["validation"].append(text[cut:])
    return {split: [text for text in texts if text.strip()] for split, texts in parts.items()}, "ends"


def _write_split(
    texts: list[str], tokenizer: Tokenizer, eos: int, control: dict[int, str], stem: Path, dtype: str, progress: bool
) -> dict[str, int]:
    """Write stem.bin and stem.idx; how many documents, tokens and bytes of text they hold."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    offsets, never = [0], np.array(list(control), dtype=np.int64)
    with (
        stem.with_suffix(".bin").open("wb") as file,
        tqdm(total=len(texts), desc=f"encoding {stem.name}", unit=" documents", disable=not progress) as bar,
    ):
        for start in range(0, len(texts), _ENCODE_BATCH):
            batch = texts[start : start + _ENCODE_BATCH]
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for text, encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids
                if np.isin(ids, never).any():
                    ids = encode_as_text(encode, control, text)
                np.asarray([*ids, eos], dtype=dtype).tofile(file)
                offsets.append(offsets[-1] + len(ids) + 1)
            bar.update(len(batch))
    np.asarray(offsets, dtype=np.uint64).tofile(stem.with_suffix(".idx"))
    return {"documents": len(texts), "tokens": offsets[-1], "bytes": sum(len(text.encode()) for text in texts)}


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
            raise FileNotFoundError(f"{self.path} is not a corpus (no corpus.json); make one with `illada prepare`")
        self.header: dict[str, Any] = read_json(header_file)
        try:
            known = self.header["format"] == FORMAT
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{header_file} is not the header of an {FORMAT}")
        if self.header["version"] != FORMAT_VERSION:
            raise ValueError(f"{header_file} has format version {self.header['version']}, this is {FORMAT_VERSION}")
        expected = self.header["splits"][split]
        self.tokens: NDArray = self._map(f"{split}.bin", np.dtype(self.header["dtype"]), expected["tokens"])
        self.documents: NDArray = self._map(f"{split}.idx", np.dtype(np.uint64), expected["documents"] + 1)
        if int(self.documents[-1]) != expected["tokens"]:
            raise ValueError(f"{self.path / f'{split}.idx'} does not belong to {split}.bin")
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
