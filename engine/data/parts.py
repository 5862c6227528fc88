"""One shard's work in `prepare`: a tar in, a part (payload and index) out, in a worker process.

A part is two files: NAME.data holds the accepted samples end to end (image, tokens, key of each), NAME.json their sizes
and what was left out. The index is renamed into place last and says which shard and rules it came from, so a part is
either whole and still valid, or it is made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import __version__ as pillow_version

from ..errors import DataError
from .beton import sync
from .images import Rejected, to_jpeg
from .sources import ShardDamaged, TarSample, read_shard

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

FORMAT = 1
"""Raised when a part of an older version must not be taken up."""
CHARACTERS_PER_TOKEN = 32
"""No CLIP token is longer; text beyond context x this cannot reach the tokens and is not tokenised."""

MAX_WORDS = 1 << 17
"""Words whose tokens a worker keeps in memory."""


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
    limit: int | None
    """Samples to accept at most."""


@dataclass(frozen=True)
class Row:
    """Sizes of one accepted sample, in the order of the payload."""

    width: int
    height: int
    image_bytes: int
    key_bytes: int
    passed_through: bool
    caption_cut: bool


@dataclass(frozen=True)
class Reject:
    """A sample that was left out; a key of None means the rest of the shard."""

    key: str | None
    reason: str
    after: int
    """How many samples of the shard had been accepted before."""


@dataclass
class Part:
    """The index of a finished part."""

    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def largest(self, context: int) -> int:
        """Bytes of the largest sample; 0 if there is none."""
        return max((row.image_bytes + 4 * context + row.key_bytes for row in self.rows), default=0)


@dataclass(frozen=True)
class PartFiles:
    """Where a shard's part lies; named after the shard's path, so that the list of sources may change between runs."""

    folder: Path
    shard: Path
    rules: Rules

    @property
    def stem(self) -> str:
        """File name without its ending."""
        return sha256(os.fsencode(self.shard.resolve())).hexdigest()[:24]

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
        state = self.shard.stat()
        shard = {"path": str(self.shard.resolve()), "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
        return {"format": FORMAT, "pillow": pillow_version, "shard": shard, "rules": asdict(self.rules)}

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
        """Row, JPEG bytes, tokens (int32 [context]) and key of every sample, read one after the other."""
        with open(self.data, "rb", buffering=1 << 20) as file:
            for row in part.rows:
                record = memoryview(file.read(row.image_bytes + 4 * self.rules.context + row.key_bytes))
                middle, last = row.image_bytes, row.image_bytes + 4 * self.rules.context
                yield row, record[:middle], np.frombuffer(record[middle:last], np.int32), bytes(record[last:]).decode()


def build_part(files: PartFiles, report: Callable[[int, int], bool]) -> int:
    """Make the part of one shard unless it is there already; returns the number of accepted samples.

    report: called with the images seen so far and the position in the tar (bytes); False stops the work.
    Raises DataError where the shard cannot be opened, OSError where the part cannot be written, Stopped.
    """
    part = files.load()
    if part is None:
        temporary = [path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp") for path in (files.data, files.index)]
        try:
            part = _write_part(files, *temporary, report)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
    return len(part.rows)


class Stopped(Exception):
    """The work was called off from outside."""


def _write_part(files: PartFiles, data: Path, index: Path, report: Callable[[int, int], bool]) -> Part:
    origin = files.origin()  # taken before reading: a shard that changes meanwhile is read again next time
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
    os.replace(data, files.data)
    os.replace(index, files.index)
    return part


def _read_samples(files: PartFiles, write: Callable[[bytes], Any], report: Callable[[int, int], bool]) -> Part:
    part, seen, position, rules = Part(), set[str](), 0, files.rules

    def moved(to: int) -> None:
        nonlocal position
        position = to

    try:
        for sample in read_shard(files.shard, moved):
            if not report(len(part.rows) + len(part.rejects), position):
                raise Stopped
            if rules.limit is not None and len(part.rows) >= rules.limit:
                break
            try:
                row, record = _record(sample, rules, seen)
            except Rejected as rejected:
                part.rejects.append(Reject(sample.key, str(rejected), len(part.rows)))
            else:
                write(record)
                part.rows.append(row)
    except ShardDamaged:
        part.rejects.append(Reject(None, "shard cut short or damaged", len(part.rows)))
    report(len(part.rows) + len(part.rejects), position)
    return part


def _record(sample: TarSample, rules: Rules, seen: set[str]) -> tuple[Row, bytes]:
    """The payload of one sample. Raises Rejected."""
    try:
        key = sample.key.encode()
    except UnicodeEncodeError:
        raise Rejected("key not UTF-8") from None
    image, caption = sample.image(), sample.caption()
    if sample.key in seen:
        raise Rejected("key seen before in this shard")
    tokens, cut = tokenize(caption, rules.context)
    jpeg = to_jpeg(image, rules.max_side, rules.min_side, rules.quality)
    seen.add(sample.key)
    row = Row(jpeg.width, jpeg.height, len(jpeg.data), len(key), jpeg.passed_through, cut)
    return row, jpeg.data + tokens.tobytes() + key


def tokenize(caption: str, context: int) -> tuple[np.ndarray, bool]:
    """int32 [context]: start, words, end, zeros, as open_clip's tokenizer gives them; and whether words were cut off.

    A caption that is too long keeps the end token, in the last place.
    """
    tokenizer = _tokenizer()
    if len(tokenizer.cache) > MAX_WORDS:  # it remembers every word it has met
        tokenizer.cache = {tokenizer.decoder[i]: tokenizer.decoder[i] for i in tokenizer.all_special_ids}
    words = tokenizer.encode(caption[: context * CHARACTERS_PER_TOKEN])
    kept = [tokenizer.sot_token_id, *words[: context - 2], tokenizer.eot_token_id]
    tokens = np.zeros(context, np.int32)
    tokens[: len(kept)] = kept
    return tokens, len(words) > context - 2


@cache
def _tokenizer() -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer  # seconds: only those who tokenise pay them

    return SimpleTokenizer()


def check_rules(rules: Rules) -> None:
    """Raises DataError, naming the option, where a rule is impossible."""
    bounds = {"context": (3, 4096), "max_side": (1, 16384), "min_side": (1, rules.max_side), "quality": (1, 100)}
    for name, (low, high) in bounds.items():
        if not low <= getattr(rules, name) <= high:
            raise DataError(f"{name} = {getattr(rules, name)}: must be between {low} and {high}")
    if rules.limit is not None and rules.limit < 1:
        raise DataError(f"limit = {rules.limit}: must be at least 1")
