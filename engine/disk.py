"""Having what was written on the disk, where a power cut cannot take it, and a folder to oneself."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

LOCK = ".lock"
LAST_MOMENTS = 5.0
"""Seconds in which a process that was killed is gone"""
_claimed: list[object] = []
"""Open lock files: closing one would give the folder free"""


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


def claim(folder: Path) -> None:
    """Have the folder to this process until it ends, however it ends.

    Raises UserError if another process has it. File systems that know no locks let everybody in.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    until = time.monotonic() + LAST_MOMENTS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(f"{folder}: {owner} is at work there; end it, or choose another run_dir") from None
            time.sleep(0.1)
        except OSError:
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claimed.append(file)
