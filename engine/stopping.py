"""When a run is to stop in good order: asked by a signal, or because its time is up."""

from __future__ import annotations

import os
import re
import signal
import time

from .errors import UserError

BEGAN = "HARMONY_FAST_BEGAN"
"""The environment variable that tells a process which takes over from another when that one began"""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What `kill`, Ctrl-C and SLURM (`--signal=USR1@300`) send"""


class StopRequest:
    """Whether to save and stop at the next step boundary; a second signal ends the process at once."""

    def __init__(self, max_time: str | int | None = None) -> None:
        """max_time: as `seconds_of` takes it, from now on, or from when the process began that this one takes over
        from."""
        self._asked = False
        self.began = float(os.environ.pop(BEGAN, time.monotonic()))
        self._end = self.began + seconds_of(max_time, "max_time") if max_time else float("inf")
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def due(self, save_seconds: float, step_seconds: float) -> bool:
        """Whether to stop now. Given how long saving and a step take: with time left for one of each, twice over."""
        return self._asked or time.monotonic() + 2 * (save_seconds + step_seconds) >= self._end

    def _ask(self, number: int, _frame: object) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True


def seconds_of(given: str | int, option: str) -> float:
    """Seconds of a time: 50:00 (minutes:seconds), 23:50:00, 1-12:00:00 (days-hours:...), or seconds as a bare number,
    which is what YAML makes of 23:50:00. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d\d?){0,2})", str(given).strip())
    parts = [int(part) for part in match[2].split(":")] if match else []
    if not match or any(part > 59 for part in parts[1:]):
        raise UserError(f"{option} {given}: a time is needed, as in 23:50:00 (hours:minutes:seconds)")
    hours, minutes, seconds = [*parts, 0, 0][:3] if match[1] else [0, 0, *parts][-3:]
    total = ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds
    if not total:
        raise UserError(f"{option} {given}: is no time at all")
    return total
