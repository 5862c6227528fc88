"""The samples that a report shows: held-out ones where there are any, chosen by the run's seed, not by their result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..harmony.randomness import Purpose, sample_keys, split
from ..harmony.schedules import Clock
from ..harmony.views import Range, Views, crop_boxes
from .config import RunConfig
from .data.batch import RawBatch
from .data.beton import open_beton
from .data.labelled import LabelledSample, read_labelled
from .data.parts import tokenize
from .data.views import StepViews
from .errors import UserError
from .evaluate.features import pixels

COUNT = 8
"""Samples shown."""


class HeldOut:
    """The labelled sets of a run, read when first asked for. Raises UserError where there is none."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    @cached_property
    def queries(self) -> list[LabelledSample]:
        """The samples of `evaluate.data`."""
        return self._read("data")

    @cached_property
    def bank(self) -> list[LabelledSample]:
        """The samples of `evaluate.bank`."""
        return self._read("bank")

    def _read(self, key: str) -> list[LabelledSample]:
        sources = getattr(self._config.evaluate, key)
        if not sources:
            raise UserError(f"evaluate.{key} of the configuration names no tars")
        return read_labelled(sources)


@dataclass(frozen=True)
class Gallery:
    """A few samples and everything the model is given of them. B samples, on the host."""

    source: str
    """Where they come from, in words."""
    names: list[str]
    captions: list[str]
    views: Views
    """As in training, augmented and masked."""
    whole: Tensor
    """float32 [B, 3, H, W]: the whole images as evaluation sees them, normalised"""


def gather(config: RunConfig, held: HeldOut, count: int = COUNT) -> Gallery:
    """From `evaluate.data`, or else `evaluate.bank`, or else the training file. Raises UserError if there is none."""
    reasons = []
    for key, name in (("data", "queries"), ("bank", "bank")):
        try:
            samples = getattr(held, name)
        except UserError as error:
            reasons.append(str(error))
            continue
        return _from_labelled(config, samples, count, f"evaluate.{key}")
    try:
        return _from_training(config, count)
    except UserError as error:
        raise UserError("; ".join([*reasons, str(error)])) from None


def pick(samples: int, count: int, seed: int) -> list[int]:
    """`count` places among `samples`, drawn by the seed."""
    keys = sample_keys(seed, 0, torch.arange(samples), Purpose.ORDER)
    return keys.argsort(stable=True)[:count].tolist()


def _from_labelled(config: RunConfig, samples: list[LabelledSample], count: int, source: str) -> Gallery:
    places = pick(len(samples), count, config.seed)
    chosen = [samples[i] for i in places]
    tokens = torch.stack([torch.from_numpy(tokenize(s.caption, config.model.text.context)[0]) for s in chosen]).long()
    index = torch.tensor(places)
    crops = cut_crops([s.image for s in chosen], index, config)
    return Gallery(
        source=source,
        names=[display_name(s, config) for s in chosen],
        captions=[s.caption for s in chosen],
        views=StepViews(config, RawBatch(*crops, tokens, index), Clock(0, 1, 1))[0],
        whole=torch.stack([pixels(s.image, config) for s in chosen]),
    )


def _from_training(config: RunConfig, count: int) -> Gallery:
    """The training file holds crops only, so the first global crop stands for the whole image."""
    from .data.loader import Loader  # imports FFCV, which takes seconds: only runs without held-out data pay them

    count = min(count, len(open_beton(config.data.train)))
    with Loader(config.data.train, config.views, batch_size=count, seed=config.seed, workers=1) as loader:
        raw = next(iter(loader.epoch(0)))
        names = loader.sample_ids(raw.index)
    mean, std = normalisation(config)
    whole = (raw.global_crops[:, 0].permute(0, 3, 1, 2) / 255 - mean) / std
    captions = [readable(row[1:length]) for row, length in zip(raw.tokens, _words_end(raw.tokens), strict=True)]
    views = StepViews(config, raw, Clock(0, 1, 1))[0]
    return Gallery("data.train (no held-out samples)", names, captions, views, whole)


def cut_crops(images: list[Image.Image], index: Tensor, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Global and local crops, cut where training in the first epoch would: uint8 [B, crops, size, size, 3] each."""
    height, width = (torch.tensor(side) for side in zip(*((i.height, i.width) for i in images), strict=True))
    keys = split(sample_keys(config.seed, 0, index, Purpose.CROP), 2)
    views = config.views

    def crops(keys: Tensor, count: int, size: int, scale: Range) -> Tensor:
        boxes = crop_boxes(keys, height, width, count, scale, views.aspect).tolist()
        rows = [[_cut(image, box, size) for box in row] for image, row in zip(images, boxes, strict=True)]
        return torch.from_numpy(np.array(rows, np.uint8).reshape(len(images), count, size, size, 3))

    return (
        crops(keys[:, 0], views.global_crops, views.global_size, views.global_scale),
        crops(keys[:, 1], views.local_crops, views.local_size, views.local_scale),
    )


def _cut(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    top, left, height, width = box
    place = (left, top, left + width, top + height)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=place))


def display_name(sample: LabelledSample, config: RunConfig) -> str:
    """The sample's class, or else its caption."""
    return str(sample.labels.get(config.evaluate.class_key) or sample.caption)


def normalisation(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels: [3, 1, 1] each."""
    augment = config.data.augment
    mean, std = torch.tensor(augment.mean)[:, None, None], torch.tensor(augment.std)[:, None, None]
    return mean, std


def displayable(images: Tensor, config: RunConfig) -> np.ndarray:
    """Normalised pixels back to what an eye can see: [..., 3, H, W] -> uint8 [..., H, W, 3]."""
    mean, std = normalisation(config)
    return ((images.cpu() * std + mean).clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def readable(tokens: Tensor) -> str:
    """Token ids to text, without the spaces that the tokenizer puts before commas. tokens: int64 [n], words only."""
    from open_clip.tokenizer import decode

    return re.sub(r" ([,.;:!?])", r"\1", decode(tokens)).strip()


def _words_end(tokens: Tensor) -> list[int]:
    """Place of each caption's end id: the largest id."""
    return tokens.argmax(-1).tolist()


def licence_note(sources: list[str]) -> str:
    """Which files beside the sources say how their pictures may be used."""
    folders = dict.fromkeys(Path(source).parent for source in sources)
    notes = sorted(str(p) for folder in folders for p in folder.glob("LICENSE*.md"))
    return f" Licences and credits: {', '.join(notes)}." if notes else ""
