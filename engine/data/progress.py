"""The progress bar of `prepare`: images per second and the time left."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """First the sources, in bytes; then samples, as they are written or checked. A context manager."""

    def __init__(self, total_bytes: int, shown: bool) -> None:
        """total_bytes: of the sources; 0 where there are none to read."""
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}")
        self._bar = RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)
        self._reading = self._bar.add_task("reading", total=total_bytes, rate="", visible=total_bytes > 0)
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def read(self, images: int, position: int) -> None:
        """So many images seen and bytes of the sources read, by all workers together."""
        self._bar.update(self._reading, completed=position, rate=f"{images:,} images, {self._rate(images)}")

    def start(self, what: str, samples: int) -> None:
        """From now on so many samples are to be written, or checked."""
        self._samples = self._bar.add_task(what, total=samples, rate="")
        self._start = time.monotonic()

    def done(self, samples: int) -> None:
        """So many of them are."""
        self._bar.update(self._samples, completed=samples, rate=self._rate(samples))

    def _rate(self, images: int) -> str:
        return f"{images / max(time.monotonic() - self._start, 1e-9):,.0f}/s"
