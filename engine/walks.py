"""Going through the passes of many configurations, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from .config import RunConfig
from .memory import Device, Passes, go_through

WORTH_STARTING = 12.0
"""Seconds of work left from which on other processes are started: each needs some to import torch"""


class Walks:
    """`go_through` for some ranks on a device. Other processes share the work where there is much of it."""

    def __init__(self, ranks: int, device: Device) -> None:
        self._ranks, self._device = ranks, device
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._others: ProcessPoolExecutor | None = None

    def __call__(
        self, configs: Sequence[RunConfig], report: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Passes]:
        """In the order of the configurations. report: told how many of how many are done."""
        found: list[Passes] = []
        begin = time.monotonic()
        for config in configs:
            left = (time.monotonic() - begin) / max(len(found), 1) * (len(configs) - len(found))
            if self.cores > 1 and (self._others or left > WORTH_STARTING):
                break
            found.append(go_through(config, self._ranks, self._device))
            report(len(found), len(configs))
        rest = configs[len(found) :]
        if rest:
            same = [self._ranks] * len(rest), [self._device] * len(rest)
            for passes in self._pool().map(go_through, rest, *same):
                found.append(passes)
                report(len(found), len(configs))
        return found

    def close(self) -> None:
        """End the other processes."""
        if self._others:
            self._others.shutdown(cancel_futures=True)
            self._others = None

    def _pool(self) -> ProcessPoolExecutor:
        """Processes forked from one that has imported everything and started no thread."""
        if self._others is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self._others = ProcessPoolExecutor(self.cores, context, initializer=torch.set_num_threads, initargs=(1,))
        return self._others
