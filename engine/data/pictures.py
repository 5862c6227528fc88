"""Labelled pictures of any kind, streamed for evaluation: nothing is held in memory but what is being looked at.

Tars, tables, folders of images with captions (all that `prepare` reads), folders with one subfolder per class, karpathy
JSON files (COCO, Flickr30k), and `.beton` files.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..errors import DataError
from .beton import Beton, open_beton
from .beton_format import MODE_JPEG
from .folders import FolderChunk
from .images import Rejected, decode_rgb
from .samples import IMAGES, Sample, ShardDamaged, extension_of, read_small
from .shards import count_samples
from .sources import TarChunk, find_chunks

T = TypeVar("T")
NAMED = 10
"""Pictures that are named at most when several are left out."""


@dataclass(frozen=True)
class Picture:
    """One image with all that is known about it; it is decoded only when asked for."""

    name: str
    """What messages call it: its file."""
    load: Callable[[], Image.Image]
    """The image: RGB, in its own size, transparency over white. Raises Rejected."""
    captions: tuple[str, ...]
    """May be empty."""
    labels: Mapping[str, Any]
    key: str = ""
    """Sample id: equal ones of two sets show the same."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures in a fixed order, which can be read again and again."""

    name: str
    count: int | None
    """How many there are, where that is known without reading."""
    own_captions: bool
    """Only an image's own captions are right answers to it, as in the literature; otherwise equal ones are as well."""
    read: Callable[[], Iterator[Picture]]


@dataclass(frozen=True)
class Reading:
    """How sources are to be understood."""

    label_keys: tuple[str, ...] = ()
    """Labels that the subfolder is, in a folder of classes."""
    images: Path | None = None
    """Folder of the images that a karpathy JSON names; None: its own."""
    split: str = "test"
    """Of a karpathy JSON."""
    tokenizer: str = "clip"
    """Of the captions of `.beton` files."""


def open_pictures(sources: list[str], how: Reading) -> PictureSet:
    """One set of all sources, in the order given. Raises DataError where one names nothing or cannot be read."""
    sets = [_open(source, how) for source in sources]
    counts = [each.count for each in sets]

    def read() -> Iterator[Picture]:
        for each in sets:
            yield from each.read()

    total = None if None in counts else sum(count for count in counts if count is not None)
    return PictureSet(", ".join(sources), total, any(each.own_captions for each in sets), read)


def _open(source: str, how: Reading) -> PictureSet:
    path = Path(source)
    if path.suffix == ".beton":
        beton = open_beton(path)
        return PictureSet(source, len(beton), False, partial(_of_beton, beton, how.tokenizer))
    if path.suffix == ".json":
        entries = _karpathy(path, how.split)
        folder = how.images or path.parent
        return PictureSet(source, len(entries), True, partial(_of_karpathy, folder, entries))
    if path.is_dir() and (files := _class_files(path)):
        return PictureSet(source, len(files), False, partial(_of_classes, path, files, how.label_keys))
    chunks = find_chunks(source, workers=0)
    count = None
    if all(isinstance(chunk, TarChunk) for chunk in chunks):
        count = sum(count_samples([chunk.name for chunk in chunks]))
    elif all(isinstance(chunk, FolderChunk) for chunk in chunks):
        count = sum(len(chunk.samples) for chunk in chunks if isinstance(chunk, FolderChunk))
    return PictureSet(source, count, False, partial(_of_chunks, chunks))


def _of_chunks(chunks: list[Any]) -> Iterator[Picture]:
    for chunk in chunks:
        try:
            for sample in chunk.read(lambda place: None):
                yield _of_sample(f"{chunk.name}: {sample.key}", sample)
        except ShardDamaged as damage:
            yield Picture(chunk.name, partial(_refuse, f"cut short or damaged ({damage})"), (), {})


def _of_sample(name: str, sample: Sample) -> Picture:
    try:
        labels = sample.labels()
    except Rejected as rejected:
        return Picture(name, partial(_refuse, str(rejected)), (), {})
    try:
        captions = tuple(sample.captions(lines=False))
    except Rejected:
        captions = ()  # not every task needs one
    return Picture(name, lambda: decode_rgb(sample.image()), captions, labels, sample.key)


def _refuse(reason: str) -> Image.Image:
    raise Rejected(reason)


def _class_files(root: Path) -> list[tuple[str, str]]:
    """(class, path below `root`) of all images, sorted, where `root` has one subfolder per class and no captions."""
    files: list[tuple[str, str]] = []
    for folder, below, names in os.walk(root, followlinks=True):
        below.sort()
        place = os.path.relpath(folder, root)
        images = [name for name in names if extension_of(name) in IMAGES and not name.startswith(".")]
        texts = {name.rpartition(".")[0] for name in names if extension_of(name) in ("txt", "json")}
        if images and (place == "." or any(name.rpartition(".")[0] in texts for name in images)):
            return []  # images that belong to no class, or have captions
        files += [(place.split(os.sep)[0], os.path.join(place, name)) for name in images]
    return sorted(files)


def _of_classes(root: Path, files: list[tuple[str, str]], keys: tuple[str, ...]) -> Iterator[Picture]:
    for label, name in files:
        path = root / name
        yield Picture(str(path), partial(_load, path), (), dict.fromkeys(keys, label), name)


def _load(path: Path) -> Image.Image:
    return decode_rgb(read_small(path))


def _karpathy(path: Path, split: str) -> list[dict[str, Any]]:
    """The entries of one split. Raises DataError where the file is not of this kind, or has no such split."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["images"]
        found = [entry for entry in entries if entry["split"] == split]
        for entry in found:
            entry["captions"] = tuple(sentence["raw"] for sentence in entry["sentences"])
            entry["filename"] = os.path.join(entry.get("filepath", ""), entry["filename"])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        expected = '{"images": [{"filename", "split", "sentences": [{"raw"}]}]}'
        raise DataError(f"{path}: not a karpathy file; expected {expected}") from None
    if not found:
        splits = ", ".join(sorted({str(entry["split"]) for entry in entries})) or "none"
        raise DataError(f"{path}: has no split '{split}'; it has: {splits}")
    return found


def _of_karpathy(folder: Path, entries: list[dict[str, Any]]) -> Iterator[Picture]:
    for entry in entries:
        path = folder / entry["filename"]
        if not path.is_file():
            path = folder / Path(entry["filename"]).name  # all splits' images in one folder
        yield Picture(str(path), partial(_load, path), entry["captions"], {}, entry["filename"])


def _of_beton(beton: Beton, tokenizer: str) -> Iterator[Picture]:
    from .tokens import text_of

    width = 4 * beton.context
    with open(beton.path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        for row, key in enumerate(beton.keys()):
            name, record = f"{beton.path}: {key}", beton.metadata[row]
            image, size = record["image"], int(beton.image_sizes(np.array([row]))[0])
            data = beton.stored(content, int(image["data_ptr"]), size)
            place = record["captions"].tolist() if beton.several else (int(record["tokens"]), width)
            tokens = beton.stored(content, *place)
            if data is None or tokens is None or len(tokens) % width:
                yield Picture(name, partial(_refuse, "image or caption outside the file's data"), (), {})
                continue
            load = partial(_decode, data, int(image["mode"]), int(image["width"]), int(image["height"]))
            rows = np.frombuffer(tokens, "<i4").reshape(-1, beton.context)
            try:
                captions = tuple(text_of(row, tokenizer) for row in rows)
            except Rejected as rejected:
                yield Picture(name, partial(_refuse, str(rejected)), (), {})
                continue
            yield Picture(name, load, captions, {}, key)


def _decode(data: bytes, mode: int, width: int, height: int) -> Image.Image:
    if mode == MODE_JPEG:
        return decode_rgb(data)
    if len(data) != 3 * width * height:
        raise Rejected("image truncated or corrupt")
    return Image.fromarray(np.frombuffer(data, np.uint8).reshape(height, width, 3))


@dataclass
class LeftOut:
    """What could not be used, and why."""

    names: list[str] = field(default_factory=list)
    """The first of them, with the reason."""
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, reason: str) -> None:
        """One more."""
        self.reasons[reason] += 1
        if len(self.names) < NAMED:
            self.names.append(f"{name}: {reason}")

    def lines(self) -> list[str]:
        """A line for each that is named, and one for the rest."""
        rest = self.reasons.total() - len(self.names)
        return [f"left out: {name}" for name in self.names] + ([f"left out: {rest:,} more"] if rest else [])


def decoded(
    pictures: Iterable[Picture],
    transform: Callable[[Image.Image], T],
    workers: int | None,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[Picture, T]]:
    """Pictures with what `transform` makes of each, in order; threads decode ahead.

    Those that cannot be decoded go to `left_out`; without it, DataError names the first. workers: threads, None for one
    per processor core.
    """
    count = workers or len(os.sched_getaffinity(0))
    waiting: deque[tuple[Picture, Future[T]]] = deque()
    with ThreadPoolExecutor(count) as pool:
        for picture in pictures:
            waiting.append((picture, pool.submit(lambda p: transform(p.load()), picture)))
            if len(waiting) > 8 * count:
                yield from _finished(*waiting.popleft(), left_out)
        while waiting:
            yield from _finished(*waiting.popleft(), left_out)


def _finished(picture: Picture, future: Future[T], left_out: LeftOut | None) -> Iterator[tuple[Picture, T]]:
    try:
        yield picture, future.result()
    except Rejected as rejected:
        if left_out is None:
            raise DataError(f"{picture.name}: {rejected}") from None
        left_out.add(picture.name, str(rejected))
