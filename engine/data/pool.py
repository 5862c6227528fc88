"""The worker processes of `prepare`: started once, watched from both sides, without locks a dead one could hold."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

import numpy as np

from ..errors import DataError
from .parts import DIGEST_BYTES, PartFiles, build_part
from .progress import Progress

TICK = 0.2
"""Seconds between two looks at the workers."""


class Board:
    """Shared memory in which each worker notes how far it is, and reads whether to go on.

    Every cell has one writer, so no lock is needed: a queue's lock would stay shut for ever if its holder were killed.
    """

    def __init__(self, context: ForkServerContext, shards: int) -> None:
        self._cells = context.RawArray("Q", 1 + 3 * shards)

    @property
    def stop(self) -> np.ndarray:
        """uint64 [1]: not 0 when the work is called off."""
        return np.frombuffer(self._cells, np.uint64)[:1]

    @property
    def shards(self) -> np.ndarray:
        """uint64 [shards, 3]: process at work on it (0 before and after), images seen, bytes read."""
        return np.frombuffer(self._cells, np.uint64)[1:].reshape(-1, 3)


class Tally:
    """Samples in the chunks that are done, in order and without a gap; duplicates count once."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._total = 0
        self._chunks = 0
        self._waiting: dict[int, tuple[int, bytes]] = {}
        self._seen = set[bytes]()

    def add(self, chunk: int, count: int, digests: bytes) -> None:
        """A chunk is done: samples accepted, and their digests where duplicates are to be dropped."""
        self._waiting[chunk] = count, digests
        while self.limit is not None and self._chunks in self._waiting:
            count, digests = self._waiting.pop(self._chunks)
            self._chunks += 1
            if digests:
                before = len(self._seen)
                self._seen.update(digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES))
                count = len(self._seen) - before
            self._total += count

    @property
    def enough(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self._total >= self.limit


def read_chunks(files: list[PartFiles], workers: int, bar: Progress) -> int:
    """Make the parts of all chunks in `workers` processes; returns how many chunks were read.

    With a limit, stops early: as soon as the first chunks hold enough. Raises DataError where a shard cannot be opened
    or a worker died, naming the shard; OSError where a part cannot be written.
    """
    context = multiprocessing.get_context("forkserver")
    # One process imports, all workers are forked from it; but nothing is forked from this one, which may have threads.
    context.set_forkserver_preload(["harmony_fast.engine.data.clip_tokenizer", "harmony_fast.engine.data.pool"])
    board = Board(context, len(files))
    workers = max(1, min(workers, len(files)))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(board,))
    children: dict[int | None, BaseProcess] = {}
    try:
        return _run(pool, files, 2 * workers, lambda: _look(board, children, bar))
    except BrokenProcessPool:
        pool.shutdown()
        raise DataError(_obituary(board, children, files)) from None
    finally:
        board.stop[0] = 1
        pool.shutdown(cancel_futures=True)


def _run(pool: ProcessPoolExecutor, files: list[PartFiles], ahead: int, look: Callable[[], None]) -> int:
    tally = Tally(files[0].rules.limit)
    pending: dict[Future[tuple[int, bytes]], int] = {}
    submitted = 0
    while True:
        while submitted < len(files) and len(pending) < ahead and not tally.enough:
            pending[pool.submit(_work, submitted, files[submitted])] = submitted
            submitted += 1
        look()
        if not pending:
            return submitted
        for future in wait(pending, TICK, FIRST_COMPLETED).done:
            tally.add(pending.pop(future), *future.result())


def _look(board: Board, children: dict[int | None, BaseProcess], bar: Progress) -> None:
    # Remembered because the pool forgets its processes when it breaks; their exit codes say which one died by itself.
    children.update({child.pid: child for child in multiprocessing.active_children()})
    _, images, position = board.shards.sum(0).tolist()
    bar.read(images, position)


def _obituary(board: Board, children: dict[int | None, BaseProcess], files: list[PartFiles]) -> str:
    at_work = {shard: int(pid) for shard, pid in enumerate(board.shards[:, 0]) if pid}
    codes = {shard: children[pid].exitcode for shard, pid in at_work.items() if pid in children}
    # The pool itself ends the others with SIGTERM.
    died = [shard for shard, code in codes.items() if code not in (None, 0, -signal.SIGTERM)] or sorted(at_work)
    names = ", ".join(dict.fromkeys(files[shard].chunk.name for shard in died)) or "its first shard"
    how = {f"signal {-code}" if code < 0 else f"exit status {code}" for code in map(codes.get, died) if code}
    return (
        f"{names}: a worker died while reading it ({', '.join(sorted(how)) or 'cause unknown'}; out of memory?); "
        "run the same command again: finished shards are kept"
    )


_board: Board
"""In a worker: where it notes its progress."""


def _start_worker(board: Board) -> None:
    global _board
    _board = board
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent calls the work off
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Workers wait on a pipe that they themselves hold open: after a kill -9 of the parent they would stay for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: int, files: PartFiles) -> tuple[int, bytes]:
    """Make a part; its number of samples, and their digests where a limit counts them before duplicates are known."""
    cells = _board.shards[shard]
    stop = _board.stop

    def report(images: int, position: int) -> bool:
        cells[1:] = images, position
        return not stop[0]

    cells[0] = os.getpid()
    part = build_part(files, report)
    cells[:] = 0, len(part.rows) + len(part.rejects), files.chunk.size
    return len(part.rows), part.digests if files.rules.limit is not None else b""
