"""Tables of image-caption pairs: CSV, TSV or parquet with a column of image paths and one or more of captions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .samples import RowSample
from .tars import without_ending

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

TABLES = (".csv", ".tsv", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "image_name", "url")
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "description", "comment")
NUMBERED = re.compile(r"(caption|text)[ _-]?\d+")
ROWS_PER_CHUNK = 512
PARQUET_ROWS_PER_CHUNK = 8192
"""More, because reading any row of a parquet file means reading its row group."""
csv.field_size_limit(1 << 24)  # a caption of more than the default 128 KiB is no reason to stop


@dataclass(frozen=True)
class TableChunk:
    """Some rows of a table."""

    path: Path
    columns: tuple[str, ...]
    """All columns of the table."""
    image: str
    captions: tuple[str, ...]
    first: int
    """CSV, TSV: byte at which the first row begins. Parquet: first row in the row group."""
    stop: int
    """Byte, or row, after the last."""
    group: int
    """Row group of a parquet file."""
    row: int
    """Number of the first row in the table, from 0."""
    size: int
    """Its share of the table's bytes."""

    @property
    def name(self) -> str:
        """What messages and the list of rejects call it."""
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        """What its samples depend on (the images it names are taken not to change)."""
        state = self.path.stat()
        place = [self.group, self.first, self.stop, self.image, *self.captions]
        return {"table": str(self.path.resolve()), "bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "part": place}

    def read(self, progress: Callable[[int], None]) -> Iterator[RowSample]:
        """The samples. progress: told how many bytes of `size` are done, after every row."""
        rows = _parquet_rows(self) if is_parquet(self.path) else _text_rows(self)
        sample: RowSample | None = None
        before: Any = None
        for number, (done, row) in enumerate(rows):
            progress(int(done * self.size))
            value = row.get(self.image)
            texts = [row.get(column) for column in self.captions]
            if sample is not None and value == before and _names(value):
                sample.texts += texts
                continue
            if sample is not None:
                yield sample
            sample, before = _sample(self, value, texts, row, self.row + number), value
        if sample is not None:
            yield sample


def is_table(path: Path) -> bool:
    """Whether the name is that of a table."""
    return path.suffix.lower() in TABLES


def is_parquet(path: Path) -> bool:
    """Whether the name is that of a parquet file."""
    return path.suffix.lower() == ".parquet"


def table_chunks(path: Path, image: str | None, captions: Sequence[str]) -> list[TableChunk]:
    """The rows of a table in chunks; rows in succession that name the same image stay together.

    image, captions: columns; None or empty for those with a usual name. Raises DataError where the table cannot be
    read or has no such columns.
    """
    try:
        if is_parquet(path):
            return _parquet_chunks(path, image, captions)
        return _text_chunks(path, image, captions)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def choose_columns(
    path: Path, columns: Sequence[str], image: str | None, captions: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """The column of image paths and those of captions: the given ones, or those with a usual name. Raises DataError."""
    for name in filter(None, (image, *captions)):
        if name not in columns:
            raise DataError(f"{path}: has no column {name!r}; it has: {', '.join(map(str, columns))}")
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    found = image or next((by_name[name] for name in IMAGE_COLUMNS if name in by_name), None)
    if found is None:
        raise DataError(f"{path}: which column is the image? give --image-column; it has: {', '.join(columns)}")
    if captions:
        return found, tuple(captions)
    usual = next((by_name[name] for name in CAPTION_COLUMNS if name in by_name and by_name[name] != found), None)
    numbered = [column for column in columns if NUMBERED.fullmatch(column.strip().lower())]
    if usual is None and not numbered:
        raise DataError(f"{path}: which column is the caption? give --caption-column; it has: {', '.join(columns)}")
    return found, tuple(filter(None, (usual, *numbered)))


def _names(value: Any) -> bool:
    """Whether the image column holds a name, so that equal values mean the same image."""
    return isinstance(value, str) and bool(value)


def _sample(chunk: TableChunk, value: Any, texts: list[Any], row: dict[str, Any], number: int) -> RowSample:
    if isinstance(value, dict):  # as Hugging Face's datasets store images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return RowSample(f"{number:09d}", value, texts, row)
    if not _names(value):
        return RowSample(f"{number:09d}", None, texts, row)
    if re.match(r"(https?|s3)://", value):
        raise DataError(
            f"{chunk.path}: column {chunk.image!r} holds web addresses ({value[:60]}); download the images with "
            "img2dataset first and prepare the tars it writes"
        )
    return RowSample(value, chunk.path.parent / value, texts, row)


# CSV and TSV


def _text_chunks(path: Path, image: str | None, captions: Sequence[str]) -> list[TableChunk]:
    counter = _LineCounter(path)
    records = _records(path, counter)
    columns = tuple(next(records, ()))
    if not columns:
        raise DataError(f"{path}: empty; the first line must name the columns")
    image, chosen = choose_columns(path, columns, image, captions)
    place, chunks, start, first_row, row, before = columns.index(image), [], counter.bytes, 0, 0, None

    def cut(end: int) -> None:
        chunks.append(TableChunk(path, columns, image, chosen, start, end, 0, first_row, end - start))

    end = start
    for record in records:
        value = record[place] if place < len(record) else None
        if row - first_row >= ROWS_PER_CHUNK and value != before:
            cut(end)
            start, first_row = end, row
        before, end, row = value, counter.bytes, row + 1
    if row > first_row:
        cut(end)
    return chunks


class _LineCounter:
    """The lines of a file as text, and the bytes of all that were taken."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes = path, 0

    def __iter__(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for line in file:
                text = line.decode("utf-8-sig" if self.bytes == 0 else "utf-8", "surrogateescape")
                self.bytes += len(line)
                yield text


def _records(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; is a quotation mark left open?") from None


def _text_rows(chunk: TableChunk) -> Iterator[tuple[float, dict[str, Any]]]:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.first)
        text = file.read(chunk.stop - chunk.first).decode("utf-8", "surrogateescape")
    records = list(_records(chunk.path, io.StringIO(text, newline="")))
    for number, record in enumerate(records):
        if record:  # an empty line is no row
            yield (number + 1) / len(records), dict(zip(chunk.columns, record, strict=False))


# Parquet


@contextmanager
def _parquet(path: Path) -> Iterator[ParquetFile]:
    """An open parquet file. Raises DataError where opening it, or reading in the block, finds it damaged; OSError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile  # a large library: only those with parquet files pay for it

    try:
        with ParquetFile(path) as file:
            yield file
    except (ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # of the disk; damaged pages are an OSError without a number
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a parquet file, or damaged: {reason}") from None


def _parquet_chunks(path: Path, image: str | None, captions: Sequence[str]) -> list[TableChunk]:
    with _parquet(path) as file:
        columns = tuple(file.schema_arrow.names)
        image, chosen = choose_columns(path, columns, image, captions)
        chunks, before = [], 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            names = file.read_row_group(group, [image]).column(0) if rows > PARQUET_ROWS_PER_CHUNK else []
            start = 0
            while start < rows:
                stop = min(start + PARQUET_ROWS_PER_CHUNK, rows)
                while stop < rows and _names(names[stop].as_py()) and names[stop].as_py() == names[stop - 1].as_py():
                    stop += 1
                size = path.stat().st_size * (stop - start) // file.metadata.num_rows
                chunks.append(TableChunk(path, columns, image, chosen, start, stop, group, before + start, size))
                start = stop
            before += rows
        return chunks


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int) -> Table:
    """The row group read last: a worker's next chunk is often of the same."""
    with _parquet(path) as file:
        return file.read_row_group(group)


def _parquet_rows(chunk: TableChunk) -> Iterator[tuple[float, dict[str, Any]]]:
    rows = chunk.stop - chunk.first
    table = _row_group(chunk.path, chunk.group).slice(chunk.first, rows)
    done = 0
    for batch in table.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            done += 1
            yield done / rows, row


def side_table(path: Path, columns: Iterable[str]) -> dict[str, dict[str, Any]]:
    """img2dataset's table beside a tar, by the samples' keys: those of `columns` that it has; empty without a table."""
    beside = beside_tar(path)
    if not beside.is_file():
        return {}
    with _parquet(beside) as file:
        wanted = [name for name in file.schema_arrow.names if name in columns]
        if "key" not in file.schema_arrow.names or not wanted:
            return {}
        rows = file.read(["key", *(name for name in wanted if name != "key")]).to_pylist()
    return {str(row["key"]): row for row in rows}


def beside_tar(path: Path) -> Path:
    """Where img2dataset puts the table of a tar."""
    return path.with_name(without_ending(path.name) + ".parquet")
