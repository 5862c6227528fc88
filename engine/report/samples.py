"""The samples that a report shows: held-out ones where there are any, chosen by the run's seed, not by their result."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...harmony.randomness import Purpose, sample_keys, split
from ...harmony.schedules import Clock
from ...harmony.views import Range, Views, crop_boxes
from ..config import RunConfig
from ..data.batch import RawBatch
from ..data.beton import MODE_JPEG
from ..data.beton_set import BetonSet, Records
from ..data.images import Rejected, decode_rgb
from ..data.labelled import LabelledSample, read_labelled
from ..data.pictures import open_pictures
from ..data.samples import ShardDamaged
from ..data.sources import expand_sources
from ..data.tars import read_shard
from ..data.tokens import text_of, tokenize
from ..data.views import StepViews
from ..errors import DataError, UserError
from ..evaluate.classes import labels_of
from ..evaluate.features import how_to_read, pixels
from ..shipped import shipped_data

COUNT = 8
"""Samples shown of one run or two; of more runs fewer, so that the page stays a page."""
POOL = 512
"""Training samples read where there are no held-out ones."""


class HeldOut:
    """The samples of a run that may be shown, read when first asked for. Raises UserError where there are none."""

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

    @cached_property
    def classes(self) -> list[str]:
        """`evaluate.class_key` of all samples of `evaluate.data`, of those that are not held as well."""
        evaluate = self._config.evaluate
        found = open_pictures(evaluate.data, how_to_read(self._config))
        if evaluate.classes is None or found.count == len(self.queries):
            return sample_labels(self.queries, evaluate.class_key)
        labels = (picture.labels.get(evaluate.class_key) for picture in found.read())
        return [str(label) for label in labels if label is not None]

    @cached_property
    def pool(self) -> tuple[str, list[LabelledSample]]:
        """Of `evaluate.data`, or else `evaluate.bank`, or else some of the training data; and where from, in words."""
        reasons = []
        for key, name in (("data", "queries"), ("bank", "bank")):
            try:
                return f"evaluate.{key}", getattr(self, name)
            except UserError as error:
                reasons.append(str(error))
        try:
            return "data.train (there are no held-out samples)", read_training(self._config, POOL)
        except UserError as error:
            raise UserError("; ".join([*reasons, str(error)])) from None

    def _read(self, key: str) -> list[LabelledSample]:
        sources = getattr(self._config.evaluate, key)
        if not sources:
            raise UserError(f"evaluate.{key} of the configuration names no data")
        return read_labelled(sources, how_to_read(self._config))


@dataclass(frozen=True)
class Gallery:
    """A few samples and everything the model is given of them. B samples, on the host."""

    source: str
    """Where they come from, in words."""
    samples: list[LabelledSample]
    names: list[str]
    views: Views
    """As in training, augmented and masked."""
    whole: Tensor
    """float32 [B, 3, H, W]: the whole images as evaluation sees them, normalised"""


def gather(config: RunConfig, held: HeldOut, count: int) -> Gallery:
    """Some samples of the pool, drawn by the seed. Raises UserError if there is none."""
    source, samples = held.pool
    places = pick(len(samples), count, config.seed)
    chosen, index = [samples[i] for i in places], torch.tensor(places)
    tokens = np.stack([tokenize(s.caption, config.model.text.context, config.data.tokenizer)[0] for s in chosen])
    crops = cut_crops([s.image for s in chosen], index, config)
    return Gallery(
        source=source,
        samples=chosen,
        names=[display_name(s, config) for s in chosen],
        views=StepViews(config, RawBatch(*crops, torch.from_numpy(tokens).long(), index), Clock(0, 1, 1))[0],
        whole=torch.stack([pixels(s.image, config) for s in chosen]),
    )


def finer(gallery: Gallery, config: RunConfig, grid: int) -> Tensor:
    """The whole images with at least `grid` patches per side: float32 [B, 3, H, W], normalised."""
    views, patch = config.views, config.model.image.patch_size
    times = -(-grid * patch // views.global_size)
    if times == 1:
        return gallery.whole
    larger = config.model_copy(update={"views": views.model_copy(update={"global_size": times * views.global_size})})
    return torch.stack([pixels(sample.image, larger) for sample in gallery.samples])


def pick(samples: int, count: int, seed: int) -> list[int]:
    """`count` places among `samples`, drawn by the seed."""
    keys = sample_keys(seed, 0, torch.arange(samples), Purpose.ORDER)
    return keys.argsort(stable=True)[:count].tolist()


def read_training(config: RunConfig, count: int) -> list[LabelledSample]:
    """Some samples of the training data, drawn by the seed; of tars the first ones. Raises UserError."""
    if config.data.loader == "webdataset":
        return _first_of_tars(config.data.sources, count)
    files = BetonSet(config.data.sources)
    rows = np.sort(np.random.default_rng(config.seed).choice(len(files), min(count, len(files)), replace=False))
    records = files.records(rows, np.zeros(len(rows)))
    samples = []
    for i, row in enumerate(rows.tolist()):
        try:
            image, tokens = _stored(files, records, i)
            caption = readable(tokens, config.data.tokenizer)
        except Rejected as rejected:
            raise DataError(f"{files.named(row)}: {rejected}; prepare the file again") from None
        samples.append(LabelledSample(files.keys([row])[0], image, caption, {}))
    return samples


def _stored(files: BetonSet, records: Records, i: int) -> tuple[Image.Image, Tensor]:
    """Image and caption, int64 [context], of the i-th record. Raises Rejected."""
    if records.size[i] == 0 or records.caption[i] < 0:
        raise Rejected("image or caption outside the file's data")
    with files.files[records.file[i]].path.open("rb") as file:
        file.seek(records.start[i])
        stored = file.read(records.size[i])
        file.seek(records.caption[i])
        tokens = torch.from_numpy(np.frombuffer(file.read(4 * files.context), "<i4").astype(np.int64))
    if records.mode[i] == MODE_JPEG:
        return decode_rgb(stored), tokens
    try:
        return Image.frombytes("RGB", (int(records.width[i]), int(records.height[i])), stored), tokens
    except ValueError:
        raise Rejected("image truncated or corrupt") from None


def _first_of_tars(sources: list[str], count: int) -> list[LabelledSample]:
    samples = []
    with suppress(ShardDamaged):  # what lies before the damage can be shown
        for sample in islice(read_shard(expand_sources(sources)[0]), count):
            with suppress(Rejected):
                samples.append(LabelledSample(sample.key, decode_rgb(sample.image()), sample.captions()[0], {}))
    if not samples:
        raise UserError(f"{sources[0]}: none of its first samples can be read")
    return samples


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


def sample_labels(samples: list[LabelledSample], key: str) -> list[str]:
    """One label of every sample, as text. Raises UserError, naming the sample, where it has none."""
    return labels_of(((f"sample {sample.key}", sample.labels) for sample in samples), key)


def display_name(sample: LabelledSample, config: RunConfig) -> str:
    """The sample's class, or else its caption."""
    return str(sample.labels.get(config.evaluate.class_key) or sample.caption)


def displayable(images: Tensor, config: RunConfig) -> np.ndarray:
    """Normalised pixels back to what an eye can see: [..., 3, H, W] -> uint8 [..., H, W, 3]."""
    mean, std = (torch.tensor(of)[:, None, None] for of in (config.data.augment.mean, config.data.augment.std))
    return ((images.cpu() * std + mean).clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def readable(tokens: Tensor, tokenizer: str) -> str:
    """Token ids to text, without the spaces that the tokenizer puts before commas. tokens: int64 [n], up to the end
    token where there is one. Raises Rejected where the tokenizer does not know an id."""
    return re.sub(r" ([,.;:!?])", r"\1", text_of(tokens.numpy(), tokenizer))


def licence_note(sources: list[str]) -> str:
    """Which files beside the sources say how their pictures may be used."""
    beside = {path.parent: shipped_data(path).parent.glob("LICENSE*.md") for path in map(Path, sources)}
    notes = sorted(str(folder / note.name) for folder, found in beside.items() for note in found)
    return f" Licences and credits: {', '.join(notes)}." if notes else ""
