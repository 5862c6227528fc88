"""FFCV's `.beton` format (version 2): a streaming writer and a checked opener.

    header | 3 field descriptors | metadata[N] | data region | allocation table[3N]

The fields of a sample are `image` (JPEG bytes), `tokens` (int32 [context]) and `key` (UTF-8 sample id). FFCV's own
`DatasetWriter` compresses images a second time and waits for ever when one of its workers dies; this one takes JPEG
bytes as they are, needs no workers, and writes the same bytes for the same samples. FFCV's stock `Reader` and `Loader`
read the file. The record types are written out here so that a file can be made or checked without importing FFCV, which
takes seconds; a test holds them against `ffcv.types`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import DataError

VERSION = 2
PAGE = 8 << 20
"""Smallest page, bytes. A page is what FFCV reads at once when a file does not fit in memory; no sample crosses one."""

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
KEY = np.dtype([("ptr", "<u8"), ("size", "<u8")])
METADATA = np.dtype([("image", IMAGE), ("tokens", "<u8"), ("key", KEY)], align=True)

FIELDS = {"image": 2, "tokens": 4, "key": 3}  # name -> FFCV's type id: RGBImageField, NDArrayField, BytesField
DATA_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
MODE_JPEG = 0
CHUNK = 1 << 14  # samples whose metadata is buffered by the writer, allocations whose bounds are checked at once


def descriptors(context: int) -> np.ndarray:
    """The field descriptors of a file whose captions are `context` tokens long: FIELD [3]."""
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS.items(), strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    dtype = json.dumps([["", "<i4"]]).encode()
    shape_and_length = np.zeros(33, "<u8")  # FFCV: 32 dimensions (0 = unused), then the length of the type's JSON
    shape_and_length[[0, 32]] = context, len(dtype)
    arguments = shape_and_length.tobytes() + dtype
    fields[1]["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return fields


class BetonWriter:
    """Writes `count` samples to `path`; the file appears there, whole and synced, or not at all.

    Used as a context manager. Samples go to `path` + ".tmp", which is renamed when the block ends; it is removed when
    the block ends in an exception. Memory does not grow with the number of samples.
    """

    def __init__(self, path: Path, count: int, context: int, page_size: int = PAGE) -> None:
        """page_size: bytes, a power of two below 2**32, at least the largest sample (image + tokens + key)."""
        if page_size & (page_size - 1) or not 0 < page_size < 1 << 32:
            raise ValueError(f"page size {page_size} is not a power of two below 2**32")
        self.path, self.count, self.context, self.page_size = Path(path), count, context, page_size
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.written = 0
        self._rows = np.zeros(CHUNK, METADATA)
        self._allocations = np.zeros((CHUNK, len(FIELDS)), ALLOCATION)
        self._end = DATA_START + count * METADATA.itemsize

    def __enter__(self) -> BetonWriter:
        self._file: BinaryIO = open(self.temporary, "wb", buffering=1 << 20)
        # The allocation table comes last in the file but grows with every sample: it waits in a nameless file.
        self._table: BinaryIO = tempfile.TemporaryFile(dir=self.path.parent)
        self._file.seek(self._end)
        return self

    def write(self, image: bytes | memoryview, width: int, height: int, tokens: np.ndarray, key: str) -> None:
        """Append one sample: JPEG bytes, their size in pixels, int32 [context] tokens, a key that is not empty."""
        name = key.encode()
        if tokens.dtype != np.int32 or tokens.shape != (self.context,) or not name or not len(image):
            raise ValueError(f"sample {key!r}: int32 tokens [{self.context}], an image and a key are needed")
        row, allocations = self._rows[self.written % CHUNK], self._allocations[self.written % CHUNK]
        start = self._place(len(image) + tokens.nbytes + len(name))
        starts = start, start + len(image), start + len(image) + tokens.nbytes
        row["image"] = MODE_JPEG, width, height, starts[0]
        row["tokens"] = starts[1]
        row["key"] = starts[2], len(name)
        allocations["sample_id"] = self.written
        allocations["ptr"] = starts
        allocations["size"] = len(image), tokens.nbytes, len(name)
        self._file.write(image)
        self._file.write(tokens.tobytes())
        self._file.write(name)
        self.written += 1
        if self.written % CHUNK == 0:
            self._flush(CHUNK)

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
        first = self.written - rows
        os.pwrite(self._file.fileno(), self._rows[:rows].tobytes(), DATA_START + first * METADATA.itemsize)
        self._table.write(self._allocations[:rows].tobytes())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.temporary.unlink(missing_ok=True)
            for file in (self._table, self._file):
                with suppress(OSError):  # a full disk is met again when buffers are flushed; it was reported already
                    file.close()

    def _finish(self) -> None:
        if self.written != self.count:
            raise ValueError(f"{self.written} samples written, {self.count} announced")
        self._flush(self.written % CHUNK)
        self._table.seek(0)
        shutil.copyfileobj(self._table, self._file, 1 << 20)
        header = np.array((VERSION, len(FIELDS), self.page_size, self.count, self._end), HEADER)
        self._file.seek(0)
        self._file.write(header.tobytes() + descriptors(self.context).tobytes())
        sync(self._file)
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)


def sync(file: BinaryIO) -> None:
    """Return only when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Beton:
    """A `.beton` whose structure was checked."""

    path: Path
    context: int
    """Tokens per caption."""
    page_size: int
    """Bytes."""
    metadata: np.memmap
    """METADATA [N], mapped, read-only."""

    def __len__(self) -> int:
        return len(self.metadata)

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
    """Open `path` and check its structure: kind, version, fields, length, and that all its pointers stay inside.

    Raises DataError (one line) if it is missing, not a beton, cut short, empty, or has other fields. Reads the header
    and the allocation table (72 bytes a sample), not the samples.
    """
    path = Path(path)
    with _unreadable_explained(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(DATA_START)
        header = _check_header(path, start, size)
        context = _check_fields(path, start[HEADER.itemsize :])
        count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        _check_allocations(path, np.memmap(path, ALLOCATION, "r", table, (count * len(FIELDS),)), table)
        metadata = np.memmap(path, METADATA, "r", DATA_START, (count,))
    return Beton(path, context, int(header["page_size"]), metadata)


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
    page = int(header["page_size"])
    if len(start) < HEADER.itemsize or header["version"] != VERSION or page < 1 << 12 or page & (page - 1):
        raise DataError(f"{path}: not an FFCV file of version {VERSION} (.beton); make one with `harmony-fast prepare`")
    if header["num_fields"] != len(FIELDS):
        raise DataError(f"{path}: has {header['num_fields']} fields, not {', '.join(FIELDS)}; prepare it again")
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    if count == 0:
        raise DataError(f"{path}: holds no sample")
    if table < DATA_START + count * METADATA.itemsize or size != table + count * len(FIELDS) * ALLOCATION.itemsize:
        raise DataError(f"{path}: cut short or damaged ({size} bytes do not fit its header); prepare it again")
    return header


def _check_fields(path: Path, stored: bytes) -> int:
    """The context length, after comparing the descriptors byte by byte with those of such a file."""
    fields = np.frombuffer(stored, FIELD)
    context = int(fields[1]["arguments"][:8].view("<u8")[0])
    if not 0 < context < 1 << 16 or descriptors(context).tobytes() != stored:
        names = ", ".join(bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in fields["name"])
        raise DataError(f"{path}: its fields ({names}) are not image (JPEG), tokens (int32), key; prepare it again")
    return context


def _check_allocations(path: Path, allocations: np.memmap, end: int) -> None:
    for first in range(0, len(allocations), CHUNK):
        chunk = np.asarray(allocations[first : first + CHUNK])
        # Compared this way round because ptr + size could wrap.
        inside = (chunk["ptr"] >= DATA_START) & (chunk["ptr"] <= end) & (chunk["size"] <= end - chunk["ptr"])
        if not inside.all():
            raise DataError(f"{path}: damaged, a sample lies outside the file; prepare it again")
