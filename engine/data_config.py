"""The configuration of the training data: where it comes from, how it is read, how much makes a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from ..harmony.config import Config
from .data.augment import AugmentConfig
from .errors import UserError


class DataConfig(Config):
    """Where the samples come from, and how many make a batch."""

    train: Path | list[str]
    """The .beton file to train on (made by `harmony-fast prepare`), or a list of such files that are one data set;
    with `loader: webdataset` tars: paths, globs, brace ranges, addresses (https://, s3://), `pipe:` commands."""
    prepare_from: list[str] = Field(default=[])
    """Webdataset tars that `train` is made from when it does not exist yet."""
    loader: Literal["ffcv", "webdataset"] = "ffcv"
    """ffcv: .beton files; webdataset: tars as they are, near or far, decoded by PIL."""
    order: Literal["auto", "random", "quasi_random"] = "auto"
    """Of the samples in an epoch, for .beton files. quasi_random reads the disk in large pieces; auto: where the files
    are larger than memory."""
    reading: Literal["auto", "page_cache", "direct"] = "auto"
    """Of .beton files: mapped and kept by the page cache, or read as needed; auto: direct where larger than memory."""
    samples: PositiveInt | None = None
    """With `loader: webdataset`: samples in all shards; null: as img2dataset's _stats.json beside the shards say."""
    tokenizer: str = "clip"
    """As for `harmony-fast prepare --tokenizer`: of the captions of tars (`loader: webdataset`, `prepare_from`), and of
    all texts in evaluation, report and export; with .beton files the one that they were prepared with."""
    captions: Literal["one", "all"] = "one"
    """With `loader: webdataset` or `prepare_from`: of several captions of an image use the first, or draw one in each
    epoch. A .beton file has what it was prepared with."""
    shuffle: PositiveInt = 4096
    """With `loader: webdataset`: samples in memory, of all ranks together, that are shuffled."""
    cache_dir: Path | None = None
    """With `loader: webdataset`: folder for shards from afar; null: they are read from afar in every epoch."""
    cache_gib: PositiveFloat = 50.0
    """Size of that folder at most, GiB; what was not used for the longest time goes first."""
    batch_size: PositiveInt = 768
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Samples of one forward and backward pass on one rank; null: all of the rank's. Gradients are accumulated; the
    contrastive loss still compares the whole batch."""
    workers: PositiveInt | None = None
    """Decoding threads per rank; null: the processor cores divided among the ranks of
    a machine."""
    augment: AugmentConfig = AugmentConfig()

    @field_validator("train", mode="before")
    @classmethod
    def _addresses_are_no_paths(cls, given: Any) -> Any:
        """A path would make one slash of the two in an address."""
        return [given] if isinstance(given, str) and ("://" in given or given.startswith("pipe:")) else given

    @field_validator("train")
    @classmethod
    def _names_something(cls, given: Path | list[str]) -> Path | list[str]:
        if given == []:
            raise ValueError("names no file")
        return given

    @property
    def sources(self) -> list[str]:
        """`train` as a list, whatever its form."""
        return self.train if isinstance(self.train, list) else [str(self.train)]

    def samples_per_rank(self, ranks: int) -> int:
        """Of an optimizer step. Raises UserError if the batch cannot be divided equally."""
        if self.batch_size % ranks:
            raise UserError(f"data.batch_size {self.batch_size} cannot be divided among {ranks} ranks")
        return self.batch_size // ranks
