"""Labelled samples held in memory, for the report, of all that `pictures` reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError
from .pictures import LeftOut, Picture, PictureSet, Reading, decoded, open_pictures

logger = logging.getLogger(__name__)
MOST = 2048
"""Samples held of one set"""
SIDE = 512
"""Longer side of a held image at most, pixels"""


@dataclass(frozen=True)
class LabelledSample:
    """One image with all that is known about it."""

    key: str
    """Sample id."""
    image: Image.Image
    """RGB, transparency over white, no larger than `SIDE`."""
    caption: str
    """Its first one, or else its first label."""
    labels: dict[str, Any]
    """What is known of its class."""


def read_labelled(sources: list[str], how: Reading) -> list[LabelledSample]:
    """The usable samples of sources, in order. Of a larger set `MOST`, always the same: drawn if their number is known.

    Samples that cannot be read are left out; how many, and why, is logged as a warning. Raises DataError where a source
    cannot be opened or no sample is left.
    """
    found, left_out, samples = open_pictures(sources, how), LeftOut(), []
    for picture, image in decoded(_some(found), _small, None, left_out):
        named = [*picture.captions, *map(str, picture.labels.values())]
        if named:
            samples.append(LabelledSample(picture.key, image, named[0], dict(picture.labels)))
        else:
            left_out.add(picture.name, "no caption")
    count = left_out.reasons.total()
    reasons = ", ".join(f"{reason} {times}" for reason, times in left_out.reasons.most_common())
    if not samples:
        raise DataError(f"no sample in {found.name} is usable ({reasons or 'there is none'})")
    if count:
        logger.warning("%d of %d samples left out: %s", count, count + len(samples), reasons)
    return samples


def _some(found: PictureSet) -> Iterator[Picture]:
    if found.count is None or found.count <= MOST:
        yield from islice(found.read(), MOST)
        return
    chosen = set(np.random.default_rng(0).choice(found.count, MOST, replace=False).tolist())
    yield from (picture for place, picture in enumerate(found.read()) if place in chosen)


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((SIDE, SIDE))
    return image
