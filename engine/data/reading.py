"""Getting the bytes of a batch into memory: mapped files and the page cache, or reads of what is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import DataError
from ..host_memory import host_memory
from .beton_set import BetonSet, Records
from .order import Blocks

MEMORY_SHARE = 0.6
"""Of this machine's memory: files up to this size are left to the page cache."""
READERS = 4
"""Threads that read samples at the same time."""


@dataclass(frozen=True)
class Fetched:
    """The bytes of B samples, in memory."""

    addresses: np.ndarray
    """int64 [B]: where each image begins"""
    tokens: np.ndarray
    """int64 [B, context]"""
    keep: object
    """What must not be freed while the addresses are in use."""


class Storage(Protocol):
    """A way to read the files of a `BetonSet`."""

    def fetch(self, indices: np.ndarray, records: Records) -> Fetched:
        """Read samples int64 [B] that lie at `records`. Raises DataError naming the sample that cannot be read."""

    def expect(self, blocks: Iterable[int]) -> None:
        """These blocks will be read soon."""

    def forget(self, blocks: Iterable[int]) -> None:
        """These blocks will not be read again in this epoch."""

    def close(self) -> None:
        """Free files and threads."""


def fits_memory(size: int) -> bool:
    """Whether files of so many bytes may be left to the page cache."""
    return size <= MEMORY_SHARE * host_memory()


class Mapped:
    """Files mapped into memory: read once, then served by the page cache, which all processes of a machine share."""

    def __init__(self, files: BetonSet) -> None:
        self._files = files
        self._maps = [np.memmap(beton.path, np.uint8, "r") for beton in files.files]
        self._bases = np.array([m.ctypes.data for m in self._maps], np.int64)

    def fetch(self, indices: np.ndarray, records: Records) -> Fetched:
        """Nothing is copied but the tokens; the images are read where the decoder touches them."""
        width = 4 * self._files.context
        tokens = np.empty((len(indices), self._files.context), np.int64)
        for number in np.unique(records.file).tolist():
            here = np.flatnonzero(records.file == number)
            places = records.caption[here][:, None] + np.arange(width)
            tokens[here] = self._maps[number][places].view("<i4")
        return Fetched(self._bases[records.file] + records.start, tokens, self._maps)

    def expect(self, blocks: Iterable[int]) -> None:
        """The system reads ahead by itself."""

    def forget(self, blocks: Iterable[int]) -> None:
        """What is in the page cache may stay there."""

    def close(self) -> None:
        """The maps go with the last array that uses them."""


class Direct:
    """Reads of just the samples that are needed, for files larger than memory.

    The blocks of a quasi-random order are asked for ahead of time, in one go each, and dropped from the page cache
    behind: each byte comes from the disk once, whatever the number of ranks on this machine, and no process holds more
    than its own batches.
    """

    def __init__(self, files: BetonSet, blocks: Blocks) -> None:
        self._files, self._blocks = files, blocks
        self._open = [os.open(beton.path, os.O_RDONLY) for beton in files.files]
        self._readers = ThreadPoolExecutor(READERS, "harmony-fast-read")
        self._advisor = ThreadPoolExecutor(1, "harmony-fast-ahead")
        for file in self._open:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead beyond what is asked for

    def fetch(self, indices: np.ndarray, records: Records) -> Fetched:
        """Images and tokens into buffers of this batch's own."""
        ends = np.cumsum(records.size)
        images = np.empty(int(ends[-1]), np.uint8)
        tokens = np.empty((len(indices), self._files.context), "<i4")
        starts = ends - records.size

        def read(slots: range) -> None:
            for slot in slots:
                file, image = self._open[records.file[slot]], images[starts[slot] : ends[slot]]
                try:
                    got = os.preadv(file, [image.data], int(records.start[slot])) if len(image) else 0
                    got += os.preadv(file, [tokens[slot]], int(records.caption[slot]))
                except OSError as error:
                    named = self._files.named(int(indices[slot]))
                    raise DataError(f"{named}: reading failed: {error.strerror}") from error
                if got != len(image) + tokens[slot].nbytes:
                    raise DataError(f"{self._files.named(int(indices[slot]))}: the file ends too early")

        parts = [range(first, len(indices), READERS) for first in range(min(READERS, len(indices)))]
        for _ in self._readers.map(read, parts):
            pass
        return Fetched(images.ctypes.data + starts, tokens.astype(np.int64), images)

    def expect(self, blocks: Iterable[int]) -> None:
        """Ask the system to bring blocks into the page cache."""
        self._advise(blocks, os.POSIX_FADV_WILLNEED)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let the system drop blocks from the page cache."""
        self._advise(blocks, os.POSIX_FADV_DONTNEED)

    def _advise(self, blocks: Iterable[int], advice: int) -> None:
        for block in blocks:
            self._advisor.submit(self._advise_block, block, advice)

    def _advise_block(self, block: int, advice: int) -> None:
        first, end = self._blocks.starts[block : block + 2]
        (file,), (row,) = self._files.locate(np.array([first]))
        beton = self._files.files[file]
        images, last = beton.metadata["image"]["data_ptr"], int(row + end - first)
        start = int(images[row])
        stop = int(images[last]) if last < len(beton) else beton.data_end
        if start < stop:  # not so in files that hold their samples in another order
            os.posix_fadvise(self._open[file], start, stop - start, advice)

    def close(self) -> None:
        """End the threads, close the files."""
        self._advisor.shutdown(cancel_futures=True)
        self._readers.shutdown()
        for file in self._open:
            os.close(file)
        self._open = []
