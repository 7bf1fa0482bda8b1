"""The files of a tokenizer as one `tokenizers.Tokenizer`, and text that never becomes its control tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from illada.files import read_if_there
from illada.text import looks_like

#: Special tokens that a checkpoint names, in tokenizer_config.json or special_tokens_map.json.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS_OF_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or the one in a folder (a corpus, a checkpoint), which always encodes the whole text alone.

    Its `truncation` and `padding` are dropped: they were settings of whoever saved it. Tokens that only
    added_tokens.json or tokenizer_config.json beside it name are added.

    Raises:
        FileNotFoundError: no tokenizer there. ValueError: damaged files; an added token that cannot have its id.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        said = looks_like(file) or f"is not a tokenizer.json that `tokenizers` can read: {error}"
        raise ValueError(f"{file} {said}") from None
    without_limits(tokenizer)
    if file.name == "tokenizer.json":
        _add_tokens(tokenizer, file.parent)
    return tokenizer


def without_limits(tokenizer: Tokenizer) -> None:
    """Drop truncation and padding."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """Special tokens by name, each a text or a list of them, of tokenizer_config.json, else special_tokens_map.json."""
    named = {**read_if_there(folder / "special_tokens_map.json"), **read_if_there(folder / "tokenizer_config.json")}
    return {name: _content(named[name]) for name in (*SPECIAL_NAMES, *_LISTS_OF_TOKENS) if named.get(name)}


def control_tokens(tokenizer: Tokenizer, ids: Iterable[int | None]) -> dict[int, str]:
    """{id: text} of those that the tokenizer has, but not the one for unknown text.

    Each is made special in the tokenizer: encoding text as text does not give it, and decoding can leave it out.
    """
    added, unknown = tokenizer.get_added_tokens_decoder(), getattr(tokenizer.model, "unk_token", None)
    control: dict[int, str] = {}
    for i in ids:
        content = None if i is None or i < 0 else tokenizer.id_to_token(i)
        if i is None or content is None or content == unknown:
            continue
        token = added.get(i, AddedToken(content, normalized=False))
        if not token.special or i not in added:
            token.special = True
            tokenizer.add_special_tokens([token])
        control[i] = content
    return control


def encode_as_text(encode: Callable[[str], list[int]], control: Mapping[int, str], text: str) -> list[int]:
    """`encode(text)` without the ids of `control`: text that spells one of these tokens is encoded in two pieces.

    Raises:
        ValueError: a control token that other text gives, or of a single character.
    """
    ids = encode(text)
    for i in control.keys() & ids:
        content = control[i]
        parts = text.split(content)
        if len(parts) == 1 or len(content) == 1:
            raise ValueError(
                f"the tokenizer makes its control token {content!r} (id {i}) of plain text: {text[:40]!r}; "
                "it cannot encode this text"
            )
        pieces = [parts[0], *(content[1:] + part for part in parts[1:])]
        pieces[:-1] = [piece + content[:1] for piece in pieces[:-1]]
        return [token for piece in pieces for token in encode_as_text(encode, control, piece)]
    return ids


def _content(token: Any) -> Any:
    """A special token: its text, or the form with flags that wraps it; or a list of them."""
    if isinstance(token, list):
        return [_content(one) for one in token]
    return token.get("content") if isinstance(token, dict) else token


def _add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """As `transformers` does: of tokenizer_config.json, whose flags count, else of added_tokens.json.

    A token that is there keeps its id, whatever they say."""
    file = folder / "tokenizer_config.json"
    declared = read_if_there(file).get("added_tokens_decoder")
    try:
        if declared is not None:
            wanted = {int(i): AddedToken(token["content"], **_flags(token)) for i, token in declared.items()}
        else:
            file = folder / "added_tokens.json"
            special = {text for value in read_special_tokens(folder).values() for text in _listed(value)}
            wanted = {
                int(i): AddedToken(text, normalized=text not in special, special=text in special)
                for text, i in read_if_there(file).items()
            }
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} does not name added tokens by their ids: {error}") from None
    present = tokenizer.get_added_tokens_decoder()
    for i, token in sorted(wanted.items()):
        known = tokenizer.token_to_id(token.content)
        if known in present and (declared is None or present[known] == token):
            continue
        tokenizer.add_tokens([token])
        if known is None and (given := tokenizer.token_to_id(token.content)) != i:
            raise ValueError(
                f"{file} gives {token.content!r} the id {i}, but in tokenizer.json the next free id is {given}: "
                "the two do not belong together"
            )


def _flags(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if name in token}  # fmt: skip


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
