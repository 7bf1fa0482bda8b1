"""From messages to a prompt: the Jinja chat template of a checkpoint, rendered as `transformers` renders it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and whatever else the template looks at

# Stands behind the message to continue; the space tells whether the template trims what it is given.
_MARKER = "\ue000illada-continue\ue000 "


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
        messages: with "role" and "content" each.
        add_generation_prompt: end with the beginning of an answer.
        continue_final_message: end with the last message, left open, so that generation goes on with it.
        variables: what else the template may look at: bos_token, tools, enable_thinking, ...

    A template that refuses the system role ("System role not supported") gets the system message merged into the
    first user message, with an empty line between them.

    Raises:
        ImportError: jinja2 is not installed. ValueError: a template that is broken or refuses the messages; both ends
        at once; a last message that is not in the rendered text. TypeError: messages that are not messages.
    """
    chat = [dict(message) for message in _checked(messages)]
    if add_generation_prompt and continue_final_message:
        raise ValueError("add_generation_prompt and continue_final_message exclude each other")
    if continue_final_message:
        if not chat or not isinstance(chat[-1].get("content"), str):
            raise ValueError("continue_final_message needs a last message whose content is text")
        chat[-1]["content"] += _MARKER
    variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **variables}
    try:
        text = _render(template, chat, variables)
    except ValueError as error:
        if "system role not supported" not in str(error).lower() or not chat or chat[0]["role"] != "system":
            raise
        text = _render(template, merge_system(chat), variables)
    if not continue_final_message:
        return text
    at = text.rfind(_MARKER.rstrip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template leaves the last message out")
    return text[:at] if text.startswith(_MARKER, at) else text[:at].rstrip()


def merge_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Without the leading system message: its text begins the first user message. ValueError: there is none."""
    system, rest = messages[0], [dict(message) for message in messages[1:]]
    for message in rest:
        if message["role"] == "user" and isinstance(message["content"], str):
            message["content"] = f"{system['content']}\n\n{message['content']}"
            return rest
    raise ValueError("the chat template has no system role, and no user message could take its text")


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f"messages must be a list of {{'role': ..., 'content': ...}}, got {messages!r:.80}")
    if without := [message for message in messages if "role" not in message]:
        raise ValueError(f"messages need a role, got {without[0]!r:.80}")
    return messages


def _render(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise ImportError("chat templates need jinja2: pip install jinja2") from None
    try:
        return _compile(template).render(messages=messages, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is broken, line {error.lineno}: {error.message}") from None
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None


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

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)
