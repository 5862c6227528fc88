"""Going through the passes of many configurations, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import select
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from threading import Thread

import torch

from .config import RunConfig
from .memory import Device, Passes, go_through

WORTH_STARTING = 20.0
"""Seconds of work left from which on other processes are started: each needs some to import torch"""


class Walks:
    """`go_through` for some ranks on a device. Other processes share the work where there is much of it."""

    def __init__(self, ranks: int, device: Device) -> None:
        self._ranks, self._device = ranks, device
        self.cores = len(os.sched_getaffinity(0))
        self._others: ProcessPoolExecutor | None = None
        self._warm = False

    def __call__(
        self, configs: Sequence[RunConfig], report: Callable[[int, int], None] = lambda done, of: None
    ) -> list[Passes]:
        """In the order of the configurations. report: told how many of how many are done."""
        found: list[Passes] = []
        left = 0.0
        for config in configs:
            if self.cores > 1 and (self._others or left > WORTH_STARTING):
                break
            begin = time.process_time()
            found.append(go_through(config, self._ranks, self._device))
            report(len(found), len(configs))
            if self._warm:  # the first one of all imports and finds out what others need not
                left = (time.process_time() - begin) * (len(configs) - len(found))
            self._warm = True
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
            self._others = ProcessPoolExecutor(self.cores, context, initializer=_work_for, initargs=(os.getpid(),))
        return self._others


def _work_for(main: int) -> None:
    """In another process, at its start: one thread, and no life after the main process."""
    torch.set_num_threads(1)
    Thread(target=_end_with, args=(os.pidfd_open(main),), daemon=True).start()


def _end_with(process: int) -> None:
    """Wait for a process, by its descriptor, to end, and end this one."""
    select.select([process], [], [])
    os._exit(1)
