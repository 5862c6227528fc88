"""FFCV's `.beton` files (see `beton_format`): a streaming writer and a checked opener.

FFCV's own `DatasetWriter` compresses images a second time and waits for ever when one of its workers dies; this one
takes JPEG bytes as they are, needs no workers, and writes the same bytes for the same samples. FFCV's stock `Reader`
and `Loader` read the file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np

from ..disk import sync, sync_path
from ..errors import DataError
from .beton_format import (
    ALLOCATION,
    DATA_START,
    FIELD,
    FIELDS,
    FIELDS_SEVERAL,
    HEADER,
    METADATA,
    METADATA_SEVERAL,
    MODE_JPEG,
    PAGE,
    VERSION,
    data_start,
    descriptors,
)  # fmt: skip

CHUNK = 1 << 14  # samples whose metadata is buffered by the writer, allocations that are checked at once
PROBES = 256  # samples whose allocations are checked when a file is opened


class BetonWriter:
    """Writes `count` samples to `path`; the file appears there, whole and synced, or not at all.

    Used as a context manager. Samples go to `path` + ".tmp", which is renamed when the block ends; it is removed when
    the block ends in an exception. Memory does not grow with the number of samples.
    """

    def __init__(self, path: Path, count: int, context: int, page_size: int = PAGE, several: bool = False) -> None:
        """page_size: bytes, a power of two below 2**32, at least the largest sample (image + tokens + key).

        several: samples have one or more captions, all of which are kept.
        """
        if page_size & (page_size - 1) or not 0 < page_size < 1 << 32:
            raise ValueError(f"page size {page_size} is not a power of two below 2**32")
        self.path, self.count, self.context, self.page_size = Path(path), count, context, page_size
        self.several = several
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.written = 0
        fields = len(FIELDS_SEVERAL if several else FIELDS)
        self._rows = np.zeros(CHUNK, METADATA_SEVERAL if several else METADATA)
        self._allocations = np.zeros((CHUNK, fields), ALLOCATION)
        self._start = data_start(fields)
        self._end = self._start + count * self._rows.itemsize

    def __enter__(self) -> BetonWriter:
        # Checksums and table come last in the file but grow with every sample: they wait in nameless files.
        self._table: BinaryIO = tempfile.TemporaryFile(dir=self.path.parent)
        self._checksums: BinaryIO = tempfile.TemporaryFile(dir=self.path.parent)
        self._file: BinaryIO = open(self.temporary, "wb", buffering=1 << 20)
        self._file.seek(self._end)
        return self

    def write(self, image: bytes | memoryview, width: int, height: int, tokens: np.ndarray, key: str) -> None:
        """Append one sample: JPEG bytes, their size in pixels, a key that is not empty, and tokens.

        tokens: int32 [context], or with several captions [k, context], k >= 1.
        """
        name = key.encode()
        shape = tokens.shape[1:] if self.several and len(tokens) else tokens.shape
        if tokens.dtype != np.int32 or shape != (self.context,) or not name or not len(image):
            raise ValueError(f"sample {key!r}: int32 tokens [{self.context}], an image and a key are needed")
        first = tokens[0] if self.several else tokens
        pieces = [image, first.tobytes(), name, *([tokens.tobytes()] if self.several else [])]
        self._note(width, height, [len(piece) for piece in pieces])
        checksum = 0
        for piece in pieces:
            self._file.write(piece)
            checksum = crc32(piece, checksum)
        self._checksums.write(checksum.to_bytes(4, "little"))
        self.written += 1
        if self.written % CHUNK == 0:
            self._flush(CHUNK)

    def _note(self, width: int, height: int, sizes: list[int]) -> None:
        """Find a place for the next sample's pieces, and enter it in the metadata and the allocation table."""
        row, allocations = self._rows[self.written % CHUNK], self._allocations[self.written % CHUNK]
        start = self._place(sum(sizes))
        starts = [start + sum(sizes[:i]) for i in range(len(sizes))]
        row["image"] = MODE_JPEG, width, height, starts[0]
        row["tokens"] = starts[1]
        row["key"] = starts[2], sizes[2]
        if self.several:
            row["captions"] = starts[3], sizes[3]
        allocations["sample_id"] = self.written
        allocations["ptr"] = starts
        allocations["size"] = sizes

    def _place(self, size: int) -> int:
        """Where the next sample starts: here, or on the next page if it would cross into it."""
        if size > self.page_size:
            raise ValueError(f"a sample of {size} bytes does not fit a page of {self.page_size}")
        if self._end // self.page_size != (self._end + size - 1) // self.page_size:
            self._end += -self._end % self.page_size
            self._file.seek(self._end)
        start, self._end = self._end, self._end + size
        return start

    def _flush(self, rows: int) -> None:
        """Metadata and allocations of the last `rows` samples, into the files."""
        self._file.seek(self._start + (self.written - rows) * self._rows.itemsize)
        self._file.write(self._rows[:rows].tobytes())
        self._file.seek(self._end)
        self._table.write(self._allocations[:rows].tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.temporary.unlink(missing_ok=True)
            for file in (self._checksums, self._table, self._file):
                with suppress(OSError):  # a full disk is met again when buffers are flushed; it was reported already
                    file.close()

    def _finish(self) -> None:
        if self.written != self.count:
            raise ValueError(f"{self.written} samples written, {self.count} announced")
        self._flush(self.written % CHUNK)
        checksums = self._end + -self._end % 8
        self._file.seek(checksums)
        for waiting in (self._checksums, self._table):
            waiting.seek(0)
            shutil.copyfileobj(waiting, self._file, 1 << 20)
        fields = descriptors(self.context, self.several, checksums)
        header = np.array((VERSION, len(fields), self.page_size, self.count, checksums + 4 * self.count), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + fields.tobytes())
        sync(self._file)
        os.replace(self.temporary, self.path)
        sync_path(self.path.parent)


@dataclass(frozen=True)
class Beton:
    """A `.beton` whose structure was checked. Opening takes the same time for any number of samples."""

    path: Path
    context: int
    """Tokens per caption."""
    page_size: int
    """Bytes."""
    data_end: int
    """Byte before which all samples' data lie."""
    checksums: np.memmap | None
    """uint32 [N], mapped, read-only: CRC-32 of image, tokens, key and captions of each; None where there are none."""
    metadata: np.memmap
    """METADATA or METADATA_SEVERAL [N], mapped, read-only."""
    allocations: np.memmap
    """ALLOCATION [N, fields], mapped, read-only; rows in the samples' order unless `sorted_images` is set."""
    sorted_images: np.ndarray | None = None
    """ALLOCATION [N * fields] by pointer, of a file whose table is in another order (FFCV's own writer)."""

    def __len__(self) -> int:
        return len(self.metadata)

    @property
    def several(self) -> bool:
        """Whether samples have one or more captions each."""
        return self.metadata.dtype == METADATA_SEVERAL

    def image_sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of the images of samples `rows` (int64 [B]): int64 [B]; 0 where the file's tables disagree."""
        starts = self.metadata["image"]["data_ptr"][rows]
        if self.sorted_images is None:
            found = self.allocations[rows, 0]
        else:
            place = np.searchsorted(self.sorted_images["ptr"], starts)
            found = self.sorted_images[np.minimum(place, len(self.sorted_images) - 1)]
        sizes = found["size"]
        good = (found["ptr"] == starts) & (starts <= self.data_end) & (sizes <= self.data_end - starts)
        return np.where(good, sizes, 0).astype(np.int64)

    def stored(self, content: mmap, start: int, size: int) -> bytes | None:
        """What the mapped file holds at a pointer; None where that is nothing, or outside the samples' data."""
        good = inside(np.array((0, start, size), ALLOCATION), self.data_end) and size > 0
        return content[start : start + size] if good else None

    def keys(self, indices: Iterable[int] | None = None) -> list[str]:
        """Sample ids of `indices` (all by default), reading only those.

        Raises IndexError for an index outside the file, DataError where the file's pointers lead nowhere.
        """
        with open(self.path, "rb") as file:
            return [self._key(file, index) for index in (range(len(self)) if indices is None else indices)]

    def _key(self, file: BinaryIO, index: int) -> str:
        ptr, size = self.metadata[index]["key"].tolist()
        if ptr + size > os.fstat(file.fileno()).st_size:
            raise DataError(f"{self.path}: damaged, the key of sample {index} lies outside the file; prepare it again")
        file.seek(ptr)
        try:
            return file.read(size).decode()
        except UnicodeDecodeError:
            raise DataError(f"{self.path}: damaged, the key of sample {index} is not text; prepare it again") from None


def open_beton(path: str | Path) -> Beton:
    """Open `path` and check its structure: kind, version, fields, length, and some of its pointers.

    Raises DataError (one line) if it is missing, not a beton, cut short, empty, or has other fields. Reads the header
    and a few pages of the tables, whatever the number of samples; whoever uses a sample checks its pointers, and
    `verify.verify` checks everything.
    """
    path = Path(path)
    with _unreadable_explained(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(data_start(len(FIELDS_SEVERAL)))
        header = _check_header(path, start, size)
        fields = int(header["num_fields"])
        context, checked = _check_fields(path, start[HEADER.itemsize : data_start(fields)])
        count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        if checked and checked != table - 4 * count:
            raise DataError(f"{path}: damaged, its checksums are not where they should be; prepare it again")
        checksums = np.memmap(path, "<u4", "r", checked, (count,)) if checked else None
        allocations = np.memmap(path, ALLOCATION, "r", table, (count, fields))
        metadata = np.memmap(path, _metadata_type(fields), "r", data_start(fields), (count,))
    end = checked or table
    by_pointer = None
    if not _check_allocations(path, allocations, metadata, end):
        by_pointer = np.sort(allocations.reshape(-1), order="ptr")
    return Beton(path, context, int(header["page_size"]), end, checksums, metadata, allocations, by_pointer)


def _metadata_type(fields: int) -> np.dtype:
    return METADATA if fields == len(FIELDS) else METADATA_SEVERAL


@contextmanager
def _unreadable_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make it with `harmony-fast prepare`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_header(path: Path, start: bytes, size: int) -> np.void:
    header = np.frombuffer(start[: HEADER.itemsize].ljust(HEADER.itemsize, b"\0"), HEADER)[0]
    page, fields = int(header["page_size"]), int(header["num_fields"])
    if len(start) < HEADER.itemsize or header["version"] != VERSION or page < 1 << 12 or page & (page - 1):
        raise DataError(f"{path}: not an FFCV file of version {VERSION} (.beton); make one with `harmony-fast prepare`")
    if fields not in (len(FIELDS), len(FIELDS_SEVERAL)):
        raise DataError(f"{path}: has {fields} fields, not {', '.join(FIELDS)}; prepare it again")
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if count == 0:
        raise DataError(f"{path}: holds no sample")
    end = data_start(fields) + count * _metadata_type(fields).itemsize
    if table < end or size != table + count * fields * ALLOCATION.itemsize:
        raise DataError(f"{path}: cut short or damaged ({size} bytes do not fit its header); prepare it again")
    return header


def _check_fields(path: Path, stored: bytes) -> tuple[int, int]:
    """Context length and place of the checksums, after comparing the descriptors byte by byte with those of such a
    file."""
    fields = np.frombuffer(stored, FIELD)
    checksums = int(fields[0]["arguments"][:8].view("<u8")[0])
    context = int(fields[1]["arguments"][:8].view("<u8")[0])
    several = len(fields) == len(FIELDS_SEVERAL)
    if not 0 < context < 1 << 16 or descriptors(context, several, checksums).tobytes() != stored:
        names = ", ".join(bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"])
        raise DataError(f"{path}: its fields ({names}) are not image (JPEG), tokens (int32), key; prepare it again")
    return context, checksums


def _check_allocations(path: Path, allocations: np.memmap, metadata: np.memmap, end: int) -> bool:
    """Whether the table is in the samples' order, as far as the probes tell. Raises DataError at one outside."""
    rows = np.unique(np.linspace(0, len(allocations) - 1, PROBES).astype(np.int64))
    probes = np.asarray(allocations[rows])
    if not inside(probes, end).all():
        raise DataError(f"{path}: damaged, a sample lies outside the file; prepare it again")
    pointers = metadata["image"]["data_ptr"][rows], metadata["tokens"][rows]
    in_order = (probes["ptr"][:, 0] == pointers[0]) & (probes["ptr"][:, 1] == pointers[1])
    return bool(in_order.mean() > 0.5)  # not all: a damaged entry says nothing about the others


def inside(allocations: np.ndarray, end: int) -> np.ndarray:
    """Whether each entry of an allocation table, ALLOCATION [...], lies between the header and byte `end`: bool."""
    # Compared this way round because ptr + size could wrap.
    ptr, size = allocations["ptr"], allocations["size"]
    return (ptr >= DATA_START) & (ptr <= end) & (size <= end - np.minimum(ptr, end))
