"""Images with masks of class numbers: a folder of images and one of masks of the same names (ADE20K's layout, too)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from .images import Rejected, decode_rgb
from .samples import IMAGES, extension_of, read_small

IMAGE_FOLDERS = ("images", "img", "JPEGImages")
MASK_FOLDERS = ("masks", "annotations", "labels", "SegmentationClass")
PARTS = ("training", "validation")
"""Subfolders of images and masks, where there are any."""
MASK_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
ADE20K_NAMES = "objectInfo150.txt"
"""The file that tells ADE20K's folder (SceneParsing benchmark) from others."""


@dataclass(frozen=True)
class MaskedImage:
    """An image file and its mask file."""

    image: Path
    mask: Path

    def load(self) -> tuple[Image.Image, np.ndarray]:
        """The image, RGB, and its mask, int64 [H, W], as stored. Raises DataError where they cannot be read or differ
        in size."""
        try:
            image = decode_rgb(read_small(self.image))
        except Rejected as rejected:
            raise DataError(f"{self.image}: {rejected}") from None
        mask = self.load_mask()
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"{self.mask}: is {mask.shape[1]} x {mask.shape[0]} pixels, its image {image.width} x {image.height}"
            )
        return image, mask

    def load_mask(self) -> np.ndarray:
        """int64 [H, W], as stored. Raises DataError where it cannot be read, or has colours instead of numbers."""
        try:
            with Image.open(self.mask) as file:
                mask = np.asarray(file)
        except Exception as error:  # whatever a parser raises on broken bytes
            raise DataError(f"{self.mask}: mask not readable ({error or type(error).__name__})") from None
        if mask.ndim != 2:
            raise DataError(f"{self.mask}: has {mask.shape[-1]} channels; a mask has one, of class numbers")
        return mask.astype(np.int64)


def find_masked(root: Path, part: str) -> list[MaskedImage]:
    """The images below `root`/images with their masks, sorted. part: one of `PARTS`, where there are such subfolders.
    Raises DataError where a folder or a mask is missing, there is the other part alone, or no image.
    """
    images, masks = _folder(root, IMAGE_FOLDERS, "images"), _folder(root, MASK_FOLDERS, "masks")
    if (images / part).is_dir():
        images, masks = images / part, masks / part
    elif others := [other for other in PARTS if (images / other).is_dir()]:
        raise DataError(f"{images / part}: no such folder, though there is one called {others[0]}")
    found = []
    for folder, below, names in os.walk(images, followlinks=True):
        below.sort()
        for name in sorted(names):
            if extension_of(name) not in IMAGES or name.startswith("."):
                continue
            path, stem = Path(folder) / name, name.rpartition(".")[0]
            place = masks / path.relative_to(images).parent
            mask = next((place / (stem + e) for e in MASK_ENDINGS if (place / (stem + e)).is_file()), None)
            if mask is None:
                raise DataError(f"{path}: has no mask {place / stem}.png")
            found.append(MaskedImage(path, mask))
    if not found:
        raise DataError(f"{images}: no image in this folder")
    return found


def _folder(root: Path, names: tuple[str, ...], what: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise DataError(f"{root}: no folder of {what} in it; expected one called {' or '.join(names)}")
    return found
