"""The training step."""

from __future__ import annotations

from typing import NamedTuple

from ..harmony.model import StepOutput
from ..harmony.schedules import Clock
from .accumulate import accumulate
from .config import RunConfig
from .data.views import StepViews
from .distributed import Ranks
from .ema import ShardedEma
from .optimizer import Scalars, scalars_at
from .zero import Zero


class Step(NamedTuple):
    """What an optimizer step has left."""

    output: StepOutput
    scalars: Scalars
    taken: bool
    """Whether anything was changed: not where a gradient is not finite"""
    norms: dict[str, float]
    """Norms of the gradients by parameter, if asked for"""


def step(
    config: RunConfig, zero: Zero, ema: ShardedEma, views: StepViews, clock: Clock, ranks: Ranks, norms: bool = False
) -> Step:
    """Losses and gradients of all micro-batches; clipping and AdamW; the EMA teacher and the centers.

    All ranks must call. norms: whether gradient norms are wanted.
    """
    scalars = scalars_at(config, clock)
    output = accumulate(zero, views, clock, ranks, config.pass_mode == "split", config.kept_graphs)
    found = zero.gradient_norms() if norms else {}
    taken = zero.step(scalars, clock)
    if taken:
        ema.update(scalars.ema_momentum)
        zero.model.end_step(ranks)
    else:
        zero.model.forget_step()
    return Step(output, scalars, taken, found)
