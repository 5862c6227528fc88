"""The progress bar of `prepare`: images per second and the time left, from bytes read of bytes to read."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """First the tars, in bytes; then the samples written to the file. A context manager."""

    def __init__(self, total_bytes: int, shown: bool) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
        self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
        self._reading = self._bar.add_task("reading", total=total_bytes, rate="")
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def read(self, images: int, position: int) -> None:
        """So many images seen and bytes of tars read, by all workers together."""
        rate = images / max(time.monotonic() - self._start, 1e-9)
        self._bar.update(self._reading, completed=position, rate=f"{images:,} images, {rate:,.0f}/s")

    def start_writing(self, samples: int) -> None:
        """Reading is over; so many samples are to be written."""
        self._writing = self._bar.add_task("writing", total=samples, rate="")

    def written(self, samples: int) -> None:
        """So many samples are in the file."""
        self._bar.update(self._writing, completed=samples)
