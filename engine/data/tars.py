"""Webdataset tars, as img2dataset writes them: samples out of one, and where a large one can be cut in pieces.

Nothing is extracted to disk, so names such as `../../etc/passwd` inside an archive are names and nothing more.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError
from .images import Rejected
from .samples import IMAGES, MAX_FILE, TOO_LARGE, WANTED, FileSample, ShardDamaged

TARS = (".tar", ".tar.gz", ".tgz")
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError)
"""What reading a broken archive, compressed or not, raises; the last two where a header's numbers are absurd."""


def without_ending(name: str) -> str:
    """The name or address of a tar without its ending: with others it names what img2dataset writes beside the tar."""
    return next((name.removesuffix(ending) for ending in TARS if name.endswith(ending)), name)


class _Header(tarfile.TarInfo):
    """A member's header, or none at the end."""

    @classmethod
    def fromtarfile(cls, tar: Tar) -> _Header:  # type: ignore[override]
        """The next one. Raises what TarFile expects where there is none."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in the stubs
            tar.ended = True
            raise


class Tar(tarfile.TarFile):
    """A tar that knows whether it came to its end: TarFile takes a broken header in the middle for the end as well."""

    tarinfo = _Header
    ended = False
    """Whether the block of zeros was met that ends an archive."""


@contextmanager
def open_tar(path: Path, start: int = 0) -> Iterator[tuple[Tar, BinaryIO]]:
    """The tar at `path`, compressed or not, and the file below it. Raises DataError where it cannot be opened.

    start: byte of an uncompressed tar at which a member begins.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    with file:
        if not file.seekable():
            raise DataError(f"{path}: is a pipe, and tars are read by place; write it to a file first")
        file.seek(start)
        with tar_of(file, str(path)) as tar:
            yield tar, file


def tar_of(file: BinaryIO, name: str) -> Tar:
    """The tar that begins where `file` stands, compressed or not. Raises DataError where there is none."""
    try:
        return Tar.open(fileobj=file)
    except DAMAGE as error:
        _raise_if_of_the_disk(error, name)
        raise DataError(f"{name}: not a tar archive, or its beginning is damaged") from None


def read_shard(
    path: Path, progress: Callable[[int], None] = lambda position: None, start: int = 0, stop: int | None = None
) -> Iterator[FileSample]:
    """The samples of a tar, or of its piece from byte `start` to `stop`, in order: see `tar_samples`."""
    with open_tar(path, start) as (tar, file):
        yield from tar_samples(tar, str(path), lambda: progress(file.tell()), stop)


def tar_samples(tar: Tar, name: str, progress: Callable[[], None], stop: int | None = None) -> Iterator[FileSample]:
    """The samples of an open tar. A sample is a run of files whose names agree up to the first dot.

    progress: called after every sample. stop: the byte at which to end, None for the end of the archive. Raises
    ShardDamaged, after all complete samples, if the archive breaks off or becomes unreadable.
    """
    sample, damage = None, None
    try:
        for key, extension, data in _members(tar, stop):
            # A file name seen twice in a row starts a second sample of the same key.
            if sample is None or key != sample.key or extension in sample.files:
                if sample is not None:
                    yield sample
                sample = FileSample(key)
                progress()
            if data is None:
                sample.failure = Rejected(TOO_LARGE)
            else:
                sample.files[extension] = data
        if stop is None and not tar.ended:
            raise tarfile.ReadError("no end of archive where the last file ends")
    except DAMAGE as error:
        _raise_if_of_the_disk(error, name)
        damage = error
    if sample is not None and (damage is None or _is_complete(sample)):
        yield sample
    if damage is not None:
        raise ShardDamaged(str(damage))


def _raise_if_of_the_disk(error: BaseException, name: str) -> None:
    """An error of the disk or the network is no verdict on the archive."""
    if isinstance(error, OSError) and error.errno:
        raise DataError(f"{name}: reading failed: {error.strerror}; run again when it is readable") from error


def _members(tar: tarfile.TarFile, stop: int | None) -> Iterator[tuple[str, str, bytes | None]]:
    """Name up to the first dot, extension, and content (None if too large) of the members that matter."""
    for member, name, extension in wanted_members(tar):
        if stop is not None and member.offset >= stop:
            return
        yield name, extension, None if member.size > MAX_FILE else _read(tar, member)


def wanted_members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Members that belong to samples: header, name up to the first dot, lower-case extension."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # keeps every header it has seen; not in the stubs
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        if member.isreg() and stem and extension in WANTED:
            yield member, f"{folder}/{stem}" if folder else stem, extension


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member)
    data = b"" if content is None else content.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _is_complete(sample: FileSample) -> bool:
    """The last sample before the damage: perhaps all its files arrived."""
    return any(image in sample.files for image in IMAGES) and any(text in sample.files for text in ("txt", "json"))


def pieces(path: Path, size: int) -> list[tuple[int, int | None, frozenset[str]]]:
    """Where to cut an uncompressed tar into pieces of about `size` bytes, between samples, from its headers alone.

    Returns (first byte, last byte + 1 or None for the end, keys in it that a piece before has as well) of each; one
    piece (0, None, nothing) where the tar is compressed, small or damaged at its beginning.
    """
    whole: list[tuple[int, int | None, frozenset[str]]] = [(0, None, frozenset())]
    try:
        if path.stat().st_size < 2 * size:
            return whole
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            cuts = _cuts(tar, size)
    except DAMAGE:
        return whole
    ends = [start for start, _ in cuts[1:]] + [None]
    return [(start, end, again) for (start, again), end in zip(cuts, ends, strict=True)]


def _cuts(tar: tarfile.TarFile, size: int) -> list[tuple[int, frozenset[str]]]:
    """First byte of each piece, and its keys that were seen before it. Ends early where the tar is damaged."""
    cuts: list[tuple[int, frozenset[str]]] = []
    earlier, here = set[str](), set[str]()
    start, key, extensions = 0, None, set[str]()
    try:
        for member, name, extension in wanted_members(tar):
            if name != key or extension in extensions:
                if member.offset >= start + size:
                    cuts.append((start, frozenset(here & earlier)))
                    earlier |= here
                    start, here = member.offset, set()
                key, extensions = name, set()
                here.add(name)
            extensions.add(extension)
    except DAMAGE:
        pass  # the last piece will meet the damage where it is
    return [*cuts, (start, frozenset(here & earlier))]
