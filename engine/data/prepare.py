"""`harmony-fast prepare`: image-caption tars to one `.beton` file of checked, bounded JPEGs and token ids.

One task per tar runs in a pool of processes and leaves a finished part in `OUT.beton.parts/`; this process then lays
the parts end to end in source order. A run that was killed takes up the finished parts when it is started again, and
ends with the same bytes. A worker that dies breaks the pool, which is an error that names its tar, not a wait.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .beton import PAGE, BetonWriter, sync
from .parts import Part, PartFiles, Reject, Rules, check_rules
from .pool import read_shards
from .progress import Progress
from .sources import expand_sources


@dataclass
class Summary:
    """What a run of `prepare` did."""

    path: Path
    rejects_path: Path
    context: int
    written: int = 0
    """Samples in the file."""
    passed_through: int = 0
    """Of these, JPEGs whose bytes are the source's own; the others were encoded."""
    captions_cut: int = 0
    """Of these, captions of more than `context` tokens."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> samples (for a shard that broke off: shards)."""
    seconds: float = 0.0

    def __str__(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.path}: {self.written:,} samples, {_gigabytes(self.path.stat().st_size)}, in {self.seconds:.1f} s",
            f"  images: {self.passed_through:,} JPEGs as they were, {self.written - self.passed_through:,} encoded",
            f"  captions: {self.captions_cut:,} cut to {self.context} tokens",
            f"  left out: {self.left_out.total():,}" + (f" (listed in {self.rejects_path})" if self.left_out else ""),
        ]
        return "\n".join(lines + [f"    {count:>7,}  {reason}" for reason, count in self.left_out.most_common()])


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
    progress: bool = True,
) -> Summary:
    """Turn webdataset tars into the FFCV file `output`, and list what was left out in `x.rejects.jsonl` beside it.

    sources: tars, globs, brace ranges, folders of tars. context: tokens per caption. max_side, min_side: pixels; larger
    images are shrunk, smaller ones left out. quality: of JPEGs that have to be encoded. workers: processes, by default
    one per core. limit: the first so many usable samples only. progress: show a bar and print the summary.

    Keys are kept as they are: the same key in two shards is two samples, a second time in one shard is left out.
    Raises DataError (one line) if a source cannot be opened, no sample is usable, a worker dies, or the disk is full.
    """
    start = time.monotonic()
    output = Path(output)
    rules = Rules(context, max_side, min_side, quality, limit)
    check_rules(rules)
    shards = expand_sources(sources)
    folder = _parts_folder(output)
    with _disk_explained(output, shards), _locked(folder):
        files = [PartFiles(folder, shard, rules) for shard in shards]
        with Progress(sum(shard.stat().st_size for shard in shards), progress) as bar:
            counts = read_shards(files, workers or len(os.sched_getaffinity(0)), bar)
            chosen = _take(counts, limit)
            summary = _assemble(files[: len(chosen)], chosen, output, bar)
        shutil.rmtree(folder)
    summary.seconds = time.monotonic() - start
    if progress:
        print(summary)
    return summary


def rejects_path(output: Path) -> Path:
    """`x.rejects.jsonl` for `x.beton`."""
    return output.with_name(output.name.removesuffix(".beton") + ".rejects.jsonl")


def _parts_folder(output: Path) -> Path:
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name the file to write, such as {output / 'train.beton'}")
    folder = output.with_name(output.name + ".parts")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One run per output; the system drops the lock when a run ends, however it ends."""
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another `harmony-fast prepare` is at work on this output") from None
        yield


@contextmanager
def _disk_explained(output: Path, shards: list[Path]) -> Iterator[None]:
    """Errors of the disk in one line; a full one with the space needed: at the end, parts and file lie side by side."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{error.filename or output}: {error.strerror or error}") from error
        needed = 2 * sum(shard.stat().st_size for shard in shards)
        free = shutil.disk_usage(output.parent).free
        raise DataError(
            f"{output}: {error.strerror}; about {_gigabytes(needed)} are needed in all beside it, "
            f"{_gigabytes(free)} are free; finished shards are kept for the next run"
        ) from error


def _take(counts: list[int], limit: int | None) -> list[int]:
    """How many samples to take from each shard, in order, until the limit."""
    chosen: list[int] = []
    for count in counts:
        room = count if limit is None else min(count, limit - sum(chosen))
        if limit is not None and room == 0 and sum(chosen) == limit:
            break
        chosen.append(room)
    return chosen


def _assemble(files: list[PartFiles], chosen: list[int], output: Path, bar: Progress) -> Summary:
    """Write `output` and its list of rejects from the finished parts."""
    summary = Summary(output, rejects_path(output), files[0].rules.context, written=sum(chosen))
    temporary = summary.rejects_path.with_name(summary.rejects_path.name + ".tmp")
    largest = 0
    with open(temporary, "wb") as listing:
        for part_files, take in zip(files, chosen, strict=True):
            part = _load(part_files)
            largest = max(largest, part.largest(summary.context))
            for reject in part.rejects:
                if reject.after < take or take == len(part.rows):
                    summary.left_out[reject.reason] += 1
                    listing.write(_reject_line(part_files.shard, reject))
        sync(listing)
    os.replace(temporary, summary.rejects_path)
    if summary.written == 0:
        shutil.rmtree(files[0].folder)
        reason = "".join(f" ({reason}: {count:,})" for reason, count in summary.left_out.most_common(1))
        raise DataError(f"no sample in {_named(files)} is usable{reason}; see {summary.rejects_path}")
    _write_beton(files, chosen, summary, largest, bar)
    return summary


def _write_beton(files: list[PartFiles], chosen: list[int], summary: Summary, largest: int, bar: Progress) -> None:
    page = max(PAGE, 1 << (largest - 1).bit_length())
    bar.start_writing(summary.written)
    with BetonWriter(summary.path, summary.written, summary.context, page) as writer:
        for part_files, take in zip(files, chosen, strict=True):
            part = _load(part_files)
            del part.rows[take:]
            for row, image, tokens, key in part_files.samples(part):
                writer.write(image, row.width, row.height, tokens, key)
                summary.passed_through += row.passed_through
                summary.captions_cut += row.caption_cut
            bar.written(writer.written)


def _load(files: PartFiles) -> Part:
    part = files.load()
    if part is None:
        raise DataError(f"{files.shard}: changed while it was read; run the same command again")
    return part


def _reject_line(shard: Path, reject: Reject) -> bytes:
    return json.dumps({"shard": str(shard), "key": reject.key, "reason": reject.reason}).encode() + b"\n"


def _named(files: list[PartFiles]) -> str:
    return str(files[0].shard) if len(files) == 1 else f"{files[0].shard} and {len(files) - 1} more"


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
