"""`harmony-fast prepare`: image-caption data to one `.beton` file of checked, bounded JPEGs and token ids.

Tars, folder trees and tables are cut into chunks. One task per chunk runs in a pool of processes and leaves a finished
part in `OUT.beton.parts/`; `assemble` then lays the parts end to end in source order. A run that was killed takes up
the finished parts when it is started again, and ends with the same bytes. A worker that dies breaks the pool, which is
an error that names its shard, not a wait.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk import alone_in
from ..errors import DataError
from .assemble import Summary, assemble, gigabytes
from .parts import PartFiles, Rules, check_rules
from .pool import read_chunks
from .progress import Progress
from .sources import find_chunks
from .tokens import CLIP
from .where import where as condition


def prepare(
    sources: str | Path | Iterable[str | Path],
    output: str | Path,
    *,
    context: int = 77,
    max_side: int = 512,
    min_side: int = 8,
    quality: int = 92,
    workers: int | None = None,
    limit: int | None = None,
    tokenizer: str = CLIP,
    captions: str = "one",
    dedup: bool = False,
    where: str | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    progress: bool = True,
) -> Summary:
    """Turn image-caption data into the FFCV file `output`, and list what was left out in `x.rejects.jsonl` beside it.

    sources: tars, globs, brace ranges, folders of tars; folder trees of images with `.txt` or `.json` beside each; CSV,
    TSV and parquet tables. context: tokens per caption. max_side, min_side: pixels; larger images are shrunk, smaller
    ones left out. quality: of JPEGs that have to be encoded. workers: processes, by default one per core. limit: the
    first so many usable samples only. tokenizer: see `tokens.tokenizer_options`. captions: of an image that has
    several, keep the first, or all, of which training draws one in each epoch (then a line of a `.txt` is a caption).
    dedup: leave out images whose file equals an earlier one's. where: condition on the metadata (see `where`).
    image_column, caption_columns: of tables, where their names are not usual ones. progress: show a bar and print the
    summary.

    Keys are kept as they are: the same key in two shards is two samples, a second time in one shard is left out.
    Raises DataError (one line) if a source cannot be opened, no sample is usable, a worker dies, or the disk is full.
    """
    start = time.monotonic()
    output = Path(output)
    if captions not in ("one", "all"):
        raise DataError(f"captions = {captions!r}: must be 'one' or 'all'")
    rules = Rules(context, max_side, min_side, quality, limit, tokenizer, captions == "all", dedup, where)
    check_rules(rules)
    workers = workers or len(os.sched_getaffinity(0))
    columns = condition(where).names if where else frozenset[str]()
    chunks = find_chunks(sources, workers, columns, image_column, caption_columns)
    folder = _parts_folder(output)
    files = [PartFiles(folder, chunk, rules) for chunk in chunks]
    with _disk_explained(output, lambda: _needed(files)), alone_in(folder):
        with Progress(sum(chunk.size for chunk in chunks), progress) as bar:
            read = read_chunks(files, workers, bar)
            summary = assemble(files[:read], output, rejects_path(output), bar)
        shutil.rmtree(folder)
    summary.seconds = time.monotonic() - start
    if progress:
        print(summary)
    return summary


def rejects_path(output: Path) -> Path:
    """`x.rejects.jsonl` for `x.beton`."""
    return output.with_name(output.name.removesuffix(".beton") + ".rejects.jsonl")


def _parts(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _parts_folder(output: Path) -> Path:
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name the file to write, such as {output / 'train.beton'}")
    folder = _parts(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


@contextmanager
def _disk_explained(output: Path, needed: Callable[[], int]) -> Iterator[None]:
    """Errors of the disk in one line; a full one with the space needed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{error.filename or output}: {error.strerror or error}") from error
        there = sum(path.stat().st_size for path in _parts(output).iterdir())
        free = shutil.disk_usage(output.parent).free
        raise DataError(
            f"{output}: {error.strerror}; about {gigabytes(needed())} are needed beside it in all, of which "
            f"{gigabytes(there)} are there and {gigabytes(free)} are free; what is finished is kept for the next run"
        ) from error


def _needed(files: list[PartFiles]) -> int:
    """Bytes of the parts and the file, which lie side by side at the end; from the finished parts, where there are."""
    read = written = 0
    for part in files:
        with suppress(OSError):
            written += part.data.stat().st_size + part.index.stat().st_size
            read += part.chunk.size
    total = sum(part.chunk.size for part in files)
    return 2 * (total * written // read if read else total)
