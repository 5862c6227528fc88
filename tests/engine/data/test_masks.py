"""Images with masks: layouts that are found, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from harmony_fast.engine.data.masks import find_masked
from harmony_fast.engine.errors import DataError
from PIL import Image


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def mask(width: int, height: int, mode: str = "L") -> Image.Image:
    """The numbers 0 and 1 side by side."""
    numbers = np.zeros((height, width), np.uint8)
    numbers[:, width // 2 :] = 1
    return Image.fromarray(numbers).convert(mode) if mode != "P" else Image.fromarray(numbers, "P")


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("P", "png"), ("I;16", "png"), ("L", "bmp")])
def test_numbers_are_read_as_they_are(tmp_path: Path, picture: Callable, mode: str, ending: str) -> None:
    save(tmp_path / "images" / "deep" / "a.jpg", picture(0, 20, 10))
    save(tmp_path / "masks" / "deep" / f"a.{ending}", mask(20, 10, mode))
    (found,) = find_masked(tmp_path, "validation")
    image, numbers = found.load()
    assert image.size == (20, 10) and numbers.dtype == np.int64
    assert (numbers[:, :10] == 0).all() and (numbers[:, 10:] == 1).all()


def test_ade20ks_parts(tmp_path: Path, picture: Callable) -> None:
    for part, name in (("training", "t"), ("validation", "v")):
        save(tmp_path / "images" / part / f"{name}.jpg", picture(0, 20, 10))
        save(tmp_path / "annotations" / part / f"{name}.png", mask(20, 10))
    assert [pair.image.stem for pair in find_masked(tmp_path, "training")] == ["t"]
    assert [pair.image.stem for pair in find_masked(tmp_path, "validation")] == ["v"]
    for part in ("training", "validation"):
        (tmp_path / "images" / part).rename(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=f"images/{part}: no such folder, though there is one called "):
            find_masked(tmp_path, part)
        (tmp_path / "elsewhere").rename(tmp_path / "images" / part)


def test_mistakes_are_named(tmp_path: Path, picture: Callable) -> None:
    with pytest.raises(DataError, match="no folder of images in it; expected one called images or img"):
        find_masked(tmp_path, "training")
    image = save(tmp_path / "images" / "a.jpg", picture(0, 20, 10))
    with pytest.raises(DataError, match="no folder of masks"):
        find_masked(tmp_path, "training")
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"a.jpg: has no mask .*a.png"):
        find_masked(tmp_path, "training")
    path = save(tmp_path / "masks" / "a.png", mask(20, 11))
    (found,) = find_masked(tmp_path, "training")
    with pytest.raises(DataError, match=r"a.png: is 20 x 11 pixels, its image 20 x 10"):
        found.load()
    save(path, picture(0, 20, 10))
    with pytest.raises(DataError, match=r"a.png: has 3 channels; a mask has one"):
        found.load()
    path.write_bytes(b"no mask")
    with pytest.raises(DataError, match=r"a.png: mask not readable"):
        found.load()
    image.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a.jpg: image not readable"):
        found.load()
    image.unlink()
    with pytest.raises(DataError, match="no image in this folder"):
        find_masked(tmp_path, "training")
