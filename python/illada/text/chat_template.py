"""Rendering of messages as a prompt, by a checkpoint's Jinja chat template.

The result is that of `transformers`.

A template is a program that comes with a checkpoint, and is not trusted. It runs in a process of its own, whose time
and memory the kernel bounds; the process starts with the first rendering, and stays for the next ones.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import spawn
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and whatever else the template looks at

_MOST_SECONDS = 3.0  # of CPU time, for a rendering

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
    """Return the prompt of a conversation.

    Args:
        template: Jinja source.
        messages: with "role" and "content" each; what is None in them counts as absent, and `is none` holds for it.
        add_generation_prompt: end with the beginning of an answer.
        continue_final_message: end with the last message, left open, so that generation goes on with it.
        variables: what else the template may look at: bos_token, tools, enable_thinking, ...; plain data.

    A template that refuses the system role ("System role not supported") gets the messages of `merge_system`.

    Raises:
        ImportError: jinja2 is not installed. ValueError: a template that is broken, fails, refuses the messages, or
        takes too much time or memory; both ends at once; a last message that the rendered text does not end with;
        variables that are not plain data. TypeError: messages that are not messages.
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
    """Return the messages without system messages, as published.

    Their texts, stripped and with empty lines between them, begin the first message where that is the user's, and are a
    user's message of their own otherwise.
    """
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
    """Return a message's content as text: of content in parts, the texts among them."""
    if isinstance(content, list):
        return "".join(str(part["text"]) for part in content if isinstance(part, Mapping) and "text" in part)
    return "" if content is None else str(content)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f"messages must be a list of {{'role': ..., 'content': ...}}, got {messages!r:.80}")
    if without := [message for message in messages if message.get("role") is None]:
        raise ValueError(f"messages need a role, got {without[0]!r:.80}")
    return messages


def _render(template: str, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
    if importlib.util.find_spec("jinja2") is None:
        raise ImportError("chat templates need jinja2: pip install jinja2")
    try:
        request = pickle.dumps((template, messages, dict(variables), _MOST_SECONDS))
    except Exception as error:  # of many types, by what there is in them
        kind, said = "data", "they are nested too deeply" if isinstance(error, RecursionError) else str(error)
    else:
        kind, said = _renderer.ask(request)
    if kind == "text":
        return said
    if kind == "data":
        raise ValueError(f"messages and variables of a chat template must be plain data: {said:.500}")
    does = {"broken": "is broken", "refused": "refuses these messages: "}.get(kind, "fails on these messages: ")
    raise ValueError(f"the chat template {does}{said:.500}")


class _Renderer:
    """A handle of the process of `illada.text.template_process`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._watches_forks = False

    def ask(self, request: bytes) -> tuple[str, str]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # its answer may be there
                    pickle.dump(request, process.stdin)
                    process.stdin.flush()
                line = process.stdout.readline()
            except BaseException:  # an interrupt: its answer would be the next one's
                self.stop()
                raise
            kind, said = json.loads(line) if line.endswith(b"\n") else ("", "")
            if kind not in ("", "memory"):
                return kind, said
            process.communicate()  # it ends after these
            if kind:
                return kind, said
            status = process.returncode
            if status == -signal.SIGPROF:
                return "failed", f"it does not end within {_MOST_SECONDS:g} s"
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            return "failed", f"it ended the process that renders it ({how})"

    def _running(self) -> subprocess.Popen[bytes]:
        if not self._watches_forks:
            # Between renderings alone, since a fork would copy a held lock and half a request. A fork starts its own.
            os.register_at_fork(
                before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._begin_anew
            )
            self._watches_forks = True
        if self._process is None or self._process.poll() is not None:
            # The same modules are found there, and a signal to this process group does not end it.
            start = "import sys; sys.path[:] = sys.argv[1:]; from illada.text.template_process import serve; serve()"
            self._process = subprocess.Popen(
                [spawn.get_executable(), "-c", start, *sys.path],  # a program that embeds Python says which one
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            atexit.register(self.stop)
        return self._process

    def _begin_anew(self) -> None:
        """Forget the process in a fork, because it is the parent's."""
        atexit.unregister(self.stop)
        if self._process is not None:
            self._process.returncode = 0  # nothing to wait for, and nothing to warn of
        self._process = None
        self._lock.release()

    def stop(self) -> None:
        """End the process."""
        atexit.unregister(self.stop)
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None


_renderer = _Renderer()
