"""`data.loader: webdataset`: batches of crops straight from tars, near or far; portable, no FFCV, nothing prepared.

The same interface as `loader.Loader`, and the same crops for the same (seed, epoch, sample). An epoch goes through
`lanes` of shards side by side. Lane l reads shards l, l + lanes, ... of a random order, shuffles its samples within
windows, and gives the l-th of `lanes` equal parts of every batch; rank r has the r-th share of the lanes, so each shard
is read by one rank only, and batches are the same for any number of ranks that divides the lanes.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...harmony.randomness import Purpose, sample_keys, split, uniform
from ...harmony.views import ViewsConfig
from ..errors import DataError
from .batch import RawBatch
from .images import Rejected
from .lanes import Candidate, Lane, count_lanes
from .order import order_keys, shuffled
from .portable_crops import cut, draw_boxes, header
from .producer import Producer
from .remote import Cache
from .samples import SHARD_DAMAGED, ShardDamaged
from .shards import count_samples, expand_shards, read_any
from .tokens import CLIP, check_ids, tokenize

logger = logging.getLogger(__name__)
T = TypeVar("T")

BATCHES_AHEAD = 2
PLACE_BITS = 24
"""A sample's number is shard << PLACE_BITS | place in the shard."""
REMEMBERED = 64
"""Batches whose keys are kept for `sample_ids`."""


class WebdatasetLoader:
    """Batches of one rank from webdataset tars, decoded ahead by `workers` threads.

    Samples without image or caption are left out. One whose image does not decode is replaced by the next of its lane
    that does, so that a batch depends on nothing but the data, and resuming is exact. A lane that ends before the
    epoch does begins its shards again. An epoch has `samples` // batch_size steps.

    Used as a context manager.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        views: ViewsConfig,
        *,
        context: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        tokenizer: str = CLIP,
        captions: Literal["one", "all"] = "one",
        samples: int | None = None,
        shuffle: int = 4096,
        cache: Cache | None = None,
        vocabulary: int | None = None,
        pin: bool = False,
    ) -> None:
        """sources: paths, globs, brace ranges, addresses, `pipe:` commands. context: tokens per caption. batch_size:
        samples of all ranks together. samples: in all shards, where nothing beside them tells. shuffle: samples of all
        lanes together that are shuffled at once. cache: where whole shards from afar are kept. vocabulary: of the
        model; captions with other token ids are refused.

        Raises DataError: a source names nothing, samples cannot be counted, ranks cannot share batch or shards.
        """
        self._shards = expand_shards(sources)
        self.samples = samples or sum(count_samples(self._shards))
        if self.samples < batch_size:
            raise DataError(f"{self.name}: {self.samples} samples are fewer than one batch of {batch_size}")
        self.lanes = count_lanes(batch_size, world_size, len(self._shards))
        self.views, self.context, self.batch_size, self.seed = views, context, batch_size, seed
        own = self.lanes // world_size
        self._own_lanes = range(rank * own, (rank + 1) * own)
        self._workers = workers or len(os.sched_getaffinity(0))
        self._tokenizer, self._several = tokenizer, captions == "all"
        self._window, self._cache = max(1, shuffle // self.lanes), cache
        self._vocabulary, self._pin = vocabulary, pin
        self._producer: Producer[RawBatch] | None = None
        self._keys: OrderedDict[int, str] = OrderedDict()
        self._at = "its start"
        self._counting = Lock()
        self.left_out: Counter[str] = Counter()
        """Reason -> samples (or shards that broke off) met so far in this process."""

    @property
    def name(self) -> str:
        """What messages call the set."""
        return self._shards[0] + (f" and {len(self._shards) - 1} more" if len(self._shards) > 1 else "")

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.samples // self.batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """This rank's batches of `epoch` from `start_step` on, each in memory of its own.

        One epoch runs at a time: starting another closes this one. Starting in the middle reads what lies before
        without decoding it. Raises DataError if a shard cannot be reached any more, or if a thread dies.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} is not in an epoch of {self.steps_per_epoch} steps")
        return self._run(epoch, start_step)

    def _run(self, epoch: int, start_step: int) -> Iterator[RawBatch]:
        self.close()
        producer = self._producer = Producer(
            lambda: self._batches(epoch, start_step), BATCHES_AHEAD, self.name, lambda: self._at
        )
        try:
            yield from producer
        finally:
            producer.close()
            if self.left_out:
                reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.most_common())
                logger.warning("%s: left out so far: %s", self.name, reasons)

    def _batches(self, epoch: int, start_step: int) -> Iterator[RawBatch]:
        """In the producer's thread."""
        skip = start_step * (self.batch_size // self.lanes)
        lanes = [self._lane(epoch, lane, skip) for lane in self._own_lanes]
        try:
            with ThreadPoolExecutor(self._workers, "harmony-fast-decode") as pool:
                for _ in range(start_step, self.steps_per_epoch):
                    yield self._batch(lanes, epoch, pool)
        finally:
            for lane in lanes:
                lane.close()

    def _batch(self, lanes: list[Lane], epoch: int, pool: ThreadPoolExecutor) -> RawBatch:
        share, v = self.batch_size // self.lanes, self.views
        count = share * len(lanes)
        global_crops, local_crops = (
            torch.empty(count, number, size, size, 3, dtype=torch.uint8, pin_memory=self._pin)
            for number, size in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
        )
        chosen: list[Candidate] = []
        for lane in lanes:
            candidates = lane.take(share)
            self._at = self._named(candidates[0])
            outs = global_crops[len(chosen) :].numpy(), local_crops[len(chosen) :].numpy()
            problems = self._decode(candidates, epoch, *outs, pool)
            for problem in filter(None, problems):
                self._count(problem)
            chosen += self._fill_gaps(candidates, problems, lane, epoch, *outs)
        index = torch.tensor([candidate.index for candidate in chosen])
        self._remember(chosen)
        return RawBatch(global_crops, local_crops, self._tokens(chosen, index, epoch, pool), index)

    def _named(self, candidate: Candidate) -> str:
        """A sample as messages call it."""
        return f"sample {candidate.key!r} of {self._shards[candidate.index >> PLACE_BITS]}"

    def _decode(
        self,
        candidates: list[Candidate],
        epoch: int,
        global_crops: np.ndarray,
        local_crops: np.ndarray,
        pool: ThreadPoolExecutor,
    ) -> list[str | None]:
        """Crops of n candidates into the first n places of both arrays; of each why it cannot be decoded, or None."""
        problems: list[str | None] = [None] * len(candidates)

        def attempt(slot: int, work: Callable[..., T], *arguments: object) -> T | None:
            try:
                return work(*arguments)
            except Rejected as rejected:
                problems[slot] = str(rejected)
                return None

        sizes = [attempt(slot, header, candidate.image) for slot, candidate in enumerate(candidates)]
        height, width = (torch.tensor([size[side] if size else 1 for size in sizes]) for side in (0, 1))
        index = torch.tensor([candidate.index for candidate in candidates])
        boxes = draw_boxes(sample_keys(self.seed, epoch, index, Purpose.CROP), height, width, self.views)

        def finish(slot: int) -> None:
            if problems[slot] is None:
                attempt(slot, cut, candidates[slot].image, boxes[slot], global_crops[slot], local_crops[slot])

        for _ in pool.map(finish, range(len(candidates))):
            pass
        return problems

    def _count(self, reason: str) -> None:
        with self._counting:
            self.left_out[reason] += 1

    def _fill_gaps(
        self,
        candidates: list[Candidate],
        problems: list[str | None],
        lane: Lane,
        epoch: int,
        global_crops: np.ndarray,
        local_crops: np.ndarray,
    ) -> list[Candidate]:
        """The candidates, each that could not be decoded replaced by the next one that could, crops included."""
        chosen, last = list(candidates), len(candidates) - 1
        if problems[last]:  # from the batches to come, where each will have its own place, and be counted if it is bad
            place = global_crops[last:], local_crops[last:]
            with ThreadPoolExecutor(1) as pool:
                chosen[last] = next(c for c in lane.ahead() if self._decode([c], epoch, *place, pool) == [None])
        for slot in reversed(range(last)):
            if problems[slot]:
                chosen[slot] = chosen[slot + 1]
                global_crops[slot], local_crops[slot] = global_crops[slot + 1], local_crops[slot + 1]
        return chosen

    def _tokens(self, chosen: list[Candidate], index: Tensor, epoch: int, pool: ThreadPoolExecutor) -> Tensor:
        draws = uniform(split(sample_keys(self.seed, epoch, index, Purpose.CROP), 3)[:, 2], 1)[:, 0].tolist()
        captions = [c.captions[int(draw * len(c.captions))] for c, draw in zip(chosen, draws, strict=True)]
        rows = pool.map(lambda caption: tokenize(caption, self.context, self._tokenizer)[0], captions)
        tokens = np.stack(list(rows)).astype(np.int64)
        if self._vocabulary is not None:
            check_ids(tokens, self._vocabulary, lambda slot: self._named(chosen[slot]))
        return torch.from_numpy(tokens)

    def _remember(self, chosen: list[Candidate]) -> None:
        self._keys.update((candidate.index, candidate.key) for candidate in chosen)
        while len(self._keys) > REMEMBERED * len(chosen):
            self._keys.popitem(last=False)

    def _lane(self, epoch: int, lane: int, skip: int) -> Lane:
        count = len(self._shards)
        order = shuffled(np.arange(count), count, int(order_keys(self.seed, epoch, 1)[0]))
        shards = order[lane :: self.lanes].tolist()

        def once() -> Iterator[Candidate]:
            for shard in shards:
                yield from self._candidates(shard)

        def key(window: int) -> int:
            place = torch.tensor([(lane + 1) << 40 | window])  # apart from number 0, the key of the shards' order
            return int(sample_keys(self.seed, epoch, place, Purpose.ORDER))

        return Lane(self.name, once, key, self._window, skip)

    def _candidates(self, shard: int) -> Iterator[Candidate]:
        """The samples of a shard that have an image and a caption."""
        try:
            for place, sample in enumerate(read_any(self._shards[shard], self._cache)):
                try:
                    image, captions = sample.image(), sample.captions(self._several)
                except Rejected as rejected:
                    self._count(str(rejected))
                    continue
                kept = captions if self._several else captions[:1]
                yield Candidate(shard << PLACE_BITS | place, sample.key, image, kept)
        except ShardDamaged:
            self._count(SHARD_DAMAGED)
            logger.warning("%s: cut short or damaged; its samples up to there are used", self._shards[shard])

    def sample_ids(self, index: Tensor | Iterable[int]) -> list[str]:
        """The keys of the samples at `index`, int64 [B]; shard and place of those met too long ago."""
        places = (1 << PLACE_BITS) - 1
        return [
            self._keys.get(int(i), f"{self._shards[int(i) >> PLACE_BITS]}: number {int(i) & places}") for i in index
        ]

    def close(self) -> None:
        """End the running epoch and its threads. The loader can start another epoch afterwards."""
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def __enter__(self) -> WebdatasetLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
