"""Shards read from afar: `https://`, `s3://` and other addresses through fsspec, and `pipe:` commands.

A stream that breaks is opened again where it broke; what was read whole can be kept in a bounded folder.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError

logger = logging.getLogger(__name__)

ATTEMPTS = 8
"""Times in succession that a shard may fail to give anything before that is an error."""
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled for each further one, up to LONGEST_PAUSE."""
LONGEST_PAUSE = 30.0
SILENCE = 60.0
"""Seconds without a byte after which a connection counts as broken."""
CHUNK = 1 << 20
"""Bytes that are asked for at once."""
LARGEST_SPAN, SMALLEST_SPAN = 1 << 20, 1 << 12
"""Bytes that are asked for after a failure, less after each further one: a connection that breaks takes along what
arrived, so a server that always breaks it early only ever gives small pieces."""
TAIL = 4 << 20
"""Bytes that stay in memory behind the place of reading, so that short ways back need no new connection."""
ABANDONED = 3600.0
"""Seconds after which an unfinished file in the cache is taken for one whose process is gone."""


class Raw(Protocol):
    """An open stream."""

    start: int
    """Byte of the source at which it begins."""
    total: int | None
    """Bytes of the whole source; None if not known."""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; empty at the end."""

    def close(self) -> None:
        """Give the connection back."""


def is_remote(source: str) -> bool:
    """Whether a source is an address or a command, rather than a path on this machine."""
    return "://" in source or source.startswith("pipe:")


class Pipe:
    """The output of a shell command."""

    start = 0
    total: int | None = None

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)

    def read(self, size: int) -> bytes:
        """Raises OSError where the command ends in an error."""
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if not data and (status := self._process.wait()):
            raise OSError(f"the command ended with status {status}")
        return data

    def close(self) -> None:
        """End the command, whatever it started included."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Http:
    """An answer of an HTTP server, through fsspec."""

    def __init__(self, source: str, offset: int, span: int | None) -> None:
        """Asks for `span` bytes from `offset` on, None: for all; a server may answer with the whole file."""
        import aiohttp
        import fsspec

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        fs, path = fsspec.url_to_fs(source, client_kwargs={"timeout": timeout})
        wanted = f"bytes={offset}-{offset + span - 1 if span else ''}"
        headers = {"headers": {"Range": wanted}} if offset or span else {}
        self._file = fs.open(path, block_size=0, size=1, **headers)  # a size spares asking for it; it is not used
        answer = self._file.r
        self.start = offset if answer.status == 206 else 0
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else None
        whole = answer.headers.get("Content-Length", "") if whole is None else whole
        self.total = int(whole) if whole.isdecimal() and "Content-Encoding" not in answer.headers else None

    def read(self, size: int) -> bytes:
        """Raises what aiohttp raises where the connection breaks; what had arrived by then may be lost."""
        return self._file.read(size)

    def close(self) -> None:
        """Give the connection back."""
        self._file.close()


class File:
    """A file of any other file system that fsspec knows."""

    total: int | None = None

    def __init__(self, source: str, offset: int) -> None:
        import fsspec

        fs, path = fsspec.url_to_fs(source)
        self._file = fs.open(path, "rb")
        self._file.seek(offset)
        self.start = offset

    def read(self, size: int) -> bytes:
        """Raises what the library behind the address raises."""
        return self._file.read(size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_raw(source: str, offset: int, span: int | None) -> Raw:
    """A stream of `source` from byte `offset` on, or from its start where it knows no other place.

    span: bytes that will be enough, None for all. Raises whatever the library behind the address raises.
    """
    if source.startswith("pipe:"):
        return Pipe(source.removeprefix("pipe:"))
    if source.startswith(("http://", "https://")):
        return Http(source, offset, span)
    return File(source, offset)


class Stream:
    """A source as a file that is read forward; going back works within TAIL bytes."""

    def __init__(self, source: str, keep: Callable[[bytes], None] = lambda chunk: None) -> None:
        """keep: given every byte, once and in order."""
        self.source, self._keep = source, keep
        self._raw: Raw | None = None
        self._tail = bytearray()
        self._received = 0  # bytes so far: the tail is the last of them
        self._place = 0
        self._span: int | None = None  # bytes to ask for at once, after a failure: then what comes is not lost
        self.ended = False
        """Whether the source was received to its end."""

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer only at the end; all that are left where it is negative. Raises DataError."""
        pieces, left = [], float("inf") if size is None or size < 0 else size
        while left > 0:
            if self._place == self._received and not self._receive():
                break
            start = len(self._tail) - (self._received - self._place)
            piece = bytes(self._tail[start : start + int(min(left, CHUNK))])
            pieces.append(piece)
            self._place += len(piece)
            left -= len(piece)
        return b"".join(pieces)

    def tell(self) -> int:
        """Byte of the source at which the next read begins."""
        return self._place

    def seekable(self) -> bool:
        """Forward always, back a little."""
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        """Go to a byte: `place`, or so many further (whence 1). Raises OSError where that is too far back."""
        target = place + (self._place if whence == 1 else 0)
        if whence == 2 or target < self._received - len(self._tail):
            raise OSError("a stream cannot go there")
        while target > self._received and self._receive():
            pass
        self._place = min(target, self._received)
        return self._place

    def _receive(self) -> bool:
        """The next chunk into the tail; False at the end. Raises DataError when no attempt gives anything."""
        pause = FIRST_PAUSE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                chunk = b"" if self.ended else self._chunk()
            except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
                raise DataError(f"{self.source}: {_reason(error)}") from error
            except Exception as error:  # every library behind an address has its own
                self._close_raw()
                if attempt == ATTEMPTS or _is_refusal(error):
                    raise DataError(
                        f"{self.source}: reading failed at byte {self._received}, {attempt} times: {_reason(error)}"
                    ) from error
                logger.info("%s: %s at byte %d; trying again", self.source, _reason(error), self._received)
                self._span = max(SMALLEST_SPAN, self._span // 4) if self._span else LARGEST_SPAN
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self.ended = not chunk
            self._keep(chunk)
            self._tail += chunk
            self._received += len(chunk)
            del self._tail[: max(0, len(self._tail) - TAIL)]
            return bool(chunk)
        return False

    def _chunk(self) -> bytes:
        """The next bytes, empty only at the end of the source."""
        while True:
            if self._raw is None:
                self._raw = self._opened()
            raw = self._raw
            if chunk := raw.read(CHUNK):
                return chunk
            if raw.total is None or self._received >= raw.total:
                return b""
            # All that was asked for came, and there is more.
            self._close_raw()
            self._span = None if self._span is None or self._span >= LARGEST_SPAN else 2 * self._span

    def _opened(self) -> Raw:
        raw = open_raw(self.source, self._received, self._span)
        at = raw.start
        while at < self._received:  # the source knows no other place than its start
            skipped = raw.read(min(CHUNK, self._received - at))
            if not skipped:
                raise OSError("shorter than it was before")
            at += len(skipped)
        return raw

    def _close_raw(self) -> None:
        if self._raw is not None:
            with suppress(Exception):  # a broken connection may not even close
                self._raw.close()
            self._raw = None

    def close(self) -> None:
        """Give the connection back. Idempotent."""
        self._close_raw()


def _is_refusal(error: Exception) -> bool:
    """An answer of an HTTP server that asking again will not change."""
    status: Any = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text and text[0] else type(error).__name__


class Cache:
    """Whole shards on this machine's disk, never more than `limit` bytes of them; the least lately used go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Raises DataError where the folder cannot be made."""
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be made: {error.strerror}") from None

    def path(self, source: str) -> Path:
        """Where a shard lies, or would lie."""
        return self.folder / f"{sha256(source.encode()).hexdigest()[:32]}.tar"

    def find(self, source: str) -> Path | None:
        """A shard that is here, now the most lately used; None if it is not."""
        path = self.path(source)
        try:
            os.utime(path)
        except OSError:
            return None
        return path

    def make_room(self, size: int) -> bool:
        """Whether so many bytes more fit, after removing what was not used for the longest time."""
        total, removable = size, []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process may be removing, too
                state = path.stat()
                total += state.st_size
                if path.suffix == ".tar" or time.time() - state.st_mtime > ABANDONED:
                    removable.append((state.st_mtime_ns, state.st_size, path))
        for _, bytes_, path in sorted(removable):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= bytes_
        return total <= self.limit


class Copy:
    """A shard on its way into the cache, as it is read; given up where there is no room or the disk fails."""

    def __init__(self, cache: Cache, source: str) -> None:
        self._cache, self._target = cache, cache.path(source)
        self._temporary = self._target.with_suffix(f".{os.getpid()}.{id(self)}.tmp")
        self._file: Any = None
        self._given_up = False

    def write(self, chunk: bytes) -> None:
        """The next bytes."""
        if self._given_up:
            return
        try:
            if not self._cache.make_room(len(chunk)):
                raise OSError("no room")
            if self._file is None:
                self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115
            self._file.write(chunk)
        except OSError as error:
            logger.info("%s: not kept: %s", self._target, error)
            self.finish(False)

    def finish(self, whole: bool) -> None:
        """Keep the file if it is whole, else remove it. Idempotent."""
        file, self._file, self._given_up = self._file, None, True
        if file is None:
            return
        file.close()
        try:
            if whole:
                os.replace(self._temporary, self._target)
            else:
                self._temporary.unlink(missing_ok=True)
        except OSError as error:  # someone has emptied the folder meanwhile
            logger.info("%s: not kept: %s", self._target, error)
