"""The authors' way to load multi-crop batches: PIL in worker processes. Apart, so that workers import little."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from ..engine.data.augment import AugmentConfig
from ..engine.data.beton import open_beton
from ..harmony.views import ViewsConfig

Batches = Callable[[], AbstractContextManager[Iterator[int]]]
"""Starts a loader; yields the number of images of each batch, when the batch is there."""


class PilCrops(Dataset):
    """The authors' way: one worker decodes an image with PIL and makes all its crops from the PIL image."""

    def __init__(self, path: Path, views: ViewsConfig, augment: AugmentConfig | None) -> None:
        """augment: None for crops only."""
        self._path, self._count = path, len(open_beton(path))
        strength = augment or AugmentConfig()  # of crops only nobody looks at it
        first, others, local = (
            _recipe(size, scale, views.aspect, augment, blur, solarize)
            for size, scale, blur, solarize in (
                (views.global_size, views.global_scale, strength.blur_first_global, 0.0),
                (views.global_size, views.global_scale, strength.blur_other_globals,
                 strength.solarize_other_globals),
                (views.local_size, views.local_scale, strength.blur_locals, 0.0),
            )
        )  # fmt: skip
        self._recipes = [first, *[others] * (views.global_crops - 1), *[local] * views.local_crops]
        self._content: np.memmap | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        if self._content is None:  # in the worker
            self._content, self._beton = np.memmap(self._path, np.uint8, "r"), open_beton(self._path)
        start = int(self._beton.metadata["image"]["data_ptr"][index])
        size = int(self._beton.image_sizes(np.array([index]))[0])
        image = Image.open(io.BytesIO(self._content[start : start + size].tobytes())).convert("RGB")
        return [recipe(image) for recipe in self._recipes]


def _recipe(
    size: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    augment: AugmentConfig | None,
    blur: float,
    solarize: float,
) -> v2.Compose:
    """torchvision's transforms of a PIL image, as DINO and the authors have them."""
    crop = v2.RandomResizedCrop(size, scale, aspect, interpolation=v2.InterpolationMode.BICUBIC)
    if augment is None:
        return v2.Compose([crop, v2.PILToTensor()])
    a = augment
    jitter = v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
    return v2.Compose([
        crop, v2.RandomHorizontalFlip(a.flip), v2.RandomApply([jitter], a.jitter), v2.RandomGrayscale(a.grayscale),
        v2.RandomApply([v2.GaussianBlur(13, a.blur_sigma)], blur), v2.RandomSolarize(128, solarize),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(a.mean, a.std),
    ])  # fmt: skip


class _UntilStopped(Sampler[list[int]]):
    """Random batches without end, until told to stop: what workers have begun can then be waited for."""

    def __init__(self, count: int, batch: int) -> None:
        self._count, self._batch = count, batch
        self.stopped = False

    def __iter__(self) -> Iterator[list[int]]:
        while not self.stopped:
            yield torch.randperm(self._count)[: self._batch].tolist()


def pil(path: Path, views: ViewsConfig, batch: int, cores: int, augment: AugmentConfig | None) -> Batches:
    """torch's DataLoader with a worker per core around `PilCrops`; the workers stay from round to round, idle."""
    data = PilCrops(path, views, augment)
    sampler = _UntilStopped(len(data), batch)
    loader = DataLoader(
        data, batch_sampler=sampler, num_workers=cores, persistent_workers=True, multiprocessing_context="forkserver"
    )  # not forked from this process, whose threads (numba, OpenMP) a fork would break

    @contextmanager
    def start() -> Iterator[Iterator[int]]:
        sampler.stopped = False
        batches = iter(loader)
        yield (len(crops[0]) for crops in batches)
        sampler.stopped = True
        for _ in batches:
            pass

    return start
