"""The loader that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from torch import Tensor

from ..config import RunConfig
from ..disk import replace_text
from ..distributed import Ranks
from ..errors import DataError
from ..sizes import GIB
from .batch import RawBatch
from .beton_set import BetonSet
from .reading import fits_memory
from .remote import Cache
from .webdataset_loader import WebdatasetLoader


class AnyLoader(Protocol):
    """What the training loop needs of a loader; `loader.Loader` says what each part means."""

    seed: int

    @property
    def samples(self) -> int:
        """In the data set."""

    @property
    def context(self) -> int:
        """Tokens per caption."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[RawBatch]:
        """This rank's batches of an epoch from a step on."""

    def sample_ids(self, index: Tensor | Iterable[int]) -> list[str]:
        """The ids of samples, by their numbers."""

    def __enter__(self) -> AnyLoader: ...

    def __exit__(self, *_: object) -> None: ...


def open_loader(config: RunConfig, ranks: Ranks) -> AnyLoader:
    """This rank's loader of the training data. Raises DataError as the loaders do."""
    data = config.data
    pin = ranks.device.type == "cuda"
    workers = data.workers or cores_of_a_rank(ranks.local_size)
    if data.loader == "webdataset":
        cache = Cache(data.cache_dir, int(data.cache_gib * GIB)) if data.cache_dir else None
        return WebdatasetLoader(
            data.sources, config.views, context=config.model.text.context, batch_size=data.batch_size,
            seed=config.seed, rank=ranks.rank, world_size=ranks.world_size, workers=workers,
            tokenizer=data.tokenizer, captions=data.captions, samples=data.samples, shuffle=data.shuffle, cache=cache,
            vocabulary=config.model.text.vocabulary, pin=pin,
        )  # fmt: skip
    from .loader import Loader  # imports FFCV, which takes seconds, and need not be installed for the other

    return Loader(
        data.sources, config.views, batch_size=data.batch_size, seed=config.seed, rank=ranks.rank,
        world_size=ranks.world_size, workers=workers, order=settle_order(config, ranks), reading=data.reading,
        vocabulary=config.model.text.vocabulary, pin=pin,
    )  # fmt: skip


def cores_of_a_rank(local_size: int) -> int:
    """This process's cores divided among the ranks of its machine; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def settle_order(config: RunConfig, ranks: Ranks) -> Literal["random", "quasi_random"]:
    """The order of a run, the same on all ranks and when the run goes on elsewhere: `auto` is decided once, by whether
    the files fit the memory of every rank's machine, and noted in the run folder."""
    if config.data.order != "auto":
        return config.data.order
    note = config.run_dir / "order.txt"
    try:
        known = note.read_text().strip() if note.is_file() else ""
    except OSError as error:
        raise DataError(f"{note}: cannot be read: {error.strerror}") from None
    large = known == "quasi_random" if known else not fits_memory(BetonSet(config.data.sources).bytes)
    order: Literal["random", "quasi_random"] = "quasi_random" if ranks.any(large) else "random"
    if ranks.is_main and not known:
        replace_text(note, order + "\n")
    return order
