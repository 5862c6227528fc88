"""One of the runs of shards that a streamed epoch reads side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .order import shuffled
from .producer import Producer

LANES = 8
"""At most so many, where there are no more ranks."""
WINDOWS_AHEAD = 1
"""Windows that wait, read, beside the one in use."""
HOPELESS = 1000
"""Undecodable samples in succession that end the epoch in an error."""


@dataclass(frozen=True)
class Candidate:
    """A sample that has an image and a caption; whether the image decodes is not known yet."""

    index: int
    key: str
    image: bytes
    captions: list[str]


class Lane:
    """The candidates of some shards, shuffled within windows, again and again, read ahead by a thread."""

    def __init__(
        self, name: str, once: Callable[[], Iterator[Candidate]], key: Callable[[int], int], window: int, skip: int
    ) -> None:
        """once: goes through the shards' candidates one time. key: of the n-th window's shuffle. window: candidates
        that are shuffled at once. skip: candidates to leave out at the start."""
        self._name, self._once, self._key, self._window = name, once, key, window
        self._last = "the first sample"
        self._waiting: deque[Candidate] = deque()
        self._windows = Producer(lambda: self._from(skip), WINDOWS_AHEAD, name, lambda: self._last)

    def take(self, count: int) -> list[Candidate]:
        """The next candidates."""
        return [self._next() for _ in range(count)]

    def ahead(self) -> Iterator[Candidate]:
        """The candidates to come, without taking them. Raises DataError after HOPELESS of them."""
        for place in range(HOPELESS):
            while len(self._waiting) <= place:
                self._waiting.extend(next(self._windows))
            yield self._waiting[place]
        raise DataError(f"{self._name}: {HOPELESS} images in succession cannot be decoded")

    def _next(self) -> Candidate:
        while not self._waiting:
            self._waiting.extend(next(self._windows))
        return self._waiting.popleft()

    def _from(self, skip: int) -> Iterator[list[Candidate]]:
        for window in self._shuffled_windows():
            if skip < len(window):
                yield window[skip:]
            skip = max(0, skip - len(window))

    def _shuffled_windows(self) -> Iterator[list[Candidate]]:
        number = 0
        while True:
            found = 0
            window: list[Candidate] = []
            for candidate in self._once():
                window.append(candidate)
                found += 1
                self._last = f"sample {candidate.key!r}"
                if len(window) == self._window:
                    yield self._shuffled(window, number)
                    window, number = [], number + 1
            if window:  # no window spans two passes: a sample comes again only when all have come
                yield self._shuffled(window, number)
                number += 1
            if not found:
                raise DataError(f"{self._name}: no sample is usable in the shards of a lane")

    def _shuffled(self, window: list[Candidate], number: int) -> list[Candidate]:
        return [window[i] for i in shuffled(np.arange(len(window)), len(window), self._key(number))]

    def close(self) -> None:
        """End the thread."""
        self._windows.close()


def count_lanes(batch_size: int, world_size: int, shards: int) -> int:
    """The largest power of two up to LANES that divides the batch and leaves no lane without a shard; the number of
    ranks where they cannot share that many. Raises DataError where neither is possible.
    """
    if batch_size < 1 or batch_size % world_size:
        raise DataError(f"batch size {batch_size} cannot be shared equally by {world_size} ranks")
    lanes = 1
    while 2 * lanes <= min(LANES, shards) and batch_size % (2 * lanes) == 0:
        lanes *= 2
    if lanes % world_size == 0:
        return lanes
    if shards < world_size:
        raise DataError(f"{shards} shards are fewer than {world_size} ranks; write smaller shards")
    return world_size
