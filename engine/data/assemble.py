"""The end of `prepare`: finished parts to one `.beton`, its list of rejects, and a summary."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..disk import sync
from ..errors import DataError
from .beton import PAGE, BetonWriter
from .parts import DIGEST_BYTES, DUPLICATE, Part, PartFiles, Reject
from .progress import Progress


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
    captions: int = 0
    """Captions in the file."""
    captions_cut: int = 0
    """Of these, captions of more than `context` tokens."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> samples (for a shard that broke off: shards)."""
    seconds: float = 0.0

    def __str__(self) -> str:
        """A few lines for the terminal."""
        rate = self.written / max(self.seconds, 1e-9)
        several = f"{self.captions:,}, " if self.captions > self.written else ""
        lines = [
            f"{self.path}: {self.written:,} samples, {gigabytes(self.path.stat().st_size)}, in {self.seconds:.1f} s"
            f" ({rate:,.0f} images/s)",
            f"  images: {self.passed_through:,} JPEGs as they were, {self.written - self.passed_through:,} encoded",
            f"  captions: {several}{self.captions_cut:,} cut to {self.context} tokens",
            f"  left out: {self.left_out.total():,}" + (f" (listed in {self.rejects_path})" if self.left_out else ""),
        ]
        return "\n".join(lines + [f"    {count:>7,}  {reason}" for reason, count in self.left_out.most_common()])


@dataclass
class Choice:
    """What the file takes of one part."""

    files: PartFiles
    stop: int | None
    """Rows from this one on, and what was left out after it, are beyond the limit; None: all are within."""
    duplicates: np.ndarray
    """int64: rows before it whose image an earlier part has."""


def assemble(files: list[PartFiles], output: Path, rejects_path: Path, bar: Progress) -> Summary:
    """Write `output` and its list of rejects from the finished parts. Raises DataError where there is no sample."""
    rules = files[0].rules
    summary = Summary(output, rejects_path, rules.context)
    choices = list(_choose(files))
    temporary = rejects_path.with_name(rejects_path.name + ".tmp")
    largest, repeated = 0, 4 * rules.context * rules.several  # the first of several captions is in the file twice
    with open(temporary, "wb") as listing:
        for choice in choices:
            part = _load(choice.files)
            largest = max([largest, *(row.bytes(summary.context) + repeated for row in part.rows)])
            for reject in _rejects(choice, part):
                summary.left_out[reject.reason] += 1
                line = {"shard": choice.files.chunk.name, "key": reject.key, "reason": reject.reason}
                listing.write(json.dumps(line).encode() + b"\n")
            summary.written += len(part.rows[: choice.stop]) - len(choice.duplicates)
        sync(listing)
    os.replace(temporary, rejects_path)
    if summary.written == 0:
        shutil.rmtree(files[0].folder)
        reason = "".join(f" ({reason}: {count:,})" for reason, count in summary.left_out.most_common(1))
        raise DataError(f"no sample in {_named(files)} is usable{reason}; see {rejects_path}")
    _write_beton(choices, summary, largest, bar)
    return summary


def _choose(files: list[PartFiles]) -> Iterator[Choice]:
    """What to take of each part, in order, until the limit."""
    rules = files[0].rules
    parts_rows, first = _first_of_their_kind(files) if rules.dedup else ([], np.empty(0, bool))
    taken = start = 0
    for number, part_files in enumerate(files):
        if rules.limit is not None and taken >= rules.limit:
            return
        rows = parts_rows[number] if rules.dedup else len(_load(part_files).rows) if rules.limit else 0
        good = first[start : start + rows] if rules.dedup else np.ones(rows, bool)
        start += rows
        stop = None
        if rules.limit is not None and taken + int(good.sum()) >= rules.limit:
            stop = int(np.flatnonzero(good)[rules.limit - taken - 1]) + 1
        yield Choice(part_files, stop, np.flatnonzero(~good[:stop]))
        taken += int(good[:stop].sum())


def _first_of_their_kind(files: list[PartFiles]) -> tuple[list[int], np.ndarray]:
    """Rows of each part; and of all rows, bool, whether no earlier one has the same image."""
    digests = [_load(part_files).digests for part_files in files]
    rows = [len(d) // DIGEST_BYTES for d in digests]
    return rows, first_occurrences(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """Whether each row of uint64 [N, 2] is the first of its value: bool [N]. Sorted, so 50 million take no set."""
    order = np.lexsort(digests.T)  # stable: equal rows stay in order
    ordered = digests[order]
    first = np.ones(len(digests), bool)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(1)
    return first


def _rejects(choice: Choice, part: Part) -> list[Reject]:
    """What was left out, in the source's order: by the worker, and as a duplicate of another part's image."""
    found = [reject for reject in part.rejects if choice.stop is None or reject.after < choice.stop]
    if not len(choice.duplicates):
        return found
    keys = [key for _, _, _, key in choice.files.samples(part)]
    found += [Reject(keys[row], DUPLICATE, int(row)) for row in choice.duplicates]
    return sorted(found, key=lambda reject: reject.after)  # stable: the worker's rejects come first


def _write_beton(choices: list[Choice], summary: Summary, largest: int, bar: Progress) -> None:
    page = max(PAGE, 1 << (largest - 1).bit_length())
    several = choices[0].files.rules.several
    bar.start("writing", summary.written)
    with BetonWriter(summary.path, summary.written, summary.context, page, several) as writer:
        for choice in choices:
            part, duplicates = _load(choice.files), set(choice.duplicates.tolist())
            part.rows = part.rows[: choice.stop]
            for number, (row, image, tokens, key) in enumerate(choice.files.samples(part)):
                if number in duplicates:
                    continue
                writer.write(image, row.width, row.height, tokens if several else tokens[0], key)
                summary.passed_through += row.passed_through
                summary.captions += row.captions
                summary.captions_cut += row.captions_cut
            bar.done(writer.written)


def _load(files: PartFiles) -> Part:
    part = files.load()
    if part is None:
        raise DataError(f"{files.chunk.name}: changed while it was read; run the same command again")
    return part


def _named(files: list[PartFiles]) -> str:
    names = list(dict.fromkeys(part.chunk.name for part in files))
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def gigabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
