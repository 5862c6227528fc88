"""The ways to load multi-crop batches that `bench loader` compares, and the data they load."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..engine.data.augment import Augment, AugmentConfig
from ..engine.data.beton import BetonWriter
from ..engine.data.loader import Loader
from ..engine.data.webdataset_loader import WebdatasetLoader
from ..harmony.randomness import Purpose, sample_keys
from ..harmony.views import ViewsConfig
from .loader_pil import Batches

SEED = 0
CONTEXT = 77


def photograph(seed: int, side: int) -> Image.Image:
    """A picture whose spectrum falls as a photograph's does, `side` x 3/4 `side` pixels."""
    random = np.random.default_rng(seed)
    height = side * 3 // 4
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(random.standard_normal((3, height, side))) / frequency**1.2
    planes = np.fft.irfft2(noise, (height, side))
    planes = planes[0] + 0.3 * planes  # channels of a photograph go together
    planes = 128 + 50 * (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_images(folder: Path, side: int, count: int, different: int = 64, quality: int = 90) -> Path:
    """A `.beton` and a tar beside it of `count` JPEGs, of which some are the same; returns the `.beton`."""
    import tarfile

    jpegs = []
    for seed in range(min(different, count)):
        file = io.BytesIO()
        photograph(seed, side).save(file, "JPEG", quality=quality)
        jpegs.append(file.getvalue())
    tokens = np.zeros(CONTEXT, np.int32)
    tokens[:3] = 49406, 320, 49407
    path = folder / f"{side}.beton"
    with BetonWriter(path, count, CONTEXT) as writer, tarfile.open(path.with_suffix(".tar"), "w") as tar:
        for i in range(count):
            data = jpegs[i % len(jpegs)]
            writer.write(data, side, side * 3 // 4, tokens, f"{i:06d}")
            for name, content in ((f"{i:06d}.jpg", data), (f"{i:06d}.txt", b"a")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def ten_pipelines(path: Path, views: ViewsConfig, batch: int, cores: int) -> Batches:
    """FFCV's own loader with a pipeline for every crop on the one image field, each of which decodes the image."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption
    from ffcv.pipeline import PipelineSpec

    def crop(size: int, scale: tuple[float, float]) -> PipelineSpec:
        return PipelineSpec("image", RandomResizedCropRGBImageDecoder((size, size), scale, views.aspect), [])

    large = {f"global{i}": crop(views.global_size, views.global_scale) for i in range(views.global_crops)}
    small = {f"local{i}": crop(views.local_size, views.local_scale) for i in range(views.local_crops)}
    pipelines = {"image": None, "tokens": None, "key": None, **large, **small}
    threads = torch.get_num_threads()
    loader = FFCVLoader(str(path), batch, cores, order=OrderOption.RANDOM, seed=SEED, pipelines=pipelines)
    torch.set_num_threads(threads)

    @contextmanager
    def start() -> Iterator[Iterator[int]]:
        iterators = []

        def batches() -> Generator[int, None, None]:
            while True:
                iterators.append(iter(loader))
                for crops in iterators[-1]:
                    yield len(crops[0])

        running = batches()
        yield running
        running.close()
        for iterator in iterators:  # its thread ends at the next batch that nobody takes
            iterator.close()
            iterator.join(30)
        torch.set_num_threads(threads)

    return start


def ours(path: Path, views: ViewsConfig, batch: int, cores: int, augment: AugmentConfig | None) -> Batches:
    """This project's loader; with `augment` the crops are augmented on the CPU too, as for training without a GPU."""
    return _ours(lambda: Loader(path, views, batch_size=batch, seed=SEED, workers=cores), augment)


def streamed(path: Path, views: ViewsConfig, batch: int, cores: int) -> Batches:
    """This project's loader of tars."""
    return _ours(
        lambda: WebdatasetLoader([path], views, context=CONTEXT, batch_size=batch, seed=SEED, workers=cores), None
    )


@dataclass
class _Chain:
    """Augmentation of a batch on the CPU."""

    augment: Augment
    epoch: int

    def __call__(self, large: torch.Tensor, small: torch.Tensor, index: torch.Tensor) -> None:
        keys = sample_keys(SEED, self.epoch, index, Purpose.AUGMENT)
        self.augment(large, keys, "global")
        self.augment(small, keys, "local")


def _ours(make: Callable[[], Loader | WebdatasetLoader], augment: AugmentConfig | None) -> Batches:
    @contextmanager
    def start() -> Iterator[Iterator[int]]:
        with make() as loader:

            def batches() -> Generator[int, None, None]:
                epoch = 0
                while True:
                    for batch in loader.epoch(epoch):
                        if augment is not None:
                            _Chain(Augment(augment), epoch)(batch.global_crops, batch.local_crops, batch.index)
                        yield len(batch.index)
                    epoch += 1

            running = batches()
            yield running
            running.close()

    return start
