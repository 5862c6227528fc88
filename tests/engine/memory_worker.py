"""One rank of a test: `python memory_worker.py SETTINGS.json OUT`. Trains a model two steps under each setting,
with every tensor counted, and writes the most bytes that were alive in the second step to OUT/<setting>.json.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from harmony_fast.engine.accumulate import accumulate
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.data.batch import RawBatch
from harmony_fast.engine.data.views import StepViews
from harmony_fast.engine.distributed import Ranks, join, leave
from harmony_fast.engine.ema import ShardedEma
from harmony_fast.engine.live_bytes import LiveBytes
from harmony_fast.engine.memory import imagined_samples
from harmony_fast.engine.train import build_model, count_micro_batches
from harmony_fast.engine.zero import Zero, scalars_at
from harmony_fast.harmony.schedules import Clock


def samples(config: RunConfig, ranks: Ranks) -> RawBatch:
    """Noise in the shapes of the samples that a prediction imagines."""
    imagined = imagined_samples(config, ranks.world_size)
    crops = (torch.randint(0, 256, c.shape).byte() for c in (imagined.global_crops, imagined.local_crops))
    return RawBatch(*crops, imagined.tokens, imagined.index)


def measure(config: RunConfig, ranks: Ranks) -> float:
    """Bytes alive at the fullest moment of a step."""
    live, clock = LiveBytes("cpu"), Clock(0, 10, config.epochs)
    torch.manual_seed(0)
    with live:
        model = build_model(config)
        zero = Zero(model, config, ranks)
        ema = ShardedEma(zero, model)
        model.train()
        for _ in range(2):
            views = StepViews(config, samples(config, ranks), clock, parts=count_micro_batches(config, ranks))
            gc.collect()
            live.peak = 0.0
            accumulate(zero, views, clock, ranks, config.pass_mode == "split")
            scalars = scalars_at(config, clock)
            zero.step(scalars, clock)
            ema.update(scalars.ema_momentum)
            model.end_step(ranks)
            del views
    return live.peak


def main(settings: Path, out: Path) -> None:
    """All settings of the file: {"name": configuration, ...}."""
    ranks = join()
    for name, raw in json.loads(settings.read_text()).items():
        peak = measure(parse_config(raw, name), ranks)
        if ranks.is_main:
            (out / f"{name}.json").write_text(json.dumps(peak))
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
