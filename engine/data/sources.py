"""What `prepare` can read: which tars, folders and tables the user's words name, cut into chunks of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Protocol

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # the stubs lack the error

from ..errors import DataError
from ..shipped import shipped_data
from .folders import NOT_SAMPLES, folder_chunks
from .images import Rejected
from .samples import Sample
from .tables import beside_tar, is_table, side_table, table_chunks
from .tars import TARS, open_tar, pieces, read_shard

PIECE = 16 << 20
"""Bytes of the pieces into which tars are cut where there are too few to keep all workers busy."""


class Chunk(Protocol):
    """One task of `prepare`: samples that one worker reads, one after the other. Chunks are pickled to get there."""

    @property
    def size(self) -> int:
        """A measure of its work, bytes."""

    @property
    def name(self) -> str:
        """What messages and the list of rejects call it."""

    def identity(self) -> dict[str, Any]:
        """What its samples depend on, as JSON can hold it: while it is the same, the work is not done again."""

    def read(self, progress: Callable[[int], None]) -> Iterator[Sample]:
        """The samples, in order; told how far of `size`. Raises ShardDamaged where they break off, DataError."""


@dataclass(frozen=True)
class TarChunk:
    """A tar, or a piece of a large one."""

    path: Path
    size: int
    """Bytes."""
    first: int = 0
    """Byte at which it begins."""
    stop: int | None = None
    """Byte after its last; None: the end of the tar."""
    again: frozenset[str] = frozenset()
    """Keys in it that an earlier piece of the tar has as well."""
    columns: frozenset[str] = frozenset()
    """Metadata to look for in the parquet file beside it, where the samples' own lack it."""

    @property
    def name(self) -> str:
        """What messages and the list of rejects call it."""
        return str(self.path)

    def identity(self) -> dict[str, Any]:
        """Path, size and time of change of the tar (and of its table, where it is used); which piece."""
        files = [self.path, *([beside_tar(self.path)] if self.columns and beside_tar(self.path).exists() else [])]
        states = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return {"files": states, "piece": [self.first, self.stop]}

    def read(self, progress: Callable[[int], None]) -> Iterator[Sample]:
        """The samples. One whose key was seen before in the tar gives no image."""
        table = side_table(self.path, self.columns) if self.columns else {}
        seen = set(self.again)
        for sample in read_shard(self.path, lambda place: progress(place - self.first), self.first, self.stop):
            if sample.key in seen:
                sample.failure = Rejected("key seen before in this shard")
            seen.add(sample.key)
            sample.beside = table.get(sample.key, {})
            yield sample


def find_chunks(
    sources: str | Path | Iterable[str | Path],
    workers: int,
    columns: frozenset[str] = frozenset(),
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
) -> list[Chunk]:
    """The work that `sources` name, in order, each file once: tars, tables, folders of tars, folder trees of images.

    columns: metadata that a condition needs. image_column, caption_columns: of tables; by default those with a usual
    name. Raises DataError where a source names nothing, or something that cannot be read: known now rather than hours
    into the work.
    """
    paths = _distinct_paths(sources)
    tars = [path for path in paths if not path.is_dir() and not is_table(path)]
    size = PIECE if len(tars) < 4 * workers else None
    chunks: list[Chunk] = []
    for path in paths:
        if path.is_dir():
            chunks += folder_chunks(path)
        elif is_table(path):
            chunks += table_chunks(path, image_column, caption_columns)
        else:
            chunks += _tar_chunks(path, size, columns)
    if not chunks:
        raise DataError(f"{', '.join(map(str, paths)) or 'no source given'}: nothing to read")
    return chunks


def _tar_chunks(path: Path, size: int | None, columns: frozenset[str]) -> list[TarChunk]:
    with open_tar(path):
        pass
    total = path.stat().st_size
    cuts = pieces(path, size) if size else [(0, None, frozenset())]
    return [TarChunk(path, (stop or total) - start, start, stop, again, columns) for start, stop, again in cuts]


def expand_sources(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tars that `sources` name, each once: paths, folders of tars, globs, brace ranges (`{00000..00331}.tar`).

    A folder's or glob's tars come sorted by name. Raises DataError where a source names nothing, or something that is
    not a readable tar.
    """
    shards = _distinct_paths(sources)
    if not shards:
        raise DataError("no source given: name tars, globs of tars, or folders of tars")
    for shard in shards:
        if shard.is_dir():
            raise DataError(f"{shard}: no tar in this folder")
        with open_tar(shard):
            pass
    return shards


def _distinct_paths(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Files, and folders without a tar, that the sources name, each once, in order. Raises DataError."""
    listed = [sources] if isinstance(sources, str | Path) else sources
    try:
        found = {path.resolve(): path for source in listed for path in _expand(str(source))}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return list(found.values())


def _expand(source: str) -> Iterator[Path]:
    """The files that a source names; for a folder its tars, or the folder itself where it holds none."""
    path = shipped_data(Path(source))
    if path.is_dir():
        yield from _tars_in(path)
    elif path.exists():
        yield path
    else:
        for pattern in braces(source):
            matches = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else [pattern]
            if not matches:
                raise DataError(f"{pattern}: no file matches")
            for match in map(Path, matches):
                if match.is_dir():
                    yield from _tars_in(match)
                elif not (has_magic(pattern) and _is_beside_a_tar(match)):
                    yield match


def _tars_in(folder: Path) -> list[Path]:
    tars = sorted(path for path in folder.iterdir() if path.name.endswith(TARS) and path.is_file())
    return tars or [folder]


def _is_beside_a_tar(path: Path) -> bool:
    """img2dataset's own files: `00000.parquet` and `00000_stats.json` of `00000.tar`."""
    if path.name.endswith(NOT_SAMPLES):
        return True
    return path.suffix == ".parquet" and any(path.with_suffix(ending).is_file() for ending in TARS)


def braces(source: str) -> list[str]:
    """`{0..2}.tar` as three names; a source without such a range as it is."""
    try:
        return list(braceexpand(source))
    except UnbalancedBracesError:
        return [source]
