"""A rival of `harmony-fast bench step` in a process of its own, which takes steps when it is asked to.

One heap for all would not do: what one rival leaves in it makes page faults in the next one's steps, a quarter of their
time on a CPU. All have malloc keep its pages, as `harmony-fast train` does.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..engine.config import RunConfig
from ..engine.data.batch import RawBatch
from ..engine.distributed import Ranks, join
from ..engine.host_memory import keep_pages_in_children
from ..engine.live_bytes import LiveBytes
from .baseline import unwatched
from .profiling import summarise
from .step_rivals import PARTS, Rival, made_samples
from .timing import Stopwatch, measure

Make = Callable[[RunConfig, RawBatch, Ranks], Rival]
"""What builds a rival: a class of `step_rivals`"""


class Apart:
    """A rival in a process that ends with the `with` block.

    Its methods raise torch.OutOfMemoryError if it has run out of memory, be it that the system has killed it, and
    RuntimeError, with its last words above, if it has failed otherwise.
    """

    def __init__(self, make: Make, config: RunConfig) -> None:
        keep_pages_in_children()
        context = get_context("forkserver")  # which imports everything once, and computes nothing
        context.set_forkserver_preload([__name__])
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, config, far), daemon=True)
        self._process.start()
        far.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()

    def examine(self, profile: bool) -> dict[str, Any]:
        """See `examine`. What it took stays with the process."""
        return self._ask(profile)

    def turn(self) -> float:
        """Milliseconds of a step, to its end; the first time the rival is made before."""
        return self._ask("step")

    def _ask(self, question: object) -> Any:
        try:
            self._pipe.send(question)
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            if self._process.exitcode == -signal.SIGKILL:
                raise torch.OutOfMemoryError("the system has killed the process") from None
            raise RuntimeError(f"a rival's process ended with exit status {self._process.exitcode}") from None
        if isinstance(answer, torch.OutOfMemoryError):
            raise answer
        return answer


def _serve(make: Make, config: RunConfig, pipe: Connection) -> None:
    """Examine the rival or take steps, as is asked, until the process is ended."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = join()
    build = partial(make, config, made_samples(config), ranks)
    rival: Rival | None = None
    try:
        while True:
            question = pipe.recv()
            if question == "step":
                rival = rival or build()
                pipe.send(measure(rival.step, ranks.device))
            else:
                pipe.send(examine(build, ranks.device, profile=question))
    except torch.OutOfMemoryError as error:
        pipe.send(error)


def examine(make: Callable[[], Rival], device: torch.device, profile: bool) -> dict[str, Any]:
    """Of a new rival: losses of its first step, peak memory of its second, breakdown of its third, perhaps a profile;
    and the memory of the process or of the GPU that all this has taken."""
    rival, losses, held, peak = two_steps(make, device)
    rival.watch = stopwatch = Stopwatch(device)
    with stopwatch("rest"):
        rival.step()
    rival.watch = unwatched
    parts = {part: 1e3 * stopwatch.seconds[part] for part in (*PARTS, "rest")}
    found = {"losses": losses, "peak_mib": peak / 2**20, "held_mib": held / 2**20, "breakdown_ms": parts}
    found |= {"profile": summarise(rival.step, device)} if profile else {}
    return found | {"resident_mib": _most_taken(device) / 2**20}


def _most_taken(device: torch.device) -> int:
    """The most bytes that torch has reserved on a GPU, or that were resident in this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def two_steps(make: Callable[[], Rival], device: torch.device) -> tuple[Rival, dict[str, float], float, float]:
    """A new rival after two steps, the losses of the first, and the bytes that it holds between steps and that are
    alive at the fullest moment of the second: allocated by torch on a GPU, of live tensors on a CPU."""
    if device.type != "cuda":
        with LiveBytes(device) as live:
            rival = make()
            losses = _numbers(rival.step())
            held, live.peak = live.now.total(), 0.0
            rival.step()
        return rival, losses, held, live.peak
    before = torch.cuda.memory_allocated(device)
    rival = make()
    losses = _numbers(rival.step())
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) - before
    rival.step()
    torch.cuda.synchronize(device)
    return rival, losses, held, torch.cuda.max_memory_allocated(device) - before


def _numbers(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(loss) for name, loss in losses.items()}
