"""The process that renders chat templates, which are untrusted programs.

The kernel bounds its time and memory.

`illada.text.chat_template` starts it. It reads requests from its standard input, and answers each with a line of JSON,
see `serve`.
"""

from __future__ import annotations

import datetime
import functools
import json
import pickle
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

MOST_BYTES = 512 << 20  # of memory, for a rendering
MOST_CHARACTERS = 1 << 24  # of what a template renders


def serve() -> None:
    """Answer requests until the input ends, or until one has used up the memory.

    A request is the pickle of a pickle of (template, messages, variables, seconds of CPU time). The kernel ends the
    process at a request that takes longer. An answer is [kind, text]: of kind "text" what the template renders, and
    otherwise what it has done: "broken", "refused", "failed" or "memory"; "data" where the request has types that are
    not there in this process.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the thread that started this ignores or blocks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = used + MOST_BYTES if hard == resource.RLIM_INFINITY else min(used + MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    answer = ["", ""]
    while answer[0] != "memory":
        try:
            request = pickle.load(sys.stdin.buffer)
            answer = _answer(request)
        except EOFError:
            return
        except MemoryError:
            answer = ["memory", f"it needs more than {MOST_BYTES >> 20} MiB of memory"]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answer(request: bytes) -> list[str]:
    import jinja2

    try:
        template, messages, variables, seconds = pickle.loads(request)
    except MemoryError:
        raise
    except Exception as error:  # of many types, by what the parent's __main__ has
        return ["data", f"{type(error).__name__}: {error}"]
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, whatever this is doing
        try:
            compiled = _compile(template)
        except jinja2.TemplateSyntaxError as error:
            return ["broken", f", line {error.lineno}: {error.message}"]
        except SyntaxError as error:  # of the Python that it becomes
            return ["broken", f": {error.msg}"]
        text = compiled.render(messages=[Shown(message) for message in messages], **variables)
        if len(text) > MOST_CHARACTERS:
            return ["failed", f"it makes a text of {len(text)} characters; at most {MOST_CHARACTERS} are allowed"]
        return ["text", text]
    except Refusal as error:
        return ["refused", str(error)]
    except RecursionError:
        return ["failed", "it is nested too deeply, or calls itself without end"]
    except jinja2.TemplateError as error:
        return ["failed", str(error)]
    except MemoryError:
        raise
    except Exception as error:  # of the template's own operations on what it is given
        return ["failed", f"{type(error).__name__}: {error}"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Refusal(Exception):
    """The error with which a template refuses messages."""


class Shown(dict[str, Any]):
    """A message without its values of None, as `transformers` shows it.

    Otherwise `content | trim` would be the word "None".

    Templates of before that ask `content is none`, which `transformers` then answers with no: here it is so.
    """

    def __init__(self, message: Mapping[str, Any]) -> None:
        super().__init__({name: value for name, value in message.items() if value is not None})
        self._none = message.keys() - self.keys()  # of a leading underscore, which the sandbox keeps from templates


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """The tag {% generation %}, which is transparent here.

        Elsewhere it marks answers for training on them alone.
        """

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise Refusal(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def is_none(value: Any) -> bool:
        if not isinstance(value, jinja2.Undefined):
            return value is None
        owner = value._undefined_obj
        return isinstance(owner, Shown) and value._undefined_name in owner._none

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.tests["none"] = is_none
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)
