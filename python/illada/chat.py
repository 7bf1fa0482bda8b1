"""From messages to a prompt: the Jinja chat template of a checkpoint, rendered as `transformers` renders it."""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and whatever else the template looks at

# Limits of what a template renders, and the widths of formats that exceed them: "%1000000d", "%*d", "{:1000000}".
_MOST_CHARACTERS, _MOST_SECONDS = 1 << 24, 10
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(?:\d{6}|\*|\d*\.(?:\d{6}|\*))")
_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*\d{6}")

# Stands behind the message to continue. The space after it tells whether the template trims what it is given; it is one
# that no template has of its own.
_MARK, _SPACE = "\ue000illada-continue\ue000", "\u205f"


def render_chat_template(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt of a conversation.

    Args:
        template: Jinja source.
        messages: with "role" and "content" each; what is None in them counts as absent, and `is none` holds for it.
        add_generation_prompt: end with the beginning of an answer.
        continue_final_message: end with the last message, left open, so that generation goes on with it.
        variables: what else the template may look at: bos_token, tools, enable_thinking, ...

    A template that refuses the system role ("System role not supported") gets the messages of `merge_system`.

    Raises:
        ImportError: jinja2 is not installed. ValueError: a template that is broken or refuses the messages; both ends
        at once; a last message that the rendered text does not end with. TypeError: messages that are not messages.
    """
    chat = [dict(message) for message in _checked(messages)]
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other")
    if continue_final_message:
        if not chat or not isinstance(chat[-1].get("content"), str):
            raise ValueError("continue_final_message needs a last message whose content is text")
        last = chat[-1]["content"].strip()
        chat[-1]["content"] += _MARK + _SPACE
    variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
    try:
        text = _render(template, chat, variables)
    except ValueError as error:
        if "system role not supported" not in str(error).lower():
            raise
        text = _render(template, merge_system(chat), variables)
    if not continue_final_message:
        return text
    # A template may show the message several times; the last one is to go on.
    begin, *parts = text.split(_MARK)
    kept = ""
    for part in parts:
        kept = begin if part.startswith(_SPACE) else begin.rstrip()
        begin = kept + part.removeprefix(_SPACE)
    if not parts or not kept.rstrip().endswith(last):
        raise ValueError(
            f"continue_final_message: the chat template leaves the last message out, or a part of it: {last!r:.80}"
        )
    return kept


def merge_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Without system messages, as published: their texts, stripped and with empty lines between them, begin the first
    message where that is the user's, and are a user's message of their own otherwise."""
    system = [_text(message.get("content")).strip() for message in messages if message["role"] == "system"]
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if not system:
        return rest
    joined = "\n\n".join(system)
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": joined}, *rest]
    content = rest[0].get("content")
    if isinstance(content, list):
        rest[0]["content"] = [{"type": "text", "text": f"{joined}\n\n"}, *content]
    else:
        rest[0]["content"] = f"{joined}\n\n{_text(content)}"
    return rest


def _text(content: Any) -> str:
    """A message's content as text: of content in parts, the texts among them."""
    if isinstance(content, list):
        return "".join(str(part["text"]) for part in content if isinstance(part, Mapping) and "text" in part)
    return "" if content is None else str(content)


class _Shown(dict[str, Any]):
    """A message without what is None in it, as `transformers` shows it: otherwise `content | trim` is the word "None".

    Templates of before that ask `content is none`, which `transformers` then answers with no: here it is so."""

    def __init__(self, message: Message) -> None:
        super().__init__({name: value for name, value in message.items() if value is not None})
        self._none = message.keys() - self.keys()  # of a leading underscore, which the sandbox keeps from templates


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f"messages must be a list of {{'role': ..., 'content': ...}}, got {messages!r:.80}")
    if without := [message for message in messages if message.get("role") is None]:
        raise ValueError(f"messages need a role, got {without[0]!r:.80}")
    return messages


def _render(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install jinja2") from None
    try:
        return _render_bounded(_compile(template), messages=[_Shown(message) for message in messages], **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    except Exception as error:  # of the template's own operations on what it is given
        raise ValueError(f"the chat template refuses these messages: {type(error).__name__}: {error}") from None


def _check_size(size: int) -> None:
    if size > _MOST_CHARACTERS:
        raise OverflowError(f"a result of {size:.3g} characters or bits; at most {_MOST_CHARACTERS} are made")


def _check_width(wide: re.Pattern[str], pattern: str) -> None:
    """A format makes a text as long as its width says."""
    if wide.search(pattern.replace("%%", "")):
        raise OverflowError(f"the format {pattern!r:.80} may make a text of any length")


def _render_bounded(template: Any, **variables: Any) -> str:
    """What the template renders to; OverflowError: too much, or for too long."""
    parts: list[str] = []
    size, end = 0, time.monotonic() + _MOST_SECONDS
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        _check_size(size)
        if time.monotonic() > end:
            raise OverflowError(f"it has not come to an end in {_MOST_SECONDS} s")
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks answers for training on them alone; here it is transparent."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def is_none(value: Any) -> bool:
        if not isinstance(value, jinja2.Undefined):
            return value is None
        owner = value._undefined_obj
        return isinstance(owner, _Shown) and value._undefined_name in owner._none

    class Sandbox(ImmutableSandboxedEnvironment):
        """Without operations whose result could be of any size: a template comes with a checkpoint, from a stranger."""

        intercepted_binops = frozenset({"*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "%" and isinstance(left, str):
                _check_width(_WIDE_PERCENT, left)
            elif operator == "*":
                for many, times in ((left, right), (right, left)):
                    if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                        _check_size(len(many) * times)
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                _check_size(left.bit_length() * right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(getattr(function, "__self__", None), str):  # ljust, zfill, ...
                for argument in arguments:
                    if isinstance(argument, int):
                        _check_size(argument)
            return super().call(context, function, *arguments, **named)

        def wrap_str_format(self, value: Any) -> Any:  # str.format and str.format_map
            wrapped = super().wrap_str_format(value)
            if wrapped is None:
                return None

            def form(*arguments: Any, **named: Any) -> str:
                pattern = value.__self__
                _check_width(_WIDE_FIELD, pattern)
                if re.search(r"\{[^{}]*:[^{}]*\{", pattern):  # a width that is an argument
                    for argument in (*arguments, *named.values()):
                        if isinstance(argument, int):
                            _check_size(argument)
                return wrapped(*arguments, **named)

            return form

    def center(value: Any, width: int = 80) -> str:
        _check_size(width)
        return str(value).center(width)

    def formatted(value: Any, *arguments: Any, **named: Any) -> str:
        _check_width(_WIDE_PERCENT, str(value))
        return str(value) % (named or arguments)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters.update(tojson=tojson, center=center, format=formatted)
    environment.tests["none"] = is_none
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)
