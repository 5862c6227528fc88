"""One chunk's work in `prepare`: samples in, a part (payload and index) out, in a worker process.

A part is two files: NAME.data holds the accepted samples end to end (image, tokens, key of each), NAME.json their sizes
and what was left out. The index is renamed into place last and says which chunk and rules it came from, so a part is
either whole and still valid, or it is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version

from ..disk import sync
from ..errors import DataError
from .images import Rejected, to_jpeg
from .samples import SHARD_DAMAGED, Sample, ShardDamaged
from .sources import Chunk
from .tokens import CLIP, tokenize, tokenizer_identity
from .where import where

FORMAT = 2
"""Raised when a part of an older version must not be taken up."""
DIGEST_BYTES = 16
DUPLICATE = "duplicate of an earlier image"


@dataclass(frozen=True)
class Rules:
    """What `prepare` does to a sample."""

    context: int
    """Tokens per caption, start and end included."""
    max_side: int
    """Pixels; larger images are shrunk."""
    min_side: int
    """Pixels; smaller images are left out."""
    quality: int
    """JPEG quality where an image has to be encoded."""
    limit: int | None = None
    """Samples to accept at most."""
    tokenizer: str = CLIP
    """See `tokens.tokenizer_options`."""
    several: bool = False
    """Keep all captions of an image, not only the first."""
    dedup: bool = False
    """Leave out images whose file is that of an earlier one, byte for byte."""
    where: str | None = None
    """Condition on the metadata; samples of which it is not true are left out."""


@dataclass(frozen=True)
class Row:
    """Sizes of one accepted sample, in the order of the payload."""

    width: int
    height: int
    image_bytes: int
    captions: int
    key_bytes: int
    passed_through: bool
    captions_cut: int
    digest: str
    """Of the source's image file, hexadecimal; empty where duplicates are kept."""

    def bytes(self, context: int) -> int:
        """Of its record in the payload."""
        return self.image_bytes + 4 * context * self.captions + self.key_bytes


@dataclass(frozen=True)
class Reject:
    """A sample that was left out; a key of None means the rest of the shard."""

    key: str | None
    reason: str
    after: int
    """How many samples of the chunk had been accepted before."""


@dataclass
class Part:
    """The index of a finished part."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def digests(self) -> bytes:
        """Of all rows, end to end, DIGEST_BYTES each."""
        return bytes.fromhex("".join(row.digest for row in self.rows))


@dataclass(frozen=True)
class PartFiles:
    """Where a chunk's part lies; named after what it was made from, so that the list of sources may change."""

    folder: Path
    chunk: Chunk
    rules: Rules

    @property
    def stem(self) -> str:
        """File name without its ending."""
        return sha256(json.dumps(self.chunk.identity()).encode()).hexdigest()[:24]

    @property
    def data(self) -> Path:
        """The payload."""
        return self.folder / f"{self.stem}.data"

    @property
    def index(self) -> Path:
        """The index, as JSON."""
        return self.folder / f"{self.stem}.json"

    def origin(self) -> dict[str, Any]:
        """What the part depends on: any change makes it invalid."""
        rules = {**asdict(self.rules), "tokenizer": tokenizer_identity(self.rules.tokenizer)}
        origin = {"format": FORMAT, "pillow": pillow_version, "chunk": self.chunk.identity(), "rules": rules}
        return json.loads(json.dumps(origin))  # as it comes back from the index: a tuple would differ for ever

    def load(self) -> Part | None:
        """The finished part, or None if there is none that is still valid."""
        try:
            stored = json.loads(self.index.read_text())
            if stored["origin"] != self.origin() or self.data.stat().st_size != stored["bytes"]:
                return None
            return Part([Row(*row) for row in stored["rows"]], [Reject(*reject) for reject in stored["rejects"]])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def samples(self, part: Part) -> Iterator[tuple[Row, memoryview, np.ndarray, str]]:
        """Row, JPEG bytes, tokens (int32 [captions, context]) and key of every sample, read one after the other."""
        context = self.rules.context
        with open(self.data, "rb", buffering=1 << 20) as file:
            for row in part.rows:
                record = memoryview(file.read(row.bytes(context)))
                middle, last = row.image_bytes, len(record) - row.key_bytes
                tokens = np.frombuffer(record[middle:last], np.int32).reshape(row.captions, context)
                yield row, record[:middle], tokens, bytes(record[last:]).decode()


def build_part(files: PartFiles, report: Callable[[int, int], bool]) -> Part:
    """Make the part of one chunk unless it is there already.

    report: called with the images seen so far and the position in the chunk (bytes); False stops the work.
    Raises DataError where the chunk cannot be opened, OSError where the part cannot be written, Stopped.
    """
    part = files.load()
    if part is None:
        data, index = (path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp") for path in (files.data, files.index))
        try:
            part = _write_part(files, data, index, report)
        finally:
            for path in (data, index):
                path.unlink(missing_ok=True)
    return part


class Stopped(Exception):
    """The work was called off from outside."""


def _write_part(files: PartFiles, data: Path, index: Path, report: Callable[[int, int], bool]) -> Part:
    origin = files.origin()  # taken before reading: a shard that changes meanwhile is read again next time
    targets = files.data, files.index
    with open(data, "wb", buffering=1 << 20) as file:
        part = _read_samples(files, file.write, report)
        sync(file)
        size = file.tell()
    stored = {
        "origin": origin,
        "bytes": size,
        "rows": [list(vars(row).values()) for row in part.rows],
        "rejects": [list(vars(reject).values()) for reject in part.rejects],
    }
    with open(index, "wb") as file:
        file.write(json.dumps(stored).encode())
        sync(file)
    os.replace(data, targets[0])
    os.replace(index, targets[1])
    return part


def _read_samples(files: PartFiles, write: Callable[[bytes], Any], report: Callable[[int, int], bool]) -> Part:
    part, digests, position, rules = Part(), set[str](), 0, files.rules

    def moved(to: int) -> None:
        nonlocal position
        position = to

    try:
        for sample in files.chunk.read(moved):
            if not report(len(part.rows) + len(part.rejects), position):
                raise Stopped
            if rules.limit is not None and len(part.rows) >= rules.limit:
                break
            try:
                row, record = _record(sample, rules, digests)
            except Rejected as rejected:
                part.rejects.append(Reject(_printable(sample.key), str(rejected), len(part.rows)))
            else:
                write(record)
                part.rows.append(row)
    except ShardDamaged:
        part.rejects.append(Reject(None, SHARD_DAMAGED, len(part.rows)))
    report(len(part.rows) + len(part.rejects), position)
    return part


def _printable(key: str) -> str:
    """A key whose bytes were not UTF-8 holds half surrogates, which no JSON reader must be given."""
    return key.encode("utf-8", "backslashreplace").decode()


def _record(sample: Sample, rules: Rules, digests: set[str]) -> tuple[Row, bytes]:
    """The payload of one sample. Raises Rejected. digests: of the images accepted before; this one's is added."""
    try:
        key = sample.key.encode()
    except UnicodeEncodeError:
        raise Rejected("key not UTF-8") from None
    image = sample.image()
    captions = sample.captions(lines=rules.several)
    if rules.where:
        known = {"key": sample.key, **sample.labels(), "caption": "\n".join(captions)}
        where(rules.where).require(known)
    digest = blake2b(image, digest_size=DIGEST_BYTES).hexdigest() if rules.dedup else ""
    if digest in digests:
        raise Rejected(DUPLICATE)
    jpeg = to_jpeg(image, rules.max_side, rules.min_side, rules.quality)
    used = captions if rules.several else captions[:1]
    tokens, cut = zip(*(tokenize(caption, rules.context, rules.tokenizer) for caption in used), strict=True)
    if rules.dedup:
        digests.add(digest)
    row = Row(jpeg.width, jpeg.height, len(jpeg.data), len(used), len(key), jpeg.passed_through, sum(cut), digest)
    return row, jpeg.data + b"".join(t.tobytes() for t in tokens) + key


def check_rules(rules: Rules) -> None:
    """Raises DataError, naming the option, where a rule is impossible."""
    bounds = {"context": (3, 4096), "max_side": (1, 16384), "min_side": (1, rules.max_side), "quality": (1, 100)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(rules, name) <= high:
            raise DataError(f"{name} = {getattr(rules, name)}: must be between {low} and {high}")
    if rules.limit is not None and rules.limit < 1:
        raise DataError(f"limit = {rules.limit}: must be at least 1")
    tokenizer_identity(rules.tokenizer)
    if rules.where is not None:
        where(rules.where)
