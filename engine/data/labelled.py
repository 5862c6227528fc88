"""Small labelled image-caption sets, read whole into memory for the report; `pictures` streams large ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError
from .images import Rejected, decode_rgb
from .samples import SHARD_DAMAGED, FileSample, ShardDamaged
from .sources import expand_sources
from .tars import read_shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSample:
    """One image with all that is known about it."""

    key: str
    """Sample id."""
    image: Image.Image
    """RGB, in its own size, transparency over white."""
    caption: str
    labels: dict[str, Any]
    """What the sample's `.json` and `.cls` say; empty if it has neither."""


def read_labelled(sources: str | Path | Iterable[str | Path]) -> list[LabelledSample]:
    """All usable samples of webdataset tars (paths, globs, brace ranges, folders), in order.

    Samples that cannot be read are left out; how many, and why, is logged as a warning. Raises DataError where a source
    cannot be opened or no sample is left.
    """
    shards = expand_sources(sources)
    left_out: Counter[str] = Counter()
    samples = [sample for shard in shards for sample in _usable(shard, left_out)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.most_common())
    if not samples:
        raise DataError(f"no sample in {', '.join(map(str, shards))} is usable ({reasons or 'there is none'})")
    if left_out:
        logger.warning("%d of %d samples left out: %s", left_out.total(), left_out.total() + len(samples), reasons)
    return samples


def _usable(shard: Path, left_out: Counter[str]) -> Iterator[LabelledSample]:
    try:
        for sample in read_shard(shard):
            try:
                yield _decode(sample)
            except Rejected as rejected:
                left_out[str(rejected)] += 1
    except ShardDamaged:
        left_out[SHARD_DAMAGED] += 1


def _decode(sample: FileSample) -> LabelledSample:
    return LabelledSample(sample.key, decode_rgb(sample.image()), sample.captions()[0], sample.labels())
