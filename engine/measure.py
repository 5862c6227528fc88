"""How fast this machine is, and how much memory steps take on it: `harmony-fast plan --measure`, `memory: auto`."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..harmony.schedules import Clock
from .backends import has_bf16, settle_precision, use_backends
from .build import build_model, count_micro_batches
from .config import RunConfig, dump_config, load_config
from .data.batch import RawBatch
from .data.views import StepViews
from .distributed import Ranks, join, launch
from .ema import ShardedEma
from .errors import UserError
from .live_bytes import LiveBytes
from .memory import imagined_samples
from .rates import Rates
from .step import step
from .zero import Zero

REPEATS = 5
"""Of each measurement of a rate; the median counts"""
REACHED = 0.8
"""Of the rate of large products, what a tower's reach among smaller ones; not measured yet"""


def ask(ranks: int, config: RunConfig | None = None) -> dict[str, Any]:
    """What `ranks` new local processes find: the machine's rates, or, of a configuration, what its steps take.

    Raises UserError if they fail.
    """
    with tempfile.TemporaryDirectory(prefix="harmony-fast-") as folder:
        words = ["measure", str(Path(folder) / "found.json")]
        if config is not None:
            (Path(folder) / "config.yaml").write_text(dump_config(config), encoding="utf-8")
            words.append(str(Path(folder) / "config.yaml"))
        launch(ranks, words)
        return json.loads((Path(folder) / "found.json").read_text())


def answer(out: Path, config: Path | None) -> None:
    """One of those processes: the main rank writes what was found to `out` as JSON."""
    ranks = join()
    found = measure_steps(load_config(config), ranks) if config else asdict(measure_rates(ranks))
    if ranks.is_main:
        out.write_text(json.dumps(found))
    ranks.barrier()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host: libraries on the GPU say so in words alone."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def measure_steps(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Three steps on noise: bytes of tensors at the fullest moment of the second, seconds of the third.

    Of several ranks the most. On a GPU also what the allocator reserved and what CUDA takes beside it. If memory runs
    out: {"out_of_memory": true}; on several ranks, which would wait for one that has failed, a UserError.
    """
    config = settle_precision(config, has_bf16(ranks.device))
    use_backends(config, ranks.device)
    try:
        found = _steps(config, ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if ranks.world_size > 1:
            raise UserError(
                f"memory ran out on rank {ranks.rank}; is the card shared, or smaller than asked?"
            ) from None
        return {"out_of_memory": True}
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    return dict(zip(found, ranks.most(values).tolist(), strict=True))


def _steps(config: RunConfig, ranks: Ranks) -> dict[str, float]:
    on_gpu = ranks.device.type == "cuda"
    live, clock = None if on_gpu else LiveBytes("cpu"), Clock(0, 10, config.epochs)
    torch.manual_seed(0)
    with live or nullcontext():
        model = build_model(config).to(ranks.device)
        zero = Zero(model, config, ranks)
        ema = ShardedEma(zero, model)
        model.train()
        batch = noise(config, ranks)

        def take_step() -> None:
            views = StepViews(config, batch, clock, ranks.device, count_micro_batches(config, ranks))
            step(config, zero, ema, views, clock, ranks)

        take_step()
        gc.collect()
        if live is None:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        else:
            live.peak = 0.0
        take_step()
    seconds = _timed(take_step, ranks.device)
    if live is not None:
        return {"tensors": live.peak, "seconds": seconds}
    free, total = torch.cuda.mem_get_info(ranks.device)
    return {
        "tensors": torch.cuda.max_memory_allocated(ranks.device), "seconds": seconds,
        "reserved": torch.cuda.max_memory_reserved(ranks.device),
        "context": total - free - torch.cuda.memory_reserved(ranks.device),
    }  # fmt: skip


def noise(config: RunConfig, ranks: Ranks) -> RawBatch:
    """Noise in the shapes of the samples that a prediction imagines, in memory as a loader's."""
    imagined, pin = imagined_samples(config, ranks.world_size), ranks.device.type == "cuda"
    global_crops, local_crops = (
        torch.empty(crops.shape, dtype=torch.uint8, pin_memory=pin).random_(0, 256)
        for crops in (imagined.global_crops, imagined.local_crops)
    )
    return RawBatch(global_crops, local_crops, imagined.tokens, imagined.index)


def measure_rates(ranks: Ranks) -> Rates:
    """Of this machine: products of the towers' shapes, copies in memory, to the host and to other ranks, launches."""
    device = ranks.device
    on_gpu = device.type == "cuda"
    half = torch.bfloat16 if has_bf16(device) or not on_gpu else torch.float16
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    size = 2**28 if on_gpu else 2**26
    near, other = (torch.ones(size // 4, device=device) for _ in range(2))
    host = torch.ones(size // 4, pin_memory=on_gpu)
    small = torch.ones(16, device=device)
    link = 1e12  # nobody to talk to
    if ranks.world_size > 1:
        share = 2 * (ranks.world_size - 1) / ranks.world_size  # of a message, what a rank of a ring sends
        link = share * size / _seconds(lambda: ranks.sum(near), device)
    return Rates(
        name=torch.cuda.get_device_name(device) if on_gpu else "this machine's processor",
        # A processor without bf16 instructions may be fifty times slower at it.
        flops=REACHED * _products(half, 16384 if on_gpu else 64, device),
        single=REACHED * _products(torch.float32, 16384 if on_gpu else 2048, device),
        memory=2 * size / _seconds(lambda: near.copy_(other), device),
        link=link,
        host_link=size / _seconds(lambda: near.copy_(host), device),
        host_memory=3 * size / _seconds(lambda: host.add_(host), torch.device("cpu")),
        launch=_seconds(lambda: [small.add_(1) for _ in range(500)], device) / 500,
    )


def _products(dtype: torch.dtype, rows: int, device: torch.device) -> float:
    """Operations per second of [rows, 768] [768, 3072]."""
    a, b = torch.randn(rows, 768, dtype=dtype, device=device), torch.randn(768, 3072, dtype=dtype, device=device)
    return 2 * rows * 768 * 3072 / _seconds(lambda: a @ b, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a piece of work that was done once before."""
    taken = [_timed(work, device) for _ in range(1 + REPEATS)]
    return sorted(taken[1:])[REPEATS // 2]


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work."""
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
