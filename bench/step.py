"""`harmony-fast bench step`: our training step against the four-pass baseline, and CLIP alone against open_clip.

Each case is a tower, a number of samples and a precision. All rivals start from the same seed and get the same
samples; the baseline's losses are held against ours. Peak memory, breakdown and profile come from steps that are not
timed; the timed steps alternate in one process. Memory is what torch has allocated on a GPU, and the counted bytes of
live tensors on a CPU. Writes step.json and step.png to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ..engine.backends import DTYPES
from ..engine.config import RunConfig, load_config, with_overrides
from ..engine.data.batch import RawBatch
from ..engine.data.views import StepViews
from ..engine.distributed import Ranks, join
from ..engine.half_on_cpu import ProductsInFloat, products_for
from ..engine.live_bytes import LiveBytes
from ..harmony.views import Views
from .baseline import unwatched
from .comparison import release
from .counts import CLOCK, count_baseline, count_ours
from .machine import describe_machine, results_folder
from .profiling import summarise
from .step_report import plot, show
from .step_rivals import PARTS, Baseline, OpenClip, Ours, Rival, count_open_clip, made_samples
from .timing import Stopwatch, Timing, alternate, product_rate

CONFIGS = Path(__file__).parents[1] / "configs"
OURS, BASELINE, OPEN_CLIP = "harmony-fast", "four passes", "open_clip"
BASELINE_FP32 = "four passes, fp32"
VARIANTS = {
    "compiled": ["compile=true"], "split": ["pass=split"], "micro-batches": ["data.micro_batch_size={quarter}"],
    "recomputed": ["activation_checkpointing.image=1", "activation_checkpointing.text=1"],
}  # fmt: skip
"""Ours in other ways; micro-batches: four of them, with the contrast of the whole step"""
GOALS = {"cpu": {"fp32": (1.5, 0.5), "bf16": (2.5, 0.5)}, "cuda": {"bf16": (3.0, 0.35)}}
"""By device and precision: how many times the baseline's samples/s, and which share of its peak memory, ours is to
reach; with bf16 on a CPU, of the baseline in fp32"""
LARGEST_DIFFERENCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Relative, between ours and the baseline's losses of the first step; fp32 products may be TF32 on a GPU"""


class Contender(NamedTuple):
    """Who takes part."""

    make: Callable[[], Rival]
    flops: int
    """Operations of the forward and backward passes of one step"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if losses differ where they must not."""
    options = _parse(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = join()
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    report: dict[str, Any] = {
        "machine": describe_machine(), "device": ranks.device.type, "rounds": options.rounds, "cases": [],
        "left_out": [],
    }  # fmt: skip
    for kind in options.only or ("step", "clip"):
        for tower in options.tower:
            for micro in options.micro:
                for precision in options.precision:
                    named = f"{kind} {tower} {micro} {precision}"
                    if why := _obstacle(precision, ranks.device):
                        report["left_out"].append(f"{named}: {why}")
                        continue
                    report["cases"].append(measure_case(kind, tower, micro, precision, ranks, options))
                    show(report["cases"][-1], console)
                    # After each: what was measured stays if the machine is taken away.
                    (folder / "step.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in report["left_out"]:
        console.print(f"left out: {line}")
    if report["cases"]:
        plot(report, folder / "step.png")
        console.print(f"results in {folder}", soft_wrap=True)
    return 0 if all(case["right"] for case in report["cases"]) else 1


def _obstacle(precision: str, device: torch.device) -> str | None:
    """Why a precision is not worth measuring here."""
    slow = isinstance(products_for(device, DTYPES[precision]), ProductsInFloat)
    return "this processor has no bf16 products" if slow else None


def measure_case(
    kind: str, tower: str, micro: int, precision: str, ranks: Ranks, options: argparse.Namespace
) -> dict[str, Any]:
    """One case as plain data."""
    config, device = configured(kind, tower, micro, precision, options.set), ranks.device
    batch = made_samples(config)
    views = StepViews(config, batch, CLOCK)[0].to(torch.device("meta"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    everyone = contenders(kind, config, batch, views, ranks, options.variant)
    results: dict[str, dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    for name, contender in everyone.items():
        try:
            results[name] = examine(contender.make, device, options.profile)
        except torch.OutOfMemoryError:
            not_run[name] = "out of memory"
        release(device)
    rate = product_rate(micro * tokens_a_sample(config), config.model.image.width, DTYPES[precision], device)
    timed, in_turn = time_all({name: everyone[name].make for name in results}, device, options)
    for name, timing in timed.items():
        per_second, flops = 1e3 * micro / timing.median, everyone[name].flops / micro
        results[name] |= {
            "milliseconds": timing.median, "quartiles": [timing.low, timing.high], "rounds": timing.samples,
            "samples_per_second": per_second, "flops_per_sample": flops, "mfu": flops * per_second / rate,
        }  # fmt: skip
    return {
        "kind": kind, "tower": tower, "micro": micro, "precision": precision,
        "objectives": [*config.objectives.active()], "caption_tokens": float(views.lengths.float().mean()),
        "product_rate": rate, "in_turn": in_turn, "results": results, "not_run": not_run,
        **compared(kind, precision, device, results),
    }  # fmt: skip


def contenders(
    kind: str, config: RunConfig, batch: RawBatch, views: Views, ranks: Ranks, variants: Sequence[str]
) -> dict[str, Contender]:
    """Everyone who takes part. views: the samples' on the meta device, for counting."""
    ours, device = count_ours(config, views).flops, ranks.device
    found = {OURS: Contender(partial(Ours, config, batch, ranks), ours)}
    for name in variants:
        quarter = config.data.batch_size // 4
        chosen = with_overrides(config, [setting.format(quarter=quarter) for setting in VARIANTS[name]])
        found[f"{OURS}, {name}"] = Contender(partial(Ours, chosen, batch, ranks), ours)
    if kind == "clip":
        found[OPEN_CLIP] = Contender(partial(OpenClip, config, batch, device), count_open_clip(config))
        return found
    theirs = count_baseline(config, views).flops
    found[BASELINE] = Contender(partial(Baseline, config, batch, device), theirs)
    if config.precision != "fp32" and device.type == "cpu":
        full = with_overrides(config, ["precision=fp32"])
        found[BASELINE_FP32] = Contender(partial(Baseline, full, batch, device), theirs)
    return found


def configured(kind: str, tower: str, micro: int, precision: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a case: the paper's, or the recipe of CLIP, on one device."""
    path = CONFIGS / ("cc3m.yaml" if kind == "step" else "recipes/clip.yaml")
    # One rank in fp32 needs no second copy of its weights, which the sharded stages keep.
    stage = 0 if precision == "fp32" else 1
    return load_config(path, [
        f"model.image.name={tower}", f"data.batch_size={micro}", f"precision={precision}", f"zero.stage={stage}",
        *overrides,
    ])  # fmt: skip


def tokens_a_sample(config: RunConfig) -> int:
    """Image tokens of a sample in the student's packed pass, if each of its crops has something masked."""
    v, patch = config.views, config.model.image.patch_size
    whole, small = 1 + (v.global_size // patch) ** 2, 1 + (v.local_size // patch) ** 2
    seen = 1 + round((whole - 1) * (1 - v.pixel_mask_ratio))
    objectives = config.objectives.active()
    tokens = whole if "contrastive" in objectives else 0
    tokens += v.global_crops * whole + v.local_crops * small if "self_distillation" in objectives else 0
    return tokens + (v.global_crops * seen if "reconstruction" in objectives else 0)


def examine(make: Callable[[], Rival], device: torch.device, profile: bool) -> dict[str, Any]:
    """A rival alone: losses of its first step, peak memory of its second, breakdown of its third, perhaps a profile."""
    rival, losses, held, peak = two_steps(make, device)
    rival.watch = stopwatch = Stopwatch(device)
    with stopwatch("rest"):
        rival.step()
    rival.watch = unwatched
    parts = {part: 1e3 * stopwatch.seconds[part] for part in (*PARTS, "rest")}
    found = {"losses": losses, "peak_mib": peak / 2**20, "held_mib": held / 2**20, "breakdown_ms": parts}
    return found | ({"profile": summarise(rival.step, device)} if profile else {})


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


def time_all(
    makers: dict[str, Callable[[], Rival]], device: torch.device, options: argparse.Namespace
) -> tuple[dict[str, Timing], bool]:
    """All rivals in turn, or, where they do not fit beside each other, one after the other; and whether in turn."""
    try:
        work = {name: make().step for name, make in makers.items()}
        return alternate(work, device, rounds=options.rounds, seconds=options.seconds), True
    except torch.OutOfMemoryError:
        work = {}
    timed: dict[str, Timing] = {}
    for name, make in makers.items():
        release(device)
        timed |= alternate({name: make().step}, device, rounds=options.rounds, seconds=options.seconds)
    return timed, False


def compared(kind: str, precision: str, device: torch.device, results: dict[str, Any]) -> dict[str, Any]:
    """Ours against each other rival, whether the losses are the same, and the goals."""
    ours, others = results.get(OURS), {n: r for n, r in results.items() if not n.startswith(OURS)}
    if ours is None:
        return {"right": False, "speedup": {}, "memory": {}, "loss_difference": {}, "goals": {}}
    differences = {
        name: max(abs(ours["losses"][o] / value - 1) for o, value in other["losses"].items())
        for name, other in others.items() if name != OPEN_CLIP
    }  # fmt: skip
    goal = GOALS[device.type].get(precision) if kind == "step" else None
    return {
        "right": all(d <= LARGEST_DIFFERENCE[precision] for d in differences.values()),
        "loss_difference": differences,
        "speedup": {n: ours["samples_per_second"] / r["samples_per_second"] for n, r in others.items()},
        "memory": {n: ours["peak_mib"] / r["peak_mib"] for n, r in others.items()},
        "goals": {"speedup": goal[0], "memory": goal[1]} if goal else {},
    }  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench step", description=__doc__.split("\n\n")[1])
    gpu = torch.cuda.is_available()
    parser.add_argument("--only", nargs="+", choices=("step", "clip"), help="all objectives, or CLIP alone")
    parser.add_argument("--tower", nargs="+", default=["ViT-S/16", "ViT-B/16"], help="default: %(default)s")
    parser.add_argument(
        "--micro", nargs="+", type=int, default=[96] if gpu else [8], help="samples of a step (default: %(default)s)"
    )
    precisions = ("fp32", "bf16")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["bf16"] if gpu else [*precisions])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=[], help="ours in other ways, too")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every rival")
    parser.add_argument("--rounds", type=int, default=15 if gpu else 5, help="timed steps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="end a case after so long and three rounds")
    parser.add_argument("--profile", action="store_true", help="the operators that take longest, and gaps between them")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.png")
    options = parser.parse_args(arguments)
    if min(options.micro) < 2:
        parser.error("--micro must be at least 2: samples are compared with each other")
    if "compiled" in options.variant and not gpu:
        parser.error("--variant compiled needs a GPU: on a CPU memory is counted operator by operator")
    return options


if __name__ == "__main__":
    sys.exit(main())
