"""Chat messages to prompts, by a checkpoint's Jinja template, as `transformers` renders them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def render_chat(
    template: str,
    messages: Sequence[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: dict[str, str] | None = None,
) -> str:
    """The prompt of a conversation.

    Args:
        template: Jinja source; it runs in a sandbox.
        messages: {"role", "content"} each. Where the template refuses the role "system", its text goes in front of the
            first user message, as the authors' evaluation has it.
        add_generation_prompt: end with the opening of the assistant's turn; else the prompt breaks off right after the
            last message's content, so that the model goes on with it.
        special_tokens: what the template may ask for: bos_token, eos_token, ...

    Raises:
        ValueError: the template does not compile, or refuses the messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    messages = [dict(message) for message in messages]
    try:
        compiled = environment.from_string(template)
        values = {**(special_tokens or {}), "add_generation_prompt": add_generation_prompt}
        try:
            text = compiled.render(messages=messages, **values)
        except jinja2.exceptions.TemplateError as error:
            if "system" not in str(error).lower() or not any(m["role"] == "system" for m in messages):
                raise
            messages = _without_system(messages)
            text = compiled.render(messages=messages, **values)
    except jinja2.exceptions.TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from None
    if not add_generation_prompt and messages:
        content = str(messages[-1]["content"]).strip()
        at = text.rfind(content)
        if at >= 0:
            text = text[: at + len(content)]
    return text


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = "\n\n".join(str(m["content"]).strip() for m in messages if m["role"] == "system")
    rest = [dict(m) for m in messages if m["role"] != "system"]
    if rest and rest[0]["role"] == "user":
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
        return rest
    return [{"role": "user", "content": system}, *rest]
