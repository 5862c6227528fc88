"""Times and memory of rivals, side by side in one process: alternating rounds, medians and quartiles."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

Work = Callable[[], object]


class Timing(NamedTuple):
    """Milliseconds of one call: median and quartiles over `samples` rounds."""

    median: float
    low: float
    high: float
    samples: int


def alternate(
    rivals: Mapping[str, Work], device: torch.device, *, rounds: int = 15, seconds: float = 10.0
) -> dict[str, Timing]:
    """Time every rival once a round, each round starting with another one, after three calls to warm up.

    A sample is the time from one call to the next over several calls in a row where a call is short (under 2 ms), so
    the cost of launching kernels counts where it is felt. Stops after `rounds`, or after `seconds` with three at least.
    """
    repeats = {name: _repeats(work, device) for name, work in rivals.items()}
    turns = {name: partial(measure, work, device, repeats[name]) for name, work in rivals.items()}
    return in_turns(turns, rounds=rounds, seconds=seconds)


def in_turns(turns: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float) -> dict[str, Timing]:
    """The loop of `alternate`. turns: what gives the milliseconds of one turn, by name."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    order, start = list(turns), time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name in order[done % len(order) :] + order[: done % len(order)]:
            samples[name].append(turns[name]())
    return {name: summary(values) for name, values in samples.items()}


def measure(work: Work, device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one call, averaged over `repeats` in a row; CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) * 1e3 / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def release(device: torch.device) -> None:
    """Let others have the memory that is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def summary(samples: list[float]) -> Timing:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(middle, low, high, len(samples))


def peak_memory(work: Work, device: torch.device) -> float | None:
    """MiB that one call takes at most beyond what is there before it; None where the system does not tell.

    On a GPU what torch has allocated; on the CPU the resident set of the process (Linux).
    """
    work()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        release(device)  # what was freed before would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
        resident = _resident("VmRSS")
        work()
        return max(0.0, _resident("VmHWM") - resident)
    except OSError:
        return None


class Stopwatch:
    """Seconds of named parts of something: `with stopwatch("teacher"): ...`. A part inside another is its own alone.

    On a GPU every boundary waits for what was started, so the sum is somewhat more than without a stopwatch.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device, self._since = device, 0.0
        self._open: list[str] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Inside, time is charged to this part."""
        self._charge()
        self._open.append(part)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def product_rate(rows: int, width: int, dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """Operations per second of a matrix product as in a transformer's MLP: [rows, width] times [width, 4 width]."""
    x, w = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (width, 4 * width)))
    out = torch.empty(rows, 4 * width, device=device, dtype=dtype)  # a new one each time would make page faults
    timed = alternate({"product": lambda: torch.mm(x, w, out=out)}, device, rounds=50, seconds=seconds)["product"]
    return 2 * rows * width * 4 * width / timed.median * 1e3


def _resident(field: str) -> float:
    """A line of /proc/self/status in MiB. Raises OSError where the system has no such line."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {field} in /proc/self/status")
    return int(found.group(1)) / 1024


def _repeats(work: Work, device: torch.device) -> int:
    """Warm up; then how many calls last about 2 ms."""
    work()
    once = max(min(measure(work, device), measure(work, device)), 1e-3)
    return max(1, min(50, round(2.0 / once)))
