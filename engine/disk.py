"""Files written whole, or on the disk, where a power cut cannot take them; and a folder to oneself."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from .errors import DataError, UserError


def sync(file: BinaryIO) -> None:
    """Return only when what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """The same of a file that was closed, or of the names in a folder: renames inside it then survive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def replace_text(path: Path, text: str) -> None:
    """Write a text file all or nothing: who reads it meanwhile, or after this process was killed, finds the old one.

    Its folder is made. Several processes may write the same file. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def alone_in(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Have a folder that exists to this process alone; however that ends, the system gives the folder free.

    patience: seconds to wait for another one. Raises DataError that names it if it is still there then. File systems
    that know no locks let everybody in.
    """
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        until = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise DataError(f"{folder}: {owner} is at work there; wait for its end, or name another place")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
