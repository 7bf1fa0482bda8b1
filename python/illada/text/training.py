"""New tokenizers with iLLaDA's special tokens, and the special ids of a tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MOST_IDS = 1 << 22  # of a vocabulary: the largest have a quarter of a million, and each id is counted

#: iLLaDA's special tokens, in the order of their ids.
SPECIAL_TOKENS = {
    "bos": "<[begin▁of▁sentence]>",
    "pad": "<[PAD▁TOKEN]>",
    "eos": "<[end▁of▁sentence]>",
    "reserved_0": "<[reserved▁0]>",
    "reserved_1": "<[reserved▁1]>",
    "mask": "<[MASK]>",
}
SPECIAL_NAMES = ("bos", "pad", "eos", "mask")


def tokenizer_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a tokenizer.json (of a folder's, for a folder).

    It ties a corpus to a checkpoint.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def train_tokenizer(documents: Iterable[str], vocab_size: int, *, progress: bool = False) -> Tokenizer:
    """Return a byte-level BPE tokenizer whose first ids are iLLaDA's special tokens: bos 0, pad 1, eos 2, mask 5."""
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
    """Return the ids of bos, pad, eos and mask, as given or by iLLaDA's names.

    An error says which are missing.
    """
    given = given or {}
    if unknown := set(given) - set(SPECIAL_NAMES):
        raise ValueError(f"special ids may be given for {', '.join(SPECIAL_NAMES)}, got {', '.join(sorted(unknown))}")
    found = {name: given.get(name, tokenizer.token_to_id(SPECIAL_TOKENS[name])) for name in SPECIAL_NAMES}
    ids = {name: i for name, i in found.items() if i is not None}
    if missing := [name for name in SPECIAL_NAMES if name not in ids]:
        raise ValueError(
            f"the tokenizer has none of iLLaDA's names for {', '.join(missing)}; give their ids, as in "
            f"--special {missing[0]}=ID"
        )
    size = vocab_size_of(tokenizer)
    for name, i in ids.items():
        if not 0 <= i < size:
            raise ValueError(f"special id {name}={i} is outside of the vocabulary of {size}")
    return ids


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id.

    This is more than the number of tokens where ids are left out.
    """
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > MOST_IDS:
        raise ValueError(f"the tokenizer's ids must be below {MOST_IDS}, got {size - 1}")
    return size


def parse_special(text: str) -> dict[str, int]:
    """Parse `"eos=2,mask=5"` as a dict, for the command line."""
    try:
        return {name.strip(): int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"special ids must look like eos=2,mask=5, got {text!r}") from None
