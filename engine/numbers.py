"""The numbers that a run logs."""

from __future__ import annotations

import resource
import time

import torch

from ..harmony.schedules import Clock
from .auto_memory import Settled
from .distributed import Ranks
from .health import CollapseDetector, Divergence
from .log import Log
from .sizes import GIB
from .step import Step
from .zero import Zero


class Numbers:
    """What is logged of a step. Reads from the device, so only logged steps pay for it."""

    def __init__(self, settled: Settled, log: Log, done: int, ranks: Ranks) -> None:
        self._settled, self._log, self._ranks = settled, log, ranks
        self._collapse = CollapseDetector(settled.config)
        self._done, self._time = done, time.perf_counter()
        self._more: dict[str, float] = {}

    def add(self, evaluated: dict[str, float]) -> None:
        """Have metrics of an evaluation in the next entry, and its time not counted as the steps'."""
        self._more = evaluated
        self._time += evaluated["evaluate/seconds"]

    def record(self, done: int, result: Step, clock: Clock, zero: Zero, divergence: Divergence) -> None:
        """Losses and metrics averaged over ranks, schedules, speed and memory. All ranks must call."""
        output, scalars = result.output, result.scalars
        named = {"loss": output.loss.detach(), **{f"loss/{n}": v for n, v in output.losses.items()}, **output.metrics}
        values = torch.stack([v.double().cpu() for v in named.values()]).to(self._ranks.device)
        means = (self._ranks.sum(values) / self._ranks.world_size).tolist()
        entry = {"step": done, "epoch": clock.epoch, **dict(zip(named, means, strict=True))}
        entry["gradient_norm"] = float(zero.gradient_norm())
        entry.update(lr=scalars.lr, weight_decay=scalars.weight_decay, ema_momentum=scalars.ema_momentum)
        entry |= memory_used(self._settled, self._ranks) | divergence.numbers()
        if zero.dtype == torch.float16:
            entry["precision/loss_scale"] = zero.loss_scale
        self._log.record({**entry, **self._more, "samples_per_second": self._rate(done)})
        self._more = {}
        for sign in self._collapse.look(entry):
            self._log.warn(f"collapse? {sign}")

    def _rate(self, done: int) -> float:
        """Samples per second of all ranks since the last logged step."""
        now = time.perf_counter()
        rate = (done - self._done) * self._settled.config.data.batch_size / (now - self._time)
        self._done, self._time = done, now
        return rate


def memory_used(settled: Settled, ranks: Ranks) -> dict[str, float]:
    """GiB at the fullest moment so far, of the rank that needed most; and as predicted, where a plan was made.

    On GPUs of tensors; on the CPU of the process, Python and its libraries included.
    """
    if ranks.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(ranks.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = {"memory/peak_gib": float(ranks.most(torch.tensor(peak / GIB, dtype=torch.float64)))}
    return used | ({"memory/predicted_gib": settled.predicted / GIB} if settled.predicted else {})
