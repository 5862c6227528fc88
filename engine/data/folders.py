"""A folder tree of image files, each with its caption in a `.txt` or `.json` of the same name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import DataError
from .images import Rejected
from .samples import IMAGES, WANTED, FileSample, extension_of, read_small

SAMPLES_PER_CHUNK = 512
NOT_SAMPLES = "_stats.json"
"""Ending of img2dataset's own files beside the samples."""

Entry = tuple[str, int, int]
"""File name relative to the root, bytes, time of change in nanoseconds."""


@dataclass(frozen=True)
class FolderChunk:
    """Some samples of a folder tree."""

    root: Path
    samples: tuple[tuple[str, tuple[str, ...]], ...]
    """Key (path inside the tree, without extension) and file names of each."""
    size: int
    """Bytes of all its files."""
    fingerprint: str
    """Of names, sizes and times of change of its files."""

    @property
    def name(self) -> str:
        """What messages and the list of rejects call it."""
        return str(self.root)

    def identity(self) -> dict[str, str]:
        """What its samples depend on."""
        return {"folder": str(self.root.resolve()), "first": self.samples[0][0], "files": self.fingerprint}

    def read(self, progress: Callable[[int], None]) -> Iterator[FileSample]:
        """The samples. progress: told the bytes read so far, after every sample."""
        read = 0
        for key, names in self.samples:
            sample = FileSample(key)
            try:
                for name in names:
                    extension = extension_of(name)
                    if extension not in IMAGES or not any(image in sample.files for image in IMAGES):
                        sample.files[extension] = read_small(self.root / name)
            except Rejected as rejected:
                sample.failure = rejected
            read += sum(map(len, sample.files.values()))
            progress(read)
            yield sample


def folder_chunks(root: Path) -> list[FolderChunk]:
    """The samples of the tree below `root`, sorted by path, in chunks. Raises DataError where it holds no image."""
    groups: dict[str, list[Entry]] = {}
    for entry in _files(root):
        groups.setdefault(entry[0].rpartition(".")[0], []).append(entry)
    if not any(extension_of(name) in IMAGES for group in groups.values() for name, _, _ in group):
        raise DataError(f"{root}: no tar in this folder, and no image below it")
    keys = sorted(groups)
    return [
        _chunk(root, {key: sorted(groups[key]) for key in keys[first : first + SAMPLES_PER_CHUNK]})
        for first in range(0, len(keys), SAMPLES_PER_CHUNK)
    ]


def _chunk(root: Path, groups: dict[str, list[Entry]]) -> FolderChunk:
    entries = [entry for group in groups.values() for entry in group]
    samples = tuple((key, tuple(name for name, _, _ in group)) for key, group in groups.items())
    digest = sha256(repr(entries).encode("utf-8", "surrogateescape")).hexdigest()
    return FolderChunk(root, samples, sum(size for _, size, _ in entries), digest)


def _files(root: Path) -> Iterator[Entry]:
    """Files below `root` that can belong to a sample. Links to folders are not followed: they may lead in circles."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, _, names in os.walk(root, onerror=unreadable):
        for name in names:
            if name.startswith(".") or extension_of(name) not in WANTED or name.endswith(NOT_SAMPLES):
                continue
            path = os.path.join(folder, name)
            try:
                state = os.stat(path)
            except OSError:  # a link that leads nowhere; reading it will say so
                yield os.path.relpath(path, root), 0, 0
            else:
                yield os.path.relpath(path, root), state.st_size, state.st_mtime_ns
