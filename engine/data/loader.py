"""From `.beton` files to batches of crops: FFCV's format and decoder around our decode-once operation.

Order, crops, captions and batches are pure functions of (seed, epoch, sample index): the same for any number of workers
and ranks, and resuming in the middle of an epoch is exact. FFCV's own loader is not used: opening a file it builds
dictionaries of all its samples, in every process, and its thread dies in silence. A process of ours holds only its
batches: the files' tables are mapped, and the order is computed where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numba
import numpy as np
import torch
from torch import Tensor

from ...harmony.randomness import Purpose, sample_keys, split, uniform
from ...harmony.views import ViewsConfig
from ..errors import DataError
from .batch import RawBatch
from .beton_set import BetonSet
from .crops import MOST_REDUCED, Status, cut_batch, epoch_key, geometry
from .order import Blocks, QuasiRandomOrder, RandomOrder
from .producer import Producer
from .reading import Direct, Mapped, Storage, fits_memory
from .tokens import check_ids

BATCHES_AHEAD = 2
"""Batches decoded before they are asked for."""

Order = Literal["auto", "random", "quasi_random"]
Reading = Literal["auto", "page_cache", "direct"]

REASONS = {
    Status.NOT_STORED: "its image lies outside the file's data",
    Status.NOT_DECODED: "its image cannot be decoded",
}


class Loader:
    """Batches of one rank from one or more `.beton` files, decoded ahead by a thread with `workers` numba threads.

    Global batch s is places s * batch_size to (s + 1) * batch_size of the epoch's order, of which rank r takes the r-th
    of `world_size` equal parts; what is left at the end of an epoch is dropped. For the order see `order`, for crops
    `crops.cut_batch`. Of k captions a sample shows number floor(u k), u = `uniform(split(k_crop, 3)[2], 1)` of its
    Purpose.CROP key.

    Used as a context manager.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        views: ViewsConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        order: Order = "auto",
        reading: Reading = "auto",
        vocabulary: int | None = None,
        pin: bool = False,
    ) -> None:
        """batch_size: samples of all ranks together. workers: threads, by default one for each CPU. order,
        reading: `auto` is random from the page cache for files that fit this machine's memory, else quasi-random with
        direct reads. vocabulary: of the model; captions with other token ids are refused. pin: batches in page-locked
        memory, for copies to a CUDA device that nothing waits for.

        Raises DataError: not a readable `.beton`, fewer samples than a batch, a batch that the ranks cannot share.
        """
        self._set = BetonSet([paths] if isinstance(paths, str | Path) else paths)
        if batch_size < 1 or batch_size % world_size:
            raise DataError(f"batch size {batch_size} cannot be shared equally by {world_size} ranks")
        if len(self._set) < batch_size:
            raise DataError(f"{self._set.name}: {len(self._set)} samples are fewer than one batch of {batch_size}")
        self.views, self.batch_size, self.seed, self.rank, self.world_size = views, batch_size, seed, rank, world_size
        fits = fits_memory(self._set.bytes)
        self.order_kind = order if order != "auto" else "random" if fits else "quasi_random"
        self.reading = reading if reading != "auto" else "page_cache" if fits else "direct"
        self._workers = _worker_count(workers)
        self._vocabulary, self._pin = vocabulary, pin
        self._blocks = Blocks(self._set.starts, self._set.bytes)
        self._storage: Storage = Mapped(self._set) if self.reading == "page_cache" else Direct(self._set, self._blocks)
        self._producer: Producer[RawBatch] | None = None
        self._at = np.empty(0, np.int64)

    @property
    def samples(self) -> int:
        """Samples in the files."""
        return len(self._set)

    @property
    def context(self) -> int:
        """Tokens per caption."""
        return self._set.context

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the incomplete last one is dropped."""
        return self.samples // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The order of all samples in `epoch`: int64 [samples]."""
        return torch.from_numpy(self._order(epoch).at(np.arange(self.samples)))

    def _order(self, epoch: int) -> RandomOrder | QuasiRandomOrder:
        if self.order_kind == "random":
            return RandomOrder(self.samples, self.seed, epoch)
        return QuasiRandomOrder(self._blocks, self.seed, epoch)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """This rank's batches of `epoch` from `start_step` on, each in memory of its own.

        One epoch runs at a time: starting another closes this one. Raises DataError within seconds, naming the
        sample, if an image cannot be decoded or a caption has an unknown token, or if the thread that decodes dies.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} is not in an epoch of {self.steps_per_epoch} steps")
        return self._run(epoch, start_step)

    def _run(self, epoch: int, start_step: int) -> Iterator[RawBatch]:
        self.close()
        producer = self._producer = Producer(
            lambda: self._batches(epoch, start_step), BATCHES_AHEAD, self._set.name, self._working_on
        )
        try:
            yield from producer
        finally:
            producer.close()

    def _batches(self, epoch: int, start_step: int) -> Iterator[RawBatch]:
        """In the producer's thread: decode one batch after the other."""
        numba.set_num_threads(self._workers)  # of this thread only
        order, key, share = self._order(epoch), epoch_key(self.seed, epoch), self.batch_size // self.world_size
        window = None
        for step in range(start_step, self.steps_per_epoch):
            first = step * self.batch_size + self.rank * share
            places = np.arange(first, first + share)
            if isinstance(order, QuasiRandomOrder):
                window = self._look_ahead(order, places, window)
            self._at = order.at(places)
            yield self._batch(self._at, epoch, key)

    def _look_ahead(self, order: QuasiRandomOrder, places: np.ndarray, reached: int | None) -> int:
        """Ask for the next window's blocks in time, and drop those that all ranks have left behind.

        reached: the window up to which this was done, None at the start. Returns the one up to which it now is.
        """
        first, now = order.windows_at(places[[0, -1]]).tolist()
        if reached is None:
            reached = first - 1
            self._storage.expect(order.blocks_of(first))
        for window in range(reached + 1, now + 1):
            self._storage.expect(order.blocks_of(window + 1))
            if window >= 2:
                self._storage.forget(order.blocks_of(window - 2))
        return now

    def _batch(self, indices: np.ndarray, epoch: int, key: np.uint64) -> RawBatch:
        records = self._set.records(indices, self._caption_draws(indices, epoch))
        lost = np.flatnonzero(records.caption < 0)
        if lost.size:
            raise DataError(f"{self._set.named(int(indices[lost[0]]))}: its caption lies outside the file's data")
        fetched = self._storage.fetch(indices, records)
        if self._vocabulary is not None:
            check_ids(fetched.tokens, self._vocabulary, lambda slot: self._set.named(int(indices[slot])))
        v, count = self.views, len(indices)
        crops = (
            torch.empty(count, number, size, size, 3, dtype=torch.uint8, pin_memory=self._pin)
            for number, size in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
        )
        global_crops, local_crops = crops
        status = np.empty(count, np.int32)
        cut_batch(
            indices, records.mode, records.height, records.width, fetched.addresses, records.size, key, geometry(v),
            MOST_REDUCED, global_crops.numpy(), local_crops.numpy(), status,
        )  # fmt: skip
        if status.any():
            bad = int(np.flatnonzero(status)[0])
            reason = REASONS[Status(int(status[bad]))]
            raise DataError(f"{self._set.named(int(indices[bad]))}: {reason}; prepare the file again")
        return RawBatch(global_crops, local_crops, torch.from_numpy(fetched.tokens), torch.from_numpy(indices))

    def _caption_draws(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        keys = sample_keys(self.seed, epoch, torch.from_numpy(indices), Purpose.CROP)
        return uniform(split(keys, 3)[:, 2], 1)[:, 0].double().numpy()

    def _working_on(self) -> str:
        if not len(self._at):
            return "its start"
        return f"{self._set.named(int(self._at[0]))} and the {len(self._at) - 1} others of its batch"

    def sample_ids(self, index: Tensor | Iterable[int]) -> list[str]:
        """The ids (webdataset keys) of the samples at `index`, int64 [B]."""
        return self._set.keys(int(i) for i in index)

    def close(self) -> None:
        """End the running epoch and its thread. The loader can start another epoch afterwards."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._storage.close()


def _worker_count(workers: int | None) -> int:
    """At least 1; at most what numba was started with, by default the CPUs this process may use."""
    available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set when numba is imported
    return available if workers is None else min(max(workers, 1), available)
