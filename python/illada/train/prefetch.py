"""Items of an iterator, made by a thread ahead of their use."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Iterator[T], Generic[T]):
    """An iterator over `items`, which a thread of its own advances.

    An error of `items` is raised by `next`, after the items before it. `close` ends the thread.

    Args:
        items: used by the thread alone.
        ahead: how many items may be ready and unused, at least 1.

    Attributes:
        waited: seconds that `next` has waited; the user sets it back.
    """

    def __init__(self, items: Iterable[T], ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self.waited = 0.0
        self._ahead = ahead
        self._ready: deque[T] = deque()
        self._end: BaseException | None = None  # what `next` raises when nothing is ready any more
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: where the program ends without `close`, it does not wait for the thread.
        self._thread = threading.Thread(target=self._run, args=(items,), name="illada-prefetch", daemon=True)
        self._thread.start()

    def _run(self, items: Iterable[T]) -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._ahead)
                    if self._closed:
                        break
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> T:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None)
            self.waited += time.perf_counter() - began
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """End the thread, after the item that it makes, and drop what is ready."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()
