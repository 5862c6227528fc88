"""Image-caption samples out of webdataset tars, as img2dataset writes them: which tars, and what is in one.

Nothing is extracted to disk, so names such as `../../etc/passwd` inside an archive are names and nothing more.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

from braceexpand import UnbalancedBracesError, braceexpand

from ..errors import DataError
from .images import Rejected

IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
WANTED = frozenset((*IMAGES, "txt", "json"))
TARS = (".tar", ".tar.gz", ".tgz")
MAX_FILE = 128 << 20
"""Bytes of the largest image or text file that is read out of an archive."""
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError)
"""What reading a broken archive, compressed or not, raises; the last two where a header's numbers are absurd."""


class ShardDamaged(Exception):
    """A tar that broke off or became unreadable; all samples before that point were yielded."""


@dataclass
class TarSample:
    """The files of one sample: `a/0001.jpg`, `a/0001.txt` and `a/0001.json` are sample `a/0001`."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """Lower-case extension -> content, in the archive's order."""
    too_large: bool = False
    """A file was left unread because it exceeds MAX_FILE."""

    def image(self) -> bytes:
        """The first image file. Raises Rejected."""
        if self.too_large:
            raise Rejected(f"file larger than {MAX_FILE >> 20} MiB")
        for extension, data in self.files.items():
            if extension in IMAGES:
                return data
        raise Rejected("no image")

    def caption(self) -> str:
        """The text of the `.txt`, or else `caption` of the `.json`, as it stands. Raises Rejected."""
        text = self._text()
        # Letters, marks, numbers, punctuation and symbols say something; separators and control characters do not.
        if all(unicodedata.category(character)[0] in "ZC" for character in text):
            raise Rejected("caption empty")
        return text

    def _text(self) -> str:
        try:
            if "txt" in self.files:
                return self.files["txt"].decode("utf-8-sig")
            text = self.labels().get("caption")
            if not isinstance(text, str):
                raise Rejected("caption missing")
            text.encode()  # JSON can spell half a surrogate pair, which is no character
            return text
        except UnicodeError:
            raise Rejected("caption not UTF-8") from None

    def labels(self) -> dict[str, Any]:
        """The object in the `.json`; empty where there is none. Raises Rejected."""
        try:
            labels = json.loads(self.files.get("json", b"{}"))
        except (ValueError, RecursionError):
            raise Rejected("json not readable") from None
        return labels if isinstance(labels, dict) else {}


def expand_sources(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tars that `sources` name, each once: paths, folders of tars, globs, brace ranges (`{00000..00331}.tar`).

    A folder's or glob's tars come sorted by name. Raises DataError where a source names nothing, or something that is
    not a readable tar: known now rather than hours into the work.
    """
    sources = [sources] if isinstance(sources, str | Path) else sources
    found = (shard for source in sources for shard in _expand(str(source)))
    shards = list({shard.resolve(): shard for shard in found}.values())
    if not shards:
        raise DataError("no source given: name tars, globs of tars, or folders of tars")
    for shard in shards:
        with open_tar(shard):
            pass
    return shards


def _expand(source: str) -> Iterator[Path]:
    if Path(source).is_dir():
        yield from _tars_in(Path(source))
    elif Path(source).exists():
        yield Path(source)
    else:
        for pattern in _braces(source):
            matches = sorted(glob(pattern, recursive=True)) if has_magic(pattern) else [pattern]
            if not matches:
                raise DataError(f"{pattern}: no file matches")
            for match in map(Path, matches):
                yield from _tars_in(match) if match.is_dir() else [match]


def _tars_in(folder: Path) -> list[Path]:
    tars = sorted(path for path in folder.iterdir() if path.name.endswith(TARS) and path.is_file())
    if not tars:
        raise DataError(f"{folder}: no tar in this folder")
    return tars


def _braces(source: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except UnbalancedBracesError:
        return [source]


@contextmanager
def open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, BinaryIO]]:
    """The tar at `path`, compressed or not, and the file below it. Raises DataError where it cannot be opened."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        try:
            tar = tarfile.open(fileobj=file)  # noqa: SIM115
        except DAMAGE:
            raise DataError(f"{path}: not a tar archive, or its beginning is damaged") from None
        with tar:
            yield tar, file


def read_shard(path: Path, progress: Callable[[int], None] = lambda position: None) -> Iterator[TarSample]:
    """The samples of a tar, in order. A sample is a run of files whose names agree up to the first dot.

    progress: told the position in the file, in bytes, after every sample. Raises DataError if the tar cannot be opened;
    ShardDamaged, after all complete samples, if it breaks off or becomes unreadable.
    """
    with open_tar(path) as (tar, file):
        sample, damage = None, None
        try:
            for name, extension, data in _members(tar):
                # A file name seen twice in a row starts a second sample of the same key.
                if sample is None or name != sample.key or extension in sample.files:
                    if sample is not None:
                        yield sample
                    sample = TarSample(name)
                    progress(file.tell())
                if data is None:
                    sample.too_large = True
                else:
                    sample.files[extension] = data
            _check_end(tar)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno:  # the disk or the network, not the archive: no verdict on it
                raise DataError(f"{path}: reading failed: {error.strerror}; run again when it is readable") from error
            damage = error
        if sample is not None and (damage is None or _is_complete(sample)):
            yield sample
        if damage is not None:
            raise ShardDamaged(str(damage))


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | None]]:
    """Name up to the first dot, extension, and content (None if too large) of the members that matter."""
    for member in tar:
        tar.members.clear()  # tarfile keeps every header it has seen
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if not member.isreg() or not stem or extension not in WANTED:
            continue
        name = f"{folder}/{stem}" if folder else stem
        yield name, extension, None if member.size > MAX_FILE else _read(tar, member)


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    data = b"" if content is None else content.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a broken header in the middle for the end; the true end is a block of zeros."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise tarfile.ReadError("no end of archive where the last file ends")


def _is_complete(sample: TarSample) -> bool:
    """The last sample before the damage: perhaps all its files arrived."""
    return any(image in sample.files for image in IMAGES) and any(text in sample.files for text in ("txt", "json"))
