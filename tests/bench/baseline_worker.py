"""A process of a test: `python baseline_worker.py CONFIG.json OUT`. Two steps of the engine and of the four-pass
baseline from the same weights, in a process of their own since DeepSpeed keeps state in its; writes what they came to.
"""

import json
import sys
from pathlib import Path

import torch
from harmony_fast.engine.accumulate import accumulate
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.distributed import join, leave
from harmony_fast.engine.ema import ShardedEma
from harmony_fast.engine.optimizer import scalars_at
from harmony_fast.engine.zero import Zero
from harmony_fast.harmony.schedules import Clock
from test_baseline import both, views_of


def main(given: Path, out: Path) -> None:
    """given: a configuration as JSON; out: for torch.load."""
    ranks, config = join(), parse_config(json.loads(given.read_text()), "the test")
    model, baseline = both(config, torch.float32)
    views, zero = views_of(config, torch.float32), Zero(model, config, ranks)
    ema, ours, theirs = ShardedEma(zero, model), {}, {}
    for step in (3, 4):  # the prototypes are frozen in the first, and thaw in the second
        clock = Clock(step, 4, 3)
        scalars = scalars_at(config, clock)
        losses = accumulate(zero, [views], clock, ranks, split=False).losses
        zero.step(scalars, clock)
        ema.update(scalars.ema_momentum)
        model.end_step(ranks)
        ours |= {f"{name}.{step}": loss for name, loss in losses.items()}
        theirs |= {f"{name}.{step}": loss for name, loss in baseline.step(views, clock, scalars).items()}
    torch.save({"ours": ours | model.state_dict(), "theirs": theirs | baseline.model.state_dict()}, out)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
