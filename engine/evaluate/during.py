"""Evaluation while a run trains: `evaluate_every`."""

from __future__ import annotations

import time

from ..build import count_micro_batches
from ..config import RunConfig
from ..distributed import Ranks
from ..evaluated import choose_branch
from ..zero import Zero
from . import evaluate_towers
from .chance import with_levels
from .share import Share


def evaluate_now(config: RunConfig, zero: Zero, ranks: Ranks) -> dict[str, float]:
    """Metrics of `evaluate_tasks` by "evaluate/task/metric", and the seconds that they took. All ranks must call.

    The weights are the compute copy of the training step, so nothing is held beside them; as many images go through at
    once as in the teacher's pass of a micro-batch at most, so nothing more is needed. No random number is drawn.
    """
    begun = time.perf_counter()
    samples = config.data.batch_size // ranks.world_size // count_micro_batches(config, ranks)
    most = min(config.evaluate.batch_size, samples * config.views.global_crops)
    limited = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"batch_size": most})})
    branch = choose_branch(config, zero.model)
    zero.model.eval()
    try:
        with zero.whole(branch):
            found = evaluate_towers(limited, branch, config.evaluate_tasks, Share(ranks.rank, ranks.world_size))
    finally:
        zero.model.train()
    numbers = {f"evaluate/{path}": float(value) for path, value, _ in with_levels(found) if not isinstance(value, str)}
    return {**numbers, "evaluate/seconds": time.perf_counter() - begun}
