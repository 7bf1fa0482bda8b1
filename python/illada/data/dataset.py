"""One split of a corpus folder, memory-mapped; `illada.data.corpus` describes the folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray

from illada.schema import Count, NonNegativeFloat, check_object
from illada.text.files import read_json
from illada.text.training import MOST_IDS, SPECIAL_NAMES, tokenizer_sha256

FORMAT, FORMAT_VERSION = "illada-corpus", 1
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
        if wrong := [i for name in SPECIAL_NAMES if not (i := self.header[f"{name}_token_id"]) < self.vocab_size]:
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
        """Return the number of whole windows of `length` tokens.

        ValueError: there is none.
        """
        count = len(self.tokens) // length
        if count == 0:
            more = " or hold out more of it (--validation-fraction)" if self.split == "validation" else ""
            raise ValueError(
                f"the {self.split} split of {self.path} has {len(self.tokens)} tokens, less than one window of "
                f"{length}; prepare more text{more}, or train on shorter windows (data.window)"
            )
        return count

    def windows(self, indices: NDArray[np.int64], length: int) -> NDArray:
        """Return the windows [B, length] of these indices.

        ValueError: a token id is outside of the vocabulary.
        """
        out = np.stack([self.tokens[i * length : (i + 1) * length] for i in np.asarray(indices).tolist()])
        if int(out.max()) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds token id {int(out.max())}, outside of its vocabulary of {self.vocab_size}"
            )
        return out

    def unigram_entropy(self) -> float:
        """Return the entropy of the held-out tokens' own frequencies, in nats.

        It is the loss of a model that knows no context.
        """
        return self.header["validation_unigram_entropy"]
