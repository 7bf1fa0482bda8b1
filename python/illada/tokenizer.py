"""Text to token ids and back, with a checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from illada.data import load_tokenizer


class Tokenizer:
    """The tokenizer of a checkpoint folder; method names and meanings as in `transformers`.

    Args:
        backend: of the `tokenizers` library.
        chat_template: Jinja source, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, chat_template: str | None = None) -> None:
        self.backend = backend
        self.chat_template = chat_template

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json, or a folder that has one."""
        return cls(load_tokenizer(path))

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. With `parse_special_tokens` off, text that spells a special token is just text."""
        self.backend.encode_special_tokens = not parse_special_tokens
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
