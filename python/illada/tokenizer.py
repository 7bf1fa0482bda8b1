"""Text to token ids and back, with a checkpoint's special tokens and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from illada.chat import Message, render_chat_template
from illada.data import load_tokenizer
from illada.files import read_json_object

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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

    @classmethod
    def from_pretrained(cls, path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        """From a folder (or its tokenizer.json): tokenizer.json, tokenizer_config.json, chat_template.jinja.

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
        config = _read_if_there(folder / "tokenizer_config.json")
        special = {**_read_if_there(folder / "special_tokens_map.json"), **config}
        names = (*_SPECIAL_NAMES, "additional_special_tokens")
        return cls(
            backend,
            chat_template=_chat_template(folder, config.get("chat_template")),
            special_tokens={name: _text(special[name]) for name in names if special.get(name)},
        )

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. With `parse_special_tokens` off, text that spells a special token is just text."""
        if not isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.encode(
                text, add_special_tokens=add_special_tokens, split_special_tokens=not parse_special_tokens
            )
        self.backend.encode_special_tokens = not parse_special_tokens
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        if not isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of one token by its text; None: there is no such token."""
        if isinstance(self.backend, tokenizers.Tokenizer):
            return self.backend.token_to_id(token)
        return self.backend.get_vocab().get(token)

    def special_token_id(self, name: str) -> int | None:
        """The id of bos_token, eos_token, pad_token, mask_token, ...; None: the checkpoint does not name it.

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
        """The prompt of a conversation, as text; encode it with special tokens parsed and none added.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end with the last message, left open; needs add_generation_prompt=False.
            chat_template: Jinja source, or the name of one of several; default the checkpoint's own.
            variables: what else the template may look at; they come before the special tokens.

        Raises:
            ValueError: no chat template; one that is broken or refuses these messages. ImportError: no jinja2.
        """
        template = self._choose_template(chat_template, "tools" in variables)
        return render_chat_template(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self.special_tokens, **variables},
        )

    def _choose_template(self, wanted: str | None, has_tools: bool) -> str:
        templates = self.chat_template
        if not isinstance(templates, Mapping):
            template = wanted if wanted is not None else templates
            if template is None:
                raise ValueError(
                    "this tokenizer has no chat template (tokenizer_config.json or chat_template.jinja); it is perhaps "
                    "that of a base model: give plain prompts, or chat_template="
                )
            return template
        if wanted is not None:
            return templates.get(wanted, wanted)
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
        if name not in templates:
            raise ValueError(f"chat_template must name one of {', '.join(sorted(templates))}: none of them is default")
        return templates[name]


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _text(token: Any) -> Any:
    """A special token: text, or the form with flags that wraps it; or a list of them."""
    if isinstance(token, list):
        return [_text(one) for one in token]
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(folder: Path, configured: Any) -> str | dict[str, str] | None:
    file = folder / "chat_template.jinja"  # newer files keep it here, and then it counts
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text: {error}") from None
    if configured is None or isinstance(configured, str):
        return configured
    try:
        return {str(one["name"]): str(one["template"]) for one in configured}
    except (TypeError, KeyError):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be text or a list of {{name, template}}, "
            f"got {configured!r:.80}"
        ) from None


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
        raise ValueError(f"transformers cannot read the tokenizer in {folder}: {error}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    return backend if isinstance(backend, tokenizers.Tokenizer) else loaded
