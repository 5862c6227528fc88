"""Ends a process whose step hangs, and leaves what every thread of every rank was doing in the run folder."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread

HANG_FILE = "hang.txt"
POLL_SECONDS = 0.5
LAST_WORDS = 5.0
"""Seconds between writing the stacks and the end, in which the other ranks write theirs"""
FIRST_STEPS = 15.0
"""As many times `least` may the first step take: it compiles and warms up"""


class Watchdog:
    """A thread that looks whether steps go on. Used as a context manager.

    A step may take `factor` times the median of those before it, and `least` seconds at any rate. If it takes longer,
    or another rank finds that (it leaves a file in the run folder), the stacks of all threads are written to
    stacks-rank-<n>.txt, and the process ends with exit status 1.
    """

    def __init__(self, run_dir: Path, rank: int, factor: float, least: float) -> None:
        """factor: 0 switches it off."""
        self._run_dir, self._rank, self._factor, self._least = run_dir, rank, factor, least
        self._steps: deque[float] = deque(maxlen=200)
        self._since: float | None = time.monotonic()
        self._closing = Event()
        self._thread = Thread(target=self._watch, daemon=True, name="harmony-fast-watchdog")

    @property
    def typical(self) -> float:
        """Median seconds of a step so far; 0 before the first."""
        return median(self._steps) if self._steps else 0.0

    def step_done(self) -> None:
        """To be called after each step."""
        now = time.monotonic()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._since = now

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What happens inside is no step: saving, evaluating."""
        now = time.monotonic()
        self._since, spent = None, now - (self._since or now)
        try:
            yield
        finally:
            self._since = time.monotonic() - spent

    def __enter__(self) -> Watchdog:
        if self._factor:
            (self._run_dir / HANG_FILE).unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._factor:
            self._thread.join()

    def _watch(self) -> None:
        begun = time.time()
        while not self._closing.wait(POLL_SECONDS):
            since = self._since
            if since is None:
                continue
            allowed = max(self._factor * self.typical, self._least) if self._steps else FIRST_STEPS * self._least
            waited = time.monotonic() - since
            if waited > allowed:
                self._end(f"a step has taken {waited:.0f} s, {allowed:.0f} s are allowed", first=True)
            if self._found_elsewhere(begun):
                self._end("another rank's step hangs", first=False)

    def _found_elsewhere(self, begun: float) -> bool:
        try:
            return (self._run_dir / HANG_FILE).stat().st_mtime >= begun
        except OSError:
            return False

    def _end(self, reason: str, first: bool) -> None:
        path = self._run_dir / f"stacks-rank-{self._rank}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if first:
                (self._run_dir / HANG_FILE).write_text(f"rank {self._rank}: {reason}\n")
        except OSError:
            faulthandler.dump_traceback(all_threads=True)  # a full disk must not keep a hanging run alive
        print(f"error: rank {self._rank}: {reason}; what it was doing is in {path}", file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS)
        os._exit(1)
