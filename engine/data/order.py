"""The order of the samples in an epoch: pure functions of (seed, epoch, place), evaluated where they are asked for.

No list of all samples is kept, so neither memory nor time to start grows with the data set. Letters: N samples.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from ...harmony.randomness import MIX1, MIX2, Purpose, sample_keys, split

ROUNDS = 8
"""Of the Feistel network; four each on either half."""
BLOCK_BYTES = 8 << 20
"""Data of a block: what a quasi-random order reads in one go."""
WINDOW_BLOCKS = 128
"""Blocks (1 GiB) within which a quasi-random order shuffles samples."""


def shuffled(places: np.ndarray, count: int, key: int) -> np.ndarray:
    """A random permutation of 0..count-1, at `places` only: int64 [n] -> int64 [n].

    A Feistel network on the grid of a x b >= count numbers (Black and Rogaway, "Ciphers with arbitrary finite domains",
    CT-RSA 2002, method 3); what falls outside is sent through again until it falls inside. key: 64 bits.
    """
    a = max(1, math.isqrt(count - 1) + 1)
    b = max(1, -(-count // a))
    rounds = split(torch.tensor([key]), ROUNDS)[0].numpy().view(np.uint64)
    result = _network(places.astype(np.uint64), a, b, rounds)
    while (outside := np.flatnonzero(result >= count)).size:
        result[outside] = _network(result[outside], a, b, rounds)
    return result.astype(np.int64)


def _network(x: np.ndarray, a: int, b: int, rounds: np.ndarray) -> np.ndarray:
    left, right = x // np.uint64(b), x % np.uint64(b)
    for number, key in enumerate(rounds):
        if number % 2:
            left = (left + _mix(right + key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix(left + key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """`randomness.mix` on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX2)
    return x ^ (x >> np.uint64(31))


def order_keys(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: number w is the key of window w; they also sort the blocks."""
    return sample_keys(seed, epoch, torch.arange(count), Purpose.ORDER).numpy()


class RandomOrder:
    """All samples, shuffled: place p of the epoch holds sample `shuffled(p, N, order_keys(seed, epoch, 1)[0])`."""

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self._count, self._key = count, int(order_keys(seed, epoch, 1)[0])

    def at(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places` of the epoch: int64 [n] -> int64 [n]."""
        return shuffled(places, self._count, self._key)


class Blocks:
    """A data set cut into runs of consecutive samples of about BLOCK_BYTES, which do not cross from file to file."""

    def __init__(self, file_starts: np.ndarray, total_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        """file_starts: int64 [files + 1], number of the first sample of each file, and N. total_bytes: of all files."""
        samples = int(file_starts[-1])
        step = max(1, round(block_bytes * samples / max(total_bytes, 1)))
        parts = [np.arange(a, b, step) for a, b in pairwise(file_starts)]
        self.starts = np.concatenate([*parts, [samples]]).astype(np.int64)
        """int64 [blocks + 1]: number of the first sample of each, and N."""

    def __len__(self) -> int:
        return len(self.starts) - 1


class QuasiRandomOrder:
    """Blocks in random order; samples shuffled within windows of some blocks: the disk reads large pieces, once.

    Blocks are sorted by `order_keys`; window w is the w-th run of `window` of them; place p of the window holds its
    sample number `shuffled(p, samples of the window, split(order key of w, 1)[0])`.
    """

    def __init__(self, blocks: Blocks, seed: int, epoch: int, window: int = WINDOW_BLOCKS) -> None:
        keys = order_keys(seed, epoch, len(blocks))
        self.blocks = keys.argsort(kind="stable")
        """int64 [blocks]: which block is at each place."""
        self._window = window
        self._first = blocks.starts[self.blocks]
        ends = np.cumsum(blocks.starts[self.blocks + 1] - self._first)
        self._before = np.concatenate([[0], ends])  # samples before each block, in this order
        heads = np.append(np.arange(0, len(blocks), window), len(blocks))
        self.window_starts = self._before[heads]
        """int64 [windows + 1]: place of the first sample of each window, and N."""
        self._keys = split(torch.from_numpy(keys[: len(heads) - 1]), 1)[:, 0].tolist()

    def windows_at(self, places: np.ndarray) -> np.ndarray:
        """The windows that `places` of the epoch lie in: int64 [n] -> int64 [n]."""
        return np.searchsorted(self.window_starts, places, "right") - 1

    def blocks_of(self, window: int) -> np.ndarray:
        """The blocks of a window: int64, empty after the last window."""
        return self.blocks[window * self._window : (window + 1) * self._window]

    def at(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places` of the epoch: int64 [n] -> int64 [n]."""
        windows = self.windows_at(places)
        result = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = np.flatnonzero(windows == window)
            start, end = self.window_starts[window : window + 2]
            inside = start + shuffled(places[here] - start, int(end - start), self._keys[window])
            block = np.searchsorted(self._before, inside, "right") - 1
            result[here] = self._first[block] + inside - self._before[block]
        return result
