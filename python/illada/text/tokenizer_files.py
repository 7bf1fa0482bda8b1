"""The files of a tokenizer as one `tokenizers.Tokenizer`, and text that never becomes its control tokens."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from illada.schema import Fraction, TokenId, check_object, checked
from illada.text.files import looks_like, read_if_there, read_json

#: Special tokens that a checkpoint names, in tokenizer_config.json or special_tokens_map.json.
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ALL_NAMES = (*SPECIAL_NAMES, "additional_special_tokens", "extra_special_tokens")

_OBJECT = dict[str, Any]
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), bool)
_CHARSMAP = b"precompiled_charsmap"  # of a normalizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return a tokenizer.json, or that of a folder (corpus, checkpoint), which always encodes the whole text alone.

    Its `truncation` and `padding` are dropped: they were settings of whoever saved it. Tokens that only
    added_tokens.json or tokenizer_config.json beside it name are added.

    Raises:
        FileNotFoundError: no tokenizer there. ValueError: damaged files; an added token that cannot have its id.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    tokenizer = read_tokenizer(file)
    if file.name == "tokenizer.json":
        _add_tokens(tokenizer, file.parent)
    return tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """Load the tokenizer of a file alone, without the tokens that files beside it name.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}")
    try:
        if _CHARSMAP in file.read_bytes():
            _check_tokenizer(file)  # the library ends the process at a bad one
        with library_errors(f"{file} is not a tokenizer.json that `tokenizers` can read"):
            tokenizer = Tokenizer.from_file(str(file))
    except ValueError:
        if said := looks_like(file):
            raise ValueError(f"{file} {said}") from None
        _check_tokenizer(file)  # which can name the key
        raise
    without_limits(tokenizer)
    return tokenizer


def without_limits(tokenizer: Tokenizer) -> None:
    """Remove truncation and padding from a tokenizer."""
    tokenizer.no_truncation()
    tokenizer.no_padding()


@contextlib.contextmanager
def library_errors(said: str) -> Iterator[None]:
    """Raise ValueError for the errors that `tokenizers` raises.

    These are bare Exception, and Rust's panics, which are no Exception.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{said}: {error!s:.300}") from None
        raise


def _check_tokenizer(file: Path) -> None:
    """Raise ValueError, with the key, for a tokenizer.json with parts of wrong types.

    A Precompiled normalizer whose data is shorter than it says is refused as well.
    """
    values = read_json(file)
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    check_object(
        values, {"model": _OBJECT}, str(file), {"added_tokens": list[_OBJECT], **dict.fromkeys(parts, _OBJECT)}
    )
    for i, token in enumerate(values.get("added_tokens") or ()):
        check_object(token, {"id": TokenId, "content": str}, f"{file}: added_tokens[{i}]", _FLAGS)
    vocab = dict[str, TokenId] if isinstance(values["model"].get("vocab"), dict) else list[Any]
    check_object(values["model"], {}, f"{file}: model", {"vocab": vocab, "merges": list[Any], "dropout": Fraction})
    normalizer = values.get("normalizer") or {}
    for one in (
        normalizer,
        *checked(list[_OBJECT], normalizer.get("normalizers", []), f"{file}: normalizer.normalizers"),
    ):
        if one.get("type") == "Precompiled":
            where = f"{file}: normalizer"
            charsmap = check_object(one, {"precompiled_charsmap": str}, where)["precompiled_charsmap"]
            try:
                data = base64.b64decode(charsmap, validate=True)
            except ValueError:
                data = b""
            if len(data) < 4 or int.from_bytes(data[:4], "little") > len(data) - 4:
                raise ValueError(f"{where}: precompiled_charsmap is damaged: it is shorter than it says")


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """Return special tokens by name (text or list).

    They are those of tokenizer_config.json, else of special_tokens_map.json.
    """
    named: dict[str, Any] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        values = read_if_there(file)
        named |= {name: (values[name], f"{file}: {name}") for name in _ALL_NAMES if name in values}
    return {name: _contents(*named[name]) for name in _ALL_NAMES if name in named and named[name][0]}


def control_tokens(tokenizer: Tokenizer, ids: Iterable[int | None]) -> dict[int, str]:
    """Return {id: text} of those that the tokenizer has, but not the one for unknown text.

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
    """Return `encode(text)` without ids of `control`: text that spells one of these tokens is encoded in two pieces.

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


def _contents(token: Any, where: str) -> Any:
    """Return the text of a special token, or the texts of several.

    A token is its text, or the form with flags around it; several are a list, perhaps by name.
    """
    if isinstance(token, dict) and "content" not in token:
        token = list(token.values())
    if isinstance(token, list):
        return [_contents(one, f"{where}[{i}]") for i, one in enumerate(token)]
    if isinstance(token, dict):
        return check_object(token, {"content": str}, where)["content"]
    return checked(str, token, where)


def _add_tokens(tokenizer: Tokenizer, folder: Path) -> None:
    """Add tokens as `transformers` does: of tokenizer_config.json, whose flags count, else of added_tokens.json.

    A token that is there keeps its id, whatever they say.
    """
    file = folder / "tokenizer_config.json"
    config = check_object(read_if_there(file), {}, str(file), {"added_tokens_decoder": dict[str, _OBJECT]})
    declared = config.get("added_tokens_decoder")
    wanted: dict[int, AddedToken] = {}
    if declared is not None:
        for i, token in declared.items():
            where = f"{file}: added_tokens_decoder"
            if not re.fullmatch("[0-9]{1,9}", i):
                raise ValueError(f"{where} must name tokens by their ids, got {i!r:.80}")
            fields = check_object(token, {"content": str}, f"{where}.{i}", _FLAGS)
            wanted[int(i)] = AddedToken(fields.pop("content"), **fields)
    else:
        file = folder / "added_tokens.json"
        special = {text for value in read_special_tokens(folder).values() for text in _listed(value)}
        for text, number in read_if_there(file).items():
            number = checked(TokenId, number, f"{file}: {text:.80}")
            wanted[number] = AddedToken(text, normalized=text not in special, special=text in special)
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
