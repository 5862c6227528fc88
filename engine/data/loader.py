"""From a `.beton` file to batches of crops: FFCV's loader around our decode-once operation.

Order, crops and batches are pure functions of (seed, epoch, sample index): the same for any number of workers and
ranks, and resuming in the middle of an epoch is exact.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ...harmony.randomness import Purpose, sample_keys
from ...harmony.views import ViewsConfig
from ..errors import DataError
from .batch import RawBatch
from .beton import open_beton
from .crops import MultiCrop, Status, columns, epoch_key

from ffcv.loader import Loader as FFCVLoader  # isort: skip - after .crops, which imports FFCV without side effects
from ffcv.loader.epoch_iterator import EpochIterator  # isort: skip

BATCHES_AHEAD = 2
"""Batches decoded before they are asked for."""
POLL_SECONDS = 0.5
"""How often a waiting consumer looks whether the epoch's thread still lives."""

REASONS = {
    Status.NOT_STORED: "its image lies outside the file's data",
    Status.NOT_DECODED: "its image cannot be decoded",
}


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's thread count to its own number of workers."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _EpochThread(EpochIterator):
    """FFCV's thread of one epoch, with the three things it lacks: it ends when told to, its errors reach the
    consumer, and it leaves torch's thread count alone."""

    def __init__(self, loader: FFCVLoader, batches: np.ndarray, key: np.uint64) -> None:
        """batches: int64 [steps, samples of this rank per step]; key: uint64 key of (seed, epoch)."""
        self.batches = batches
        self.key = key
        self.failure: BaseException | None = None
        super().__init__(loader, batches.reshape(-1))  # starts the thread

    def run(self) -> None:
        try:
            self.storage_state = (*self.storage_state, self.key)
            image = f"f{self.loader.field_name_to_f_ix['image']}"
            self.metadata = {image: columns(self.metadata[image])}
            numba.set_num_threads(self.loader.num_workers)  # of this thread only
            for step, indices in enumerate(self.batches):
                slot = step % (self.loader.batches_ahead + 2)
                if not self._put((indices, self.run_pipeline(step, indices, slot, None)[0])):
                    return
        except BaseException as error:  # whatever ends this thread, the consumer must learn of it
            self.failure = error

    def _put(self, item: Any) -> bool:
        """Wait for a place in the queue; False if the consumer has closed the epoch."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=POLL_SECONDS)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> Any:
        """The next (indices, output of `MultiCrop`), in buffers that are valid until the next call.

        Raises DataError if the thread has ended without delivering it.
        """
        while True:
            alive = self.is_alive()  # asked before the queue: what a dying thread has delivered is not lost
            try:
                return self.output_queue.get(timeout=POLL_SECONDS if alive else 0)
            except Empty:
                if not alive:
                    raise DataError(self._obituary()) from self.failure

    def _obituary(self) -> str:
        if self.terminate_event.is_set():
            return f"{self.loader.fname}: this epoch was closed (a loader runs one epoch at a time)"
        cause = f"{type(self.failure).__name__}: {self.failure}".splitlines()[0]  # numba's messages are pages long
        return f"{self.loader.fname}: the loader's thread died ({cause})"

    def close(self) -> None:
        """End the thread and wait for it. Idempotent."""
        self.terminate_event.set()
        while self.is_alive():
            with suppress(Empty):
                self.output_queue.get_nowait()  # it may be waiting for a free place
            self.join(0.02)
        super().close()


class Loader:
    """Batches of one rank from a `.beton` file, decoded ahead by a thread with `workers` numba threads.

    The order of the samples in an epoch is the argsort of `sample_keys(seed, epoch, index, Purpose.ORDER)`, ties by
    index. Global batch s is `order[s * batch_size : (s + 1) * batch_size]`, of which rank r takes the r-th of
    `world_size` equal parts; what is left at the end of an epoch is dropped. For crops see `crops.MultiCrop`.

    Used as a context manager, or closed by `close()`.
    """

    def __init__(
        self,
        path: Path,
        views: ViewsConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
    ) -> None:
        """batch_size: samples of all ranks together; workers: by default this machine's CPUs / world_size.

        Raises DataError: not a readable `.beton`, fewer samples than a batch, a batch that the ranks cannot share.
        """
        self._beton = open_beton(path)
        if batch_size < 1 or batch_size % world_size:
            raise DataError(f"batch size {batch_size} cannot be shared equally by {world_size} ranks")
        if len(self._beton) < batch_size:
            raise DataError(f"{path}: {len(self._beton)} samples are fewer than one batch of {batch_size}")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self._thread: _EpochThread | None = None
        with _torch_threads_kept():
            self._ffcv = FFCVLoader(
                str(path),
                batch_size=batch_size // world_size,
                num_workers=_worker_count(workers, world_size),
                pipelines={"image": [MultiCrop(views)], "tokens": None, "key": None},
                batches_ahead=BATCHES_AHEAD,
            )

    @property
    def samples(self) -> int:
        """Samples in the file."""
        return len(self._beton)

    @property
    def context(self) -> int:
        """Tokens per caption."""
        return self._beton.context

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the incomplete last one is dropped."""
        return self.samples // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The order of all samples in `epoch`: int64 [samples]."""
        keys = sample_keys(self.seed, epoch, torch.arange(self.samples), Purpose.ORDER)
        return keys.argsort(stable=True)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """This rank's batches of `epoch` from `start_step` on, each in memory of its own.

        One epoch runs at a time: starting another closes this one. Raises DataError within seconds, naming the
        sample, if an image cannot be decoded, or if the thread that decodes dies.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} is not in an epoch of {self.steps_per_epoch} steps")
        return self._run(epoch, start_step)

    def _run(self, epoch: int, start_step: int) -> Iterator[RawBatch]:
        self.close()
        share = self.batch_size // self.world_size
        steps = self.order(epoch)[: self.steps_per_epoch * self.batch_size].view(-1, self.world_size, share)
        mine = steps[start_step:, self.rank].contiguous().numpy()
        thread = self._thread = _EpochThread(self._ffcv, mine, epoch_key(self.seed, epoch))
        try:
            for _ in range(len(mine)):
                yield self._batch(*next(thread))
        finally:
            thread.close()

    def _batch(self, indices: np.ndarray, output: tuple[np.ndarray, np.ndarray, np.ndarray]) -> RawBatch:
        global_crops, local_crops, status = output
        if status.any():
            self._report(indices, status)
        # Copied: FFCV writes the batch after next into the same buffers.
        crops = (torch.from_numpy(c).clone() for c in (global_crops, local_crops))
        return RawBatch(*crops, self._tokens(indices), torch.from_numpy(indices.copy()))

    def _report(self, indices: np.ndarray, status: np.ndarray) -> None:
        bad = int(np.flatnonzero(status)[0])
        index = int(indices[bad])
        (key,) = self.sample_ids([index])
        reason = REASONS[Status(int(status[bad]))]
        raise DataError(f"{self._beton.path}: sample {index} (key {key!r}): {reason}; prepare the file again")

    def _tokens(self, indices: np.ndarray) -> Tensor:
        """Caption tokens of `indices`: int64 [B, C]. Read where they lie, beside the image that was just decoded."""
        file = self._ffcv.memory_manager.context.mmap  # uint8 [bytes of the file]
        starts = self._beton.metadata["tokens"][indices].astype(np.int64)
        width = 4 * self.context
        outside = np.flatnonzero((starts < 0) | (starts > len(file) - width))
        if outside.size:
            index = int(indices[outside[0]])
            raise DataError(f"{self._beton.path}: damaged, the caption of sample {index} lies outside the file")
        stored = file[starts[:, None] + np.arange(width)].view("<i4")
        return torch.from_numpy(stored.astype(np.int64))

    def sample_ids(self, index: Tensor | Iterable[int]) -> list[str]:
        """The ids (webdataset keys) of the samples at `index`, int64 [B]."""
        return self._beton.keys(int(i) for i in index)

    def close(self) -> None:
        """End the running epoch and its thread. The loader can start another epoch afterwards."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _worker_count(workers: int | None, world_size: int) -> int:
    """At least 1; at most what numba was started with, by default the CPUs this process may use."""
    available = numba.config.NUMBA_NUM_THREADS
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // world_size
    return min(max(workers, 1), available)
