"""What a folder is that holds no text: known by the names of its files."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TOKENIZER = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")


def folder_kind(folder: Path) -> str | None:
    """Return "a saved dataset", "a prepared corpus", "a checkpoint" or "a tokenizer"; None: none of these."""
    try:
        return _kind(set(os.listdir(folder)))
    except OSError:
        return None


def _kind(names: set[str]) -> str | None:
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return "a saved dataset"
    if {"corpus.json", "tokenizer.json"} <= names:
        return "a prepared corpus"
    if "config.json" in names and any(map(_WEIGHTS.fullmatch, names)):
        return "a checkpoint"
    shown = {name for name in names if not name.startswith(".") and not name.upper().startswith(("README", "LICENSE"))}
    if {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} & names and shown <= _TOKENIZER:
        return "a tokenizer"
    return None
