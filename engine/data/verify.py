"""`harmony-fast prepare --verify`: every sample of a `.beton` file, looked at one by one."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image

from ..errors import DataError
from .beton import Beton, inside, open_beton
from .beton_format import MODE_JPEG
from .images import turbo_decodes
from .progress import Progress

SAMPLES_PER_TASK = 256
NAMED = 10
"""Damaged samples that the message names at most."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with one sample."""

    index: int
    key: str | None
    """None if the key itself cannot be read."""
    reason: str

    def __str__(self) -> str:
        return f"sample {self.index} (key {self.key!r}): {self.reason}"


def verify(path: str | Path, workers: int | None = None, progress: bool = True) -> int:
    """Check every sample of `path`: pointers, key, caption tokens, that the image decodes at its stated size, and that
    nothing has changed since it was written (where the file has checksums).

    workers: threads, by default one per core. progress: show a bar. Returns the number of samples. Raises DataError,
    naming the first damaged samples, where there are any, or where the file is not a `.beton`.
    """
    beton = open_beton(path)
    count = len(beton)
    firsts = range(0, count, SAMPLES_PER_TASK)
    faults: list[Fault] = []
    with (
        open(beton.path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        Progress(0, progress) as bar,
        ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool,
    ):
        bar.start("checking", count)
        checks = pool.map(lambda first: list(_faults(beton, content, first)), firsts)
        for first, found in zip(firsts, checks, strict=True):
            faults += found
            bar.done(min(first + SAMPLES_PER_TASK, count))
    if faults:
        named = "; ".join(map(str, faults[:NAMED])) + ("; ..." if len(faults) > NAMED else "")
        raise DataError(f"{beton.path}: {len(faults):,} of {count:,} samples are damaged: {named}; prepare it again")
    return count


def _faults(beton: Beton, content: mmap.mmap, first: int) -> Iterator[Fault]:
    rows = np.arange(first, min(first + SAMPLES_PER_TASK, len(beton)))
    metadata = beton.metadata[rows]
    sizes = beton.image_sizes(rows).tolist()
    checksums = beton.checksums[rows].tolist() if beton.checksums is not None else [0] * len(rows)
    for index, record, size, table, checksum in zip(
        rows.tolist(), metadata, sizes, beton.allocations[rows], checksums, strict=True
    ):
        key = _key(beton, content, record)
        fault = _fault(beton, content, record, size, table, checksum)
        if fault:
            yield Fault(index, key, fault)


def _key(beton: Beton, content: mmap.mmap, record: np.void) -> str | None:
    stored = beton.stored(content, *record["key"].tolist())
    try:
        return stored.decode() if stored else None
    except UnicodeDecodeError:
        return None


def _fault(
    beton: Beton, content: mmap.mmap, record: np.void, size: int, table: np.ndarray, checksum: int
) -> str | None:
    """What is wrong with a sample's tables, image or captions; None if nothing is."""
    if not inside(table, beton.data_end).all():
        return "its entry in the allocation table leads outside the file"
    image = record["image"]
    jpeg = beton.stored(content, int(image["data_ptr"]), size)
    if jpeg is None:
        return "its image lies outside the file's data"
    if not _decodes(jpeg, int(image["mode"]), int(image["width"]), int(image["height"])):
        return "its image cannot be decoded"
    found = [beton.stored(content, int(record["tokens"]), 4 * beton.context)]
    if beton.several:
        found.append(beton.stored(content, *record["captions"].tolist()))
    captions: list[bytes] = []
    for stored in found:
        if stored is None or len(stored) % (4 * beton.context):
            return "its caption lies outside the file's data"
        if not _are_captions(np.frombuffer(stored, "<i4").reshape(-1, beton.context)):
            return "its caption is not start, words, end, zeros"
        captions.append(stored)
    key = beton.stored(content, *record["key"].tolist())
    if key is None or _key(beton, content, record) is None:
        return "its key cannot be read"
    if beton.checksums is not None and crc32(b"".join([*captions[:1], key, *captions[1:]]), crc32(jpeg)) != checksum:
        return "its data have changed since they were written"
    return None


def _decodes(stored: bytes, mode: int, width: int, height: int) -> bool:
    if mode != MODE_JPEG:  # raw pixels
        return len(stored) == 3 * width * height
    try:
        size = Image.open(io.BytesIO(stored), formats=("JPEG",)).size
    except Exception:  # whatever a parser raises on damaged bytes means the same here
        return False
    return size == (width, height) and turbo_decodes(stored, width, height)


def _are_captions(tokens: np.ndarray) -> bool:
    """Whether every row of int32 [k, context] is a start id, words, the end id (the largest), zeros."""
    places = np.arange(tokens.shape[1])
    ends = tokens.argmax(1)
    after = places > ends[:, None]
    starts = tokens[:, 0] == tokens.max(1) - 1
    return bool((starts & (ends >= 1)).all() and (tokens >= 0).all() and not tokens[after].any())
