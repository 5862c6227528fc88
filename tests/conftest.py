"""Fixtures for all tests: small pictures and tars, a tiny configuration; hypothesis without deadlines."""

import gc
import io
import multiprocessing.forkserver
import os
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Tests are of what every machine can do, also one with a GPU: `doctor` and `bench` try that (CONTRIBUTING.md).
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each, before torch starts its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import yaml
from commands import ROOT, run
from hypothesis import Phase, settings
from PIL import Image
from tiny import tiny_config

# The first call of anything may compile or import; machines are shared. No test here is about time.
settings.register_profile("harmony-fast", deadline=None)
settings.load_profile("harmony-fast")
# For scripts/mutants.py: whether there is a failure, not the smallest.
settings.register_profile("first-failure", deadline=None, phases=[Phase.explicit, Phase.generate], database=None)

Files = list[tuple[str, bytes]]


def pytest_collection() -> None:
    gc.disable()  # most of what is imported now stays


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that may take longer than others come first: nobody waits for them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("timeout")}
    items.sort(key=lambda item: item.path not in slow)
    gc.freeze()  # no need to look through what stays again and again
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # nanobind's exit handler looks for what is left


@pytest.fixture(scope="session", autouse=True)
def forks() -> None:
    """A process has one server of forks: what imports for `plan` alone has `prepare` import again for each fork."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        modules = ("engine.data.clip_tokenizer", "engine.data.pool", "engine.walks", "bench.step_process")
        multiprocessing.set_forkserver_preload([f"harmony_fast.{name}" for name in modules])
        multiprocessing.forkserver.ensure_running()


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """A smooth RGB image that differs from seed to seed: picture(seed, width, height)."""

    def make(seed: int = 0, width: int = 96, height: int = 64) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(image, "JPEG", quality=90): the bytes of an image file."""
    return encode


@pytest.fixture
def tar(tmp_path: Path) -> Callable[[str, Files], Path]:
    """tar("a.tar", [(name, content), ...]): a tar in the test's folder."""
    return lambda name, files: write_tar(tmp_path / name, files)


@pytest.fixture
def pairs(picture: Callable[..., Image.Image]) -> Callable[..., Files]:
    """pairs(3): the files of three good JPEG-caption samples, 000000 to 000002."""

    def make(count: int, start: int = 0) -> Files:
        samples = [
            (f"{i:06d}", encode(picture(i), quality=90), f"picture number {i}") for i in range(start, start + count)
        ]
        return [file for key, image, text in samples for file in ((f"{key}.jpg", image), (f"{key}.txt", text.encode()))]

    return make


@pytest.fixture
def tiny() -> dict:
    """`tiny_config()`, to be changed at will."""
    return tiny_config()


@pytest.fixture(scope="session")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 of the demo's samples."""
    from harmony_fast.engine.data.prepare import prepare

    path = tmp_path_factory.mktemp("data") / "train.beton"
    prepare([ROOT / "demo" / "noto.tar"], path, context=16, limit=24, workers=1, progress=False)
    return path


@pytest.fixture
def config(tiny: dict, beton: Path, tmp_path: Path) -> Path:
    """A file with `tiny_config()` on these samples: 3 steps an epoch."""
    tiny["data"]["train"] = str(beton)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory: pytest.TempPathFactory, beton: Path) -> Callable[[int], Path]:
    """undisturbed_run(7): the folder of a run of so many steps that nothing happened to."""

    @cache
    def make(steps: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        raw = tiny_config()
        raw["data"]["train"] = str(beton)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
        run("train", folder / "tiny.yaml", f"run_dir={folder / 'run'}", f"max_steps={steps}")
        return folder / "run"

    return make
