"""Every scalar that changes over time, as pure functions of the step (0-based)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where a run stands."""

    step: int
    """Optimizer steps done before this one"""
    steps_per_epoch: int
    epochs: int

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def warmup_cosine(step: int, base: float, final: float, total: int, warmup: int = 0) -> float:
    """Linear warm-up from 0 to `base` (both reached), then a half cosine towards `final`, which the step after the
    last would reach: final + (base - final) / 2 (1 + cos(pi i / (total - warmup))).
    """
    if step < warmup:
        return base * step / (warmup - 1) if warmup > 1 else 0.0
    phase = (step - warmup) / max(total - warmup, 1)
    return final + (base - final) * (1 + math.cos(math.pi * min(phase, 1.0))) / 2


def ramp_cosine(step: int, start: float, end: float, length: int) -> float:
    """A half cosine from `start` to `end` over `length` steps, then constant."""
    return end if step >= length else end + (start - end) * (1 + math.cos(math.pi * step / length)) / 2


def ramp_steps(step: int, start: float, end: float, length: int) -> float:
    """Linear from `start` at step 0 to `end` at step length - 1, then constant."""
    return end if step >= length - 1 else start + (end - start) * step / (length - 1)


def ramp_linear(clock: Clock, start: float, end: float, epochs: int, by_epoch: bool = False) -> float:
    """Linear from `start` to `end` over some epochs, then constant.

    by_epoch: constant within an epoch, with `end` reached in the last of these epochs, as the authors' code does;
    otherwise it moves with every step.
    """
    position = clock.epoch if by_epoch else clock.step / clock.steps_per_epoch
    length = epochs - 1 if by_epoch else epochs
    if position >= epochs or length <= 0:
        return end if position >= epochs else start
    return start + (end - start) * min(position / length, 1.0)
