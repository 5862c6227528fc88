"""Several `.beton` files as one data set, in the order they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .beton import Beton, open_beton


@dataclass(frozen=True)
class Records:
    """Where some samples lie; every field is an array [B]. Pointers were checked against the files' ends."""

    file: np.ndarray
    """int64: which file"""
    start: np.ndarray
    """int64: byte at which the image begins"""
    size: np.ndarray
    """int64: bytes of the image; 0 where the file's tables lead nowhere"""
    mode: np.ndarray
    """int64: JPEG or raw pixels, FFCV's numbers"""
    height: np.ndarray
    """int64, pixels"""
    width: np.ndarray
    """int64, pixels"""
    caption: np.ndarray
    """int64: byte at which the caption's tokens begin; -1 where the file's tables lead nowhere"""


class BetonSet:
    """Sample i of the set is sample i - starts[f] of file f, for starts[f] <= i < starts[f + 1]."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Raises DataError: no file, one that is not a `.beton`, captions of different lengths."""
        if not paths:
            raise DataError("no .beton file given")
        self.files: list[Beton] = [open_beton(path) for path in paths]
        self.context = self.files[0].context
        """Tokens per caption."""
        for file in self.files:
            if file.context != self.context:
                raise DataError(
                    f"{file.path}: has captions of {file.context} tokens, {self.files[0].path} of {self.context}; "
                    "prepare them with the same --context"
                )
        self.starts = np.cumsum([0, *map(len, self.files)])
        """int64 [files + 1]."""
        self.bytes = sum(file.path.stat().st_size for file in self.files)
        """Of all files."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def name(self) -> str:
        """What messages call the set."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{more}"

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """File and place in it of samples int64 [B]: int64 [B] each."""
        file = np.searchsorted(self.starts, indices, "right") - 1
        return file, indices - self.starts[file]

    def named(self, index: int) -> str:
        """A sample as messages call it: its file, number and key."""
        (file,), (row,) = self.locate(np.array([index]))
        beton = self.files[file]
        (key,) = beton.keys([int(row)])
        return f"{beton.path}: sample {row} (key {key!r})"

    def keys(self, indices: Iterable[int]) -> list[str]:
        """Sample ids. Raises DataError where a file's pointers lead nowhere."""
        places = zip(*(a.tolist() for a in self.locate(np.fromiter(indices, np.int64))), strict=True)
        return [self.files[file].keys([row])[0] for file, row in places]

    def records(self, indices: np.ndarray, draws: np.ndarray) -> Records:
        """Where samples int64 [B] lie. draws: float64 [B] in [0, 1), which of its captions each shows."""
        file, row = self.locate(indices)
        out = Records(file, *(np.zeros(len(indices), np.int64) for _ in range(6)))
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            beton = self.files[number]
            metadata = beton.metadata[row[here]]
            image = metadata["image"]
            out.start[here] = image["data_ptr"].astype(np.int64)
            out.size[here] = beton.image_sizes(row[here])
            out.mode[here], out.height[here], out.width[here] = image["mode"], image["height"], image["width"]
            out.caption[here] = _caption_starts(beton, metadata, draws[here])
        return out


def _caption_starts(beton: Beton, metadata: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Byte at which the drawn caption begins: int64 [B]; -1 where it would lie outside the file's data."""
    width = 4 * beton.context
    starts = metadata["tokens"]
    if beton.several:
        counts = np.maximum(metadata["captions"]["size"] // width, 1)
        starts = metadata["captions"]["ptr"] + (draws * counts).astype(np.uint64) * np.uint64(width)
    good = (starts <= beton.data_end) & (width <= beton.data_end - np.minimum(starts, beton.data_end))
    return np.where(good, starts, 0).astype(np.int64) - np.where(good, 0, 1)
