"""Conversion of text to token ids and back, with a checkpoint's special tokens and chat template."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from illada.schema import check_object
from illada.text.chat_template import Message, render_chat_template
from illada.text.files import check_text, looks_like, read_if_there, read_text
from illada.text.tokenizer_files import (
    control_tokens,
    encode_as_text,
    library_errors,
    load_tokenizer,
    read_special_tokens,
    without_limits,
)

_NO_ID = 2**32 - 1  # that no token has
_LOOK_BACK = 16  # tokens of a prompt: what decides how the next one reads is near
_NAMED_TEMPLATE = {"name": str, "template": str}
_SLOW_FILES = ("tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


class Tokenizer:
    """The tokenizer of a checkpoint folder; method names and meanings as in `transformers`.

    Args:
        backend: of the `tokenizers` library, or a tokenizer of `transformers` that has no such form.
        chat_template: Jinja source, several by name, or None.
        special_tokens: text by name (bos_token, eos_token, pad_token, mask_token, ...).
    """

    def __init__(
        self,
        backend: Any,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._control: dict[int, str] = {}
        self.protect(self.special_token_id(name) for name in ("mask_token", "eos_token", "bos_token", "pad_token"))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """Load from a folder (or its tokenizer.json): tokenizer.json, tokenizer_config.json, chat_template.jinja.

        Args:
            path: the folder. Without a tokenizer.json its other files are read by `transformers`.
            trust_remote_code: let `transformers` run the folder's own Python code; only for folders you trust.

        Raises:
            FileNotFoundError: no tokenizer there. ValueError: damaged files. ImportError: `transformers` is needed.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if folder == Path(path) and not (folder / "tokenizer.json").is_file() and _has_slow(folder):
            backend = _load_slow(folder, trust_remote_code)
        else:
            backend = load_tokenizer(path)
        config = read_if_there(folder / "tokenizer_config.json")
        tokenizer = cls(
            backend,
            chat_template=_chat_template(folder, config.get("chat_template")),
            special_tokens=read_special_tokens(folder),
        )
        tokenizer.protect(_ids_of_model(folder))
        return tokenizer

    def protect(self, ids: Iterable[int | None]) -> None:
        """Protect these ids: with `parse_special_tokens` off, `encode` never gives them for text.

        This holds whatever the tokenizer says of them.

        The ids of the tokenizer's own names are protected already, and those that a config.json beside it names. A
        token of a single character is text, and stays it.
        """
        if isinstance(self.backend, tokenizers.Tokenizer):
            found = control_tokens(self.backend, (i for i in ids if len(self._name(i)) > 1))
        else:
            found = {i: self._name(i) for i in ids if i is not None and len(self._name(i)) > 1}
        self._control.update(found)

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`.

        With `parse_special_tokens` off, text that spells a special token is just text.

        Raises:
            ValueError: text with a lone surrogate, without a token, or that the tokenizer makes a control token of.
        """
        check_text(text, "text to encode")
        if parse_special_tokens:
            return self._encode(text, add_special_tokens)
        ids = encode_as_text(lambda part: self._encode(part, False, False), self._control, text)
        before, behind = self._affixes if add_special_tokens else ([], [])
        return [*before, *ids, *behind]

    def encode_prompt(
        self, text: str, *, prefix: Sequence[int] | None = None, parse_special_tokens: bool = True
    ) -> list[int]:
        """Return the ids of a text that a model is to continue, or to score what follows it.

        They begin, once, with what the tokenizer's post-processor puts before a text (its bos, if it adds one), and end
        without what it puts behind.

        Args:
            text: The text.
            prefix: what to begin with instead; empty for nothing.
            parse_special_tokens: Whether text that spells a special token is that token.
        """
        return self.begin_prompt(self.encode(text, parse_special_tokens=parse_special_tokens), prefix)

    def begin_prompt(self, ids: list[int], prefix: Sequence[int] | None = None) -> list[int]:
        """Return the ids of a text as those of a prompt, see `encode_prompt`."""
        return begin_with(ids, self._affixes[0] if prefix is None else prefix)

    @functools.cached_property
    def _affixes(self) -> tuple[list[int], list[int]]:
        return affixes(self.backend)

    def _name(self, token: int | None) -> str:
        """Return the text of a token, which is empty where there is none."""
        if token is None or token < 0:
            return ""
        if isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.id_to_token(token) or ""
        return self.backend.convert_ids_to_tokens(token) or ""

    def _encode(self, text: str, add_special_tokens: bool, parse_special_tokens: bool = True) -> list[int]:
        if not isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.encode(
                text, add_special_tokens=add_special_tokens, split_special_tokens=not parse_special_tokens
            )
        self.backend.encode_special_tokens = not parse_special_tokens
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        if not isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        with library_errors("the tokenizer cannot decode these ids"):
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of one token by its text; None where there is no such token."""
        if isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.token_to_id(token)
        return self.backend.get_vocab().get(token)

    def special_token_id(self, name: str) -> int | None:
        """Return the id of bos_token, eos_token, pad_token, mask_token, ...; None: the checkpoint does not name it.

        A checkpoint may have a mask that its tokenizer does not name (iLLaDA): `ModelConfig.mask_token_id` counts.
        """
        token = self.special_tokens.get(name)
        return self.token_to_id(token) if isinstance(token, str) else None

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt of a conversation, as text; encode it with special tokens parsed and none added.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end with the last message, left open; needs add_generation_prompt=False.
            chat_template: Jinja source, or the name of one of several; default the checkpoint's own.
            variables: what else the template may look at; they come before the special tokens.

        Raises:
            ValueError: no chat template; one that is broken or refuses these messages. ImportError: no jinja2.
        """
        template = self._choose_template(chat_template, variables.get("tools") is not None)
        return render_chat_template(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self.special_tokens, **variables},
        )

    def _choose_template(self, wanted: str | None, has_tools: bool) -> str:
        if isinstance(self.chat_template, Mapping):
            templates = self.chat_template
        else:
            templates = {} if self.chat_template is None else {"default": self.chat_template}
        if wanted is not None:
            if wanted not in templates and not any(mark in wanted for mark in ("{{", "{%", "{#")):
                raise ValueError(
                    f"chat_template must be Jinja source or the name of a template, got {wanted!r:.80}; this tokenizer "
                    f"has {', '.join(sorted(templates)) or 'none'}"
                )
            return templates.get(wanted, wanted)
        if not templates:
            raise ValueError(
                "this tokenizer has no chat template (tokenizer_config.json or chat_template.jinja); it is perhaps "
                "that of a base model: give plain prompts, or chat_template="
            )
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
        if name not in templates:
            raise ValueError(f"chat_template must name one of {', '.join(sorted(templates))}: none of them is default")
        return templates[name]


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what a tokenizer's post-processor puts before and behind a text.

    The tokenizer is one of `tokenizers` or `transformers`.
    """
    backend = (
        tokenizer if isinstance(tokenizer, tokenizers.Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    )
    # The token of another tokenizer stands for a text: one that this tokenizer can encode would have to be found.
    if isinstance(backend, tokenizers.Tokenizer):
        other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": _NO_ID}, unk_token="text"))
        with library_errors("the tokenizer's post_processor fails"):
            whole = backend.post_process(other.encode("text")).ids
    else:
        whole = list(tokenizer.build_inputs_with_special_tokens([_NO_ID]))
    if _NO_ID not in whole:
        raise ValueError("the tokenizer's post_processor leaves the text out")
    at = whole.index(_NO_ID)
    return whole[:at], whole[at + 1 :]


def begin_with(ids: list[int], prefix: Sequence[int]) -> list[int]:
    """Return the ids with `prefix` in front, only once where a chat template has it already."""
    first, size = list(prefix), len(prefix)
    while size and ids[: 2 * size] == first * 2:
        ids = ids[size:]
    return ids if ids[:size] == first else first + ids


def bos_prefix(add_bos: bool | None, bos_token_id: int | None, name: str = "add_bos") -> list[int] | None:
    """Return the prefix for `Tokenizer.encode_prompt`: bos, nothing, or None for the tokenizer's own."""
    if not add_bos:
        return None if add_bos is None else []
    if bos_token_id is None:
        raise ValueError(f"{name}: this checkpoint has no bos token")
    return [bos_token_id]


class Continuation:
    """A decoder of tokens that follow a prompt.

    A decoder that strips the start of a text would join words without it.

    Args:
        tokenizer: with decode, of this library, `tokenizers` or `transformers`.
        prompt: the ids before. After a special token, as a chat template ends, a text begins anew.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        before: list[int] = []
        for token in reversed(list(prompt[-_LOOK_BACK:])):
            if not self._decode([token], True) and self._decode([token], False):
                break
            before.insert(0, token)
        self._before, self._heads = before, {skip: self._decode(before, skip) for skip in (True, False)}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids` behind the prompt."""
        head = self._heads[skip_special_tokens]
        whole = self._decode([*self._before, *ids], skip_special_tokens) if head else ""
        return whole[len(head) :] if head and whole.startswith(head) else self._decode(ids, skip_special_tokens)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def read_template(file: str | Path) -> str:
    """Return the Jinja source in a file.

    ValueError: an HTML page or another thing that is none.
    """
    if said := looks_like(file):
        raise ValueError(f"{file} {said}")
    return read_text(file)


def _chat_template(folder: Path, configured: Any) -> str | dict[str, str] | None:
    named = {file.name.removesuffix(".jinja"): file for file in folder.glob("additional_chat_templates/*.jinja")}
    if (file := folder / "chat_template.jinja").is_file():
        named["default"] = file
    found = {name: read_template(file) for name, file in sorted(named.items())}
    if "default" in found or not configured:  # newer files keep templates beside the configuration, and then they count
        return found["default"] if found.keys() == {"default"} else found or None
    if isinstance(configured, str):
        return {"default": configured, **found} if found else configured
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if not isinstance(configured, list):
        raise ValueError(f"{where} must be text or a list of {{name, template}}, got {configured!r:.80}")
    named_here = [check_object(one, _NAMED_TEMPLATE, f"{where}[{i}]") for i, one in enumerate(configured)]
    return {**{one["name"]: one["template"] for one in named_here}, **found}


def _ids_of_model(folder: Path) -> list[int]:
    """Return the special ids of a config.json beside the tokenizer, of any model."""
    named = [ids for name, ids in read_if_there(folder / "config.json").items() if name.endswith("_token_id")]
    return [i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < _NO_ID]


def _has_slow(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SLOW_FILES)


def _load_slow(folder: Path, trust_remote_code: bool) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            f"{folder} has no tokenizer.json; reading its other tokenizer files needs transformers: "
            "pip install transformers"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )  # fmt: skip
    except Exception as error:  # of many types, by the kind of the file
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"the tokenizer in {folder} is Python code of its authors, which is run only with trust_remote_code "
                "(--trust-remote-code); without it, give another tokenizer (--tokenizer)"
            ) from None
        raise ValueError(f"transformers cannot read the tokenizer in {folder}: {error!s:.300}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return loaded
    without_limits(backend)
    return backend
