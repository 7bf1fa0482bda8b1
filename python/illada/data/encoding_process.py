"""Processes that encode texts: Python's `re` uses one core of a process."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import spawn
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from illada.data.encoding import TextEncoder

T = TypeVar("T")

_MOST = 4  # processes: each has about 80 MiB
_LEAST = 1 << 24  # characters of text for which they are started: that takes a second


def processes_for(encoder: TextEncoder, characters: int) -> int:
    """Return how many processes encode a text best: one for each core that this process may use, 4 at most.

    0: this process alone, as the text is short or the threads of the library encode it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST) if encoder.by_words and cores > 1 and characters >= _LEAST else 0


class EncoderProcesses:
    """Processes that each encode the texts of one batch at a time; a context manager.

    Args:
        encoder: what they do.
        count: how many.
    """

    def __init__(self, encoder: TextEncoder, count: int) -> None:
        # The same modules are found there, and a signal to this process group does not end it.
        start = (
            "import sys; sys.path[:] = sys.argv[2:]; from illada.data.encoding_process import serve; "
            "serve(int(sys.argv[1]))"
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: dict[int, IO[bytes]] = {}  # by process id
        for _ in range(count):
            # A pipe of its own: what start-up files of Python print on standard output is no answer.
            read_end, write_end = os.pipe()
            process = subprocess.Popen(
                [spawn.get_executable(), "-c", start, str(write_end), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[write_end],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
            os.close(write_end)
            self._processes.append(process)
            self._answers[process.pid] = os.fdopen(read_end, "rb")
        self._dtype = encoder.dtype
        for process in self._processes:
            self._send(process, (encoder.tokenizer.to_str(), encoder.control, encoder.dtype.name))

    def __enter__(self) -> EncoderProcesses:
        return self

    def __len__(self) -> int:
        return len(self._processes)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
            self._answers[process.pid].close()

    def encode_batches(self, batches: Iterable[tuple[list[str], T]]) -> Iterator[tuple[T, list[NDArray]]]:
        """Yield (what came with them, the ids of each text) for batches of texts, in their order.

        ValueError: the tokenizer cannot encode a text.
        """
        at_work: deque[tuple[subprocess.Popen[bytes], T]] = deque()
        for number, (texts, rest) in enumerate(batches):
            if len(at_work) == len(self._processes):
                yield self._receive(*at_work.popleft())
            process = self._processes[number % len(self._processes)]  # it waits: its last answer was read
            self._send(process, texts)
            at_work.append((process, rest))
        while at_work:
            yield self._receive(*at_work.popleft())

    def _send(self, process: subprocess.Popen[bytes], values: Any) -> None:
        assert process.stdin is not None
        try:
            pickle.dump(values, process.stdin)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._ended(process) from None

    def _receive(self, process: subprocess.Popen[bytes], rest: T) -> tuple[T, list[NDArray]]:
        try:
            found = pickle.load(self._answers[process.pid])
        except (EOFError, pickle.UnpicklingError):
            raise self._ended(process) from None
        if isinstance(found, str):
            raise ValueError(found)
        return rest, [np.frombuffer(ids, self._dtype) for ids in found]

    def _ended(self, process: subprocess.Popen[bytes]) -> RuntimeError:
        try:
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it answers nonsense, and waits for the next request
            process.kill()
            status = process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return RuntimeError(f"a process that encodes text has ended ({how})")


def serve(descriptor: int) -> None:
    """Answer batches of texts from standard input with their ids as bytes, or with what is wrong, on a descriptor."""
    requests, answers = sys.stdin.buffer, os.fdopen(descriptor, "wb")
    tokenizer, control, dtype = pickle.load(requests)
    loaded = Tokenizer.from_str(tokenizer)
    loaded.encode_special_tokens = True  # which a tokenizer's file does not say
    encoder = TextEncoder(loaded, control, dtype)
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # whoever asked has ended
        while True:
            texts = pickle.load(requests)
            try:
                found: Any = [ids.tobytes() for ids in encoder.encode_texts(texts)]
            except ValueError as error:
                found = str(error)
            pickle.dump(found, answers)
            answers.flush()
