"""A thread that makes items ahead of their consumer, and whose death is an error there, not a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

from ..errors import DataError, UserError

Item = TypeVar("Item")

POLL_SECONDS = 0.5
"""How often a waiting consumer looks whether the thread still lives."""


class Producer(Thread, Generic[Item]):
    """Runs through an iterable in a thread, at most `ahead` items before its consumer; an iterator over the items."""

    def __init__(self, items: Callable[[], Iterable[Item]], ahead: int, name: str, at: Callable[[], str]) -> None:
        """items: makes the iterable, called in the thread. name: of the data. at: what the thread is working on."""
        super().__init__(daemon=True, name="harmony-fast-loader")
        self._items, self._data, self._at = items, name, at
        self._queue: Queue[Item] = Queue(ahead)
        self._closing = Event()
        self._finished = False
        self._failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Fill the queue."""
        try:
            for item in self._items():
                if not self._put(item):
                    return
            self._finished = True
        except BaseException as error:  # whatever ends this thread, the consumer must learn of it
            self._failure = error

    def _put(self, item: Item) -> bool:
        """Wait for a place in the queue; False if the consumer has closed."""
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """The next item. Raises DataError if the thread has ended without making it."""
        while True:
            alive = self.is_alive()  # asked before the queue: what a dying thread has made is not lost
            try:
                return self._queue.get(timeout=POLL_SECONDS if alive else 0)
            except Empty:
                if not alive:
                    break
        if self._finished:
            raise StopIteration
        if isinstance(self._failure, UserError):
            raise self._failure
        raise DataError(self._obituary()) from self._failure

    def _obituary(self) -> str:
        if self._closing.is_set():
            return f"{self._data}: this epoch was closed (a loader runs one epoch at a time)"
        cause = f"{type(self._failure).__name__}: {self._failure}".splitlines()[0]  # numba's messages are pages long
        return f"{self._data}: the loader's thread died ({cause}) at {self._at()}"

    def close(self) -> None:
        """End the thread and wait for it. Idempotent."""
        self._closing.set()
        while self.is_alive():
            with suppress(Empty):
                self._queue.get_nowait()  # it may be waiting for a free place
            self.join(0.02)
