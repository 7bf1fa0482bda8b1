"""Encoding of a corpus's documents: long ones in pieces, many at a time, with no control token in any."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from illada.data.sources import PIECE
from illada.text.tokenizer_files import encode_as_text, library_errors
from illada.text.words import WordEncoder

_BATCH = 1 << 20  # characters handed to the tokenizer's threads at a time: it needs about 70 bytes for each
_MARGIN = 256  # characters on both sides of a cut that decide whether it changes the tokens
_TRIES = 16  # places tried for a cut

T = TypeVar("T")


def cut(pieces: Iterable[str], place: Callable[[str], int]) -> Iterator[str]:
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


def at_a_word(text: str, good: Callable[[int], bool] = lambda at: True) -> int:
    """Return where a long text can be cut.

    It is the last `good` end of a word in its first PIECE characters, preferably before space; PIECE if there is none.
    """
    for end in (r"(?<=\w)(?=\s)", r"(?<=\w)(?=\W)"):
        for start in (PIECE - 1024, 1):  # nearby, or anywhere
            places = [match.start() for match in re.finditer(end, text[start:PIECE])][-_TRIES:]
            if found := next((start + at for at in reversed(places) if good(start + at)), None):
                return found
    return PIECE


class TextEncoder:
    """An encoder of texts, with no control token in any.

    Args:
        tokenizer: encodes text.
        control: {id: text} of the tokens that no text may give.
        dtype: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, control: dict[int, str], dtype: str) -> None:
        self.tokenizer, self.control, self.dtype = tokenizer, control, np.dtype(dtype)
        self._never = np.array(list(control), dtype=np.int64)
        self._words = WordEncoder(tokenizer, control, self.dtype) if WordEncoder.can_encode(tokenizer) else None
        self._compared = False

    @property
    def by_words(self) -> bool:
        """Whether it encodes words on one core, and not texts with the threads of the library."""
        return self._words is not None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text by the tokenizer alone."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_texts(self, texts: list[str]) -> list[NDArray]:
        """Return the ids of each text."""
        if self._words is None or (found := self._words.encode(texts)) is None:
            return list(self._encode_by_library(texts))
        if self._compared:
            return found
        expected = list(self._encode_by_library(texts))  # of the first texts, in case the library has changed
        self._compared = True
        if not all(map(np.array_equal, found, expected)):
            self._words = None
        return expected

    def encode_batches(self, batches: Iterable[tuple[list[str], T]]) -> Iterator[tuple[T, list[NDArray]]]:
        """Yield (what came with them, the ids of each text) for batches of texts."""
        for texts, rest in batches:
            yield rest, self.encode_texts(texts)

    def _encode_by_library(self, texts: list[str]) -> Iterator[NDArray]:
        with library_errors("the tokenizer cannot encode the text"):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int64)
            if np.isin(ids, self._never).any():
                ids = np.array(encode_as_text(self.encode, self.control, text), dtype=np.int64)
            yield ids.astype(self.dtype)


class Encoder:
    """An encoder of documents, which counts the cuts of long ones that change their tokens.

    Args:
        encoder: of texts.
        eos: the id behind each document.
        encode_batches: `TextEncoder.encode_batches`, or that of processes.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        eos: int,
        encode_batches: Callable[[Iterable[tuple[list[str], Any]]], Iterator[tuple[Any, list[NDArray]]]] | None = None,
    ) -> None:
        self.dtype, self.rough = encoder.dtype, 0
        self._encode, self._eos = encoder.encode, np.array([eos], encoder.dtype)
        self._encode_batches = encode_batches or encoder.encode_batches

    def place(self, text: str) -> int:
        """Return a place where `text` can be cut without a change of its tokens.

        Without such a place, return where it is cut all the same.
        """

        def good(at: int) -> bool:
            before, behind = text[max(0, at - _MARGIN) : at], text[at : at + _MARGIN]
            return self._encode(before) + self._encode(behind) == self._encode(before + behind)

        at = at_a_word(text, good)
        if at == PIECE and not good(at):
            self.rough += 1
            at = at_a_word(text)
        return at

    def batches(self, documents: Iterable[Iterable[str]]) -> Iterator[tuple[NDArray, NDArray[np.int64], int]]:
        """Yield (ids, where documents begin in them, bytes of text), about a megabyte of text at a time."""
        begins = True
        batches = (([text for text, _ in batch], batch) for batch in self._batches(documents))
        for batch, found in self._encode_batches(batches):
            parts: list[NDArray] = []
            starts: list[int] = []
            count = 0
            for (_, ends), ids in zip(batch, found, strict=True):
                if begins and (len(ids) or ends):
                    starts.append(count)
                    begins = False
                parts.append(ids)
                if ends:
                    parts.append(self._eos)
                    begins = True
                count += len(ids) + ends
            size = sum(len(text.encode()) for text, _ in batch)
            yield np.concatenate(parts), np.array(starts, dtype=np.int64), size

    def _batches(self, documents: Iterable[Iterable[str]]) -> Iterator[list[tuple[str, bool]]]:
        """Yield lists of (text, whether it ends its document), of about `_BATCH` characters."""
        batch: list[tuple[str, bool]] = []
        room = _BATCH
        for pieces in documents:
            held: str | None = None
            for text in itertools.chain(cut(pieces, self.place), [None]):
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
