"""One rank of a test: `python steps_worker.py SETTINGS.json OUT`. Trains a tiny model under each setting in turn, with
the engine's own passes, optimizer and EMA on made-up samples, and writes losses and weights to OUT/<setting>.pt.
"""

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harmony_fast.engine.build import build_model, count_micro_batches
from harmony_fast.engine.checkpoint import Checkpoints, consolidated_weights
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.data.batch import RawBatch
from harmony_fast.engine.data.views import StepViews
from harmony_fast.engine.distributed import Ranks, join, leave
from harmony_fast.engine.ema import ShardedEma
from harmony_fast.engine.step import step as take_step
from harmony_fast.engine.zero import Zero
from harmony_fast.harmony.schedules import Clock

STEPS_PER_EPOCH = 2
COLLECTIVES = {"all_reduce": "tensor", "all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input"}
"""The collectives that carry gradients and parameters, and their largest tensor's name"""
sent: Counter[str] = Counter()
"""Bytes of those tensors so far"""


def count_bytes() -> None:
    """Count from now on; before DeepSpeed takes the functions."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs.get(COLLECTIVES[name], args[name == "reduce_scatter_tensor" :][0] if args else None)
            sent[name] += tensor.nbytes
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name, getattr(dist, name)))


def samples(config: RunConfig, step: int, ranks: Ranks) -> RawBatch:
    """This rank's samples of a step: the same data set whatever the number of ranks."""
    size, v = config.data.batch_size, config.views
    g = torch.Generator().manual_seed(step)
    index = torch.randint(0, 1000, (size,), generator=g)
    large = torch.randint(0, 256, (size, v.global_crops, v.global_size, v.global_size, 3), generator=g)
    small = torch.randint(0, 256, (size, v.local_crops, v.local_size, v.local_size, 3), generator=g)
    tokens = torch.zeros(size, config.model.text.context, dtype=torch.int64)
    for row in tokens:
        length = int(torch.randint(4, len(row) + 1, (), generator=g))
        row[0], row[length - 1] = config.model.text.vocabulary - 2, config.model.text.vocabulary - 1
        row[1 : length - 1] = torch.randint(1, config.model.text.vocabulary - 2, (length - 2,), generator=g)
    own = slice(ranks.rank * size // ranks.world_size, (ranks.rank + 1) * size // ranks.world_size)
    return RawBatch(large[own].byte(), small[own].byte(), tokens[own], index[own])


def train(config: RunConfig, ranks: Ranks, steps: int, save: bool = False) -> dict[str, Any]:
    """Losses of each step (mean over ranks), the weights after them, and counted bytes.

    Goes on from the newest checkpoint in the run folder. save: leave a checkpoint.
    """
    torch.manual_seed(config.seed)
    model = build_model(config)
    zero = Zero(model, config, ranks)
    ema = ShardedEma(zero, model)
    checkpoints = Checkpoints(config.run_dir, ranks, 2)
    saved, _ = checkpoints.latest()
    done = checkpoints.load(saved, zero, ema)["step"] if saved else 0
    model.train()
    losses, norms, programs, messages, before = [], [], [], Counter(), Counter()
    for step in range(done, steps):
        clock = Clock(step, STEPS_PER_EPOCH, config.epochs)
        views = StepViews(config, samples(config, step, ranks), clock, parts=count_micro_batches(config, ranks))
        output = take_step(config, zero, ema, views, clock, ranks).output
        losses.append(float(ranks.sum(output.loss.detach().double())) / ranks.world_size)
        norms.append(float(zero.gradient_norm()))
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        messages, before = sent - before, sent.copy()
    if save:
        checkpoints.save(steps, zero, ema)
        assert not checkpoints.wait()
    shards = zero.partition.shards()
    held = {"masters": sum(s.master.nbytes for s in shards), "ema": sum(s.nbytes for s in ema.shards)}
    counts = {"bytes": held, "messages": dict(messages)}  # messages: of the last step
    counts["loss_scale"] = zero.loss_scale
    counts["programs"] = programs  # compiled by torch so far, after each step
    counts["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"losses": losses, "norms": norms, "weights": consolidated_weights(zero, ema), **counts}


def main(settings: Path, out: Path) -> None:
    """All settings of the file: {"name": [configuration, steps, whether to save], ...}."""
    count_bytes()
    if backend := os.environ.get("COMPILED_BY"):
        torch.compile = functools.partial(torch.compile, backend=backend)
    ranks = join()
    for name, (raw, steps, save) in json.loads(settings.read_text()).items():
        result = train(parse_config(raw, name), ranks, steps, save)
        if ranks.is_main:
            torch.save(result, out / f"{name}.pt")
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
