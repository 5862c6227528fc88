"""`harmony-fast bench step`: our training step against the four-pass baseline, and CLIP alone against open_clip.

Each case is a tower, a number of samples and a precision. All rivals start from the same seed and get the same
samples; the baseline's losses are held against ours. On a CPU ours goes through a step in the fewest micro-batches that
take half of the baseline's memory, by counting, with the contrast of all samples. Peak memory, breakdown and profile
come from steps that are not timed; the timed steps of ours alternate with those of one rival after the other, each in a
process of its own, or, where two do not fit into memory, in a new one for each step. Memory is what torch has allocated
on a GPU, and the counted bytes of live tensors on a CPU. Writes step.json and step.png to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ..engine.backends import DTYPES
from ..engine.config import RunConfig, load_config, with_overrides
from ..engine.data.views import StepViews
from ..engine.errors import UserError
from ..engine.half_on_cpu import ProductsInFloat, products_for
from ..engine.host_memory import host_memory
from ..engine.memory import predict
from ..harmony.views import Views
from .counts import CLOCK, baseline_peak, count_baseline, count_ours
from .machine import describe_machine, results_folder
from .step_process import Apart, Make
from .step_report import plot, show
from .step_rivals import Baseline, OpenClip, Ours, count_open_clip, made_samples
from .timing import in_turns, product_rate

CONFIGS = Path(__file__).parents[1] / "configs"
OURS, BASELINE, OPEN_CLIP = "harmony-fast", "four passes", "open_clip"
BASELINE_FP32 = "four passes, fp32"
VARIANTS = {
    "compiled": ["compile=true"], "split": ["pass=split"], "one pass": ["data.micro_batch_size={all}"],
    "micro-batches": ["data.micro_batch_size={quarter}"],
    "recomputed": ["activation_checkpointing.image=1", "activation_checkpointing.text=1"],
}  # fmt: skip
"""Ours in other ways; micro-batches: four of them, with the contrast of the whole step"""
ROOMY = 0.9
"""Share of the memory, the host's or the GPU's, up to which two rivals run beside each other"""
OF_CASES = "commit", "system"
"""What the results of one day may differ in, so that each case says it"""
GOALS = {"cpu": {"fp32": (1.5, 0.5), "bf16": (2.5, 0.5)}, "cuda": {"bf16": (3.0, 0.35)}}
"""By device and precision: how many times the baseline's samples/s, and which share of its peak memory, ours is to
reach; with bf16 on a CPU, of the baseline in fp32"""
LARGEST_DIFFERENCE = {"fp32": 2e-3, "bf16": 5e-2}
"""Relative, between ours and the baseline's losses of the first step; fp32 products may be TF32 on a GPU"""


class Contender(NamedTuple):
    """Who takes part."""

    make: Make
    config: RunConfig
    flops: int
    """Operations of the forward and backward passes of one step"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if losses differ where they must not."""
    options = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = describe_machine()
    report: dict[str, Any] = {"machine": machine, "device": device.type, "cases": [], "left_out": []}
    if options.add and (folder / "step.json").is_file():
        report = added_to(json.loads((folder / "step.json").read_text(encoding="utf-8")), report)
    for kind in options.only or ("step", "clip"):
        for tower in options.tower:
            for micro in options.micro:
                for precision in options.precision:
                    named = f"{kind} {tower} {micro} {precision}"
                    if why := _obstacle(precision, device):
                        report["left_out"].append(f"{named}: {why}")
                        continue
                    case = measure_case(kind, tower, micro, precision, device, options)
                    case |= {key: machine[key] for key in OF_CASES}
                    report["cases"] = [c for c in report["cases"] if not same_case(c, case)] + [case]
                    show(case, console)
                    # After each: what was measured stays if the machine is taken away.
                    (folder / "step.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in report["left_out"]:
        console.print(f"left out: {line}")
    if report["cases"]:
        plot(report, folder / "step.png")
        console.print(f"results in {folder}", soft_wrap=True)
    return 0 if all(case["right"] for case in report["cases"]) else 1


def added_to(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Earlier results, to which cases are added. Raises UserError unless day, machine and versions are the same."""
    differing = [k for k, v in now["machine"].items() if k not in OF_CASES and before["machine"].get(k) != v]
    if differing or before["device"] != now["device"]:
        raise UserError(f"--add: what was measured before differs in {', '.join(differing or ['device'])}")
    return before


def same_case(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are of the same case."""
    return all(one[key] == other[key] for key in ("kind", "tower", "micro", "precision"))


def _obstacle(precision: str, device: torch.device) -> str | None:
    """Why a precision is not worth measuring here."""
    slow = isinstance(products_for(device, DTYPES[precision]), ProductsInFloat)
    return "this processor has no bf16 products" if slow else None


def measure_case(
    kind: str, tower: str, micro: int, precision: str, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """One case as plain data."""
    config = configured(kind, tower, micro, precision, options.set)
    if micro % (options.pieces or 1):
        raise UserError(f"--micro {micro} samples cannot be cut into --pieces {options.pieces} of one size")
    if kind == "step" and options.pieces is None and device.type == "cpu":
        reference = with_overrides(config, ["precision=fp32"])
        config = cut_to(GOALS["cpu"][precision][1] * baseline_peak(reference), config)
    else:
        config = with_overrides(config, [f"data.micro_batch_size={micro // (options.pieces or 1)}"])
    views = StepViews(config, made_samples(config), CLOCK)[0].to(torch.device("meta"))
    everyone = contenders(kind, config, views, device, options.variant)
    shape = micro * tokens_a_sample(config), config.model.image.width, DTYPES[precision], device
    before = product_rate(*shape)
    results = measure_all(everyone, options)
    rate = max(before, product_rate(*shape))  # other work on the machine can only slow it down
    not_run = {name: "out of memory" for name in everyone if name not in results}
    for name, found in results.items():
        per_second, flops = 1e3 * micro / found["milliseconds"], everyone[name].flops / micro
        found |= {"samples_per_second": per_second, "flops_per_sample": flops, "mfu": flops * per_second / rate}
    return {
        "kind": kind, "tower": tower, "micro": micro, "precision": precision,
        "micro_batch": config.data.micro_batch_size, "kept_graphs": config.kept_graphs,
        "objectives": [*config.objectives.active()],
        "caption_tokens": float(views.lengths.float().mean()),
        "product_rate": rate, "results": results, "not_run": not_run,
        **compared(kind, precision, device, results),
    }  # fmt: skip


def cut_to(limit: float, config: RunConfig) -> RunConfig:
    """The same step in the fewest micro-batches that take no more than so many bytes on a CPU, by counting, with as
    many graphs kept as there is room for; in micro-batches of one sample where nothing fits."""
    size = config.data.batch_size

    def cut(pieces: int, kept: int) -> RunConfig:
        return with_overrides(config, [f"data.micro_batch_size={size // pieces}", f"kept_graphs={kept}"])

    def fits(pieces: int, kept: int) -> bool:
        return predict(cut(pieces, kept), 1, "cpu").total <= limit

    pieces = next((n for n in range(1, size) if size % n == 0 and fits(n, 1)), size)
    return cut(pieces, next((kept for kept in range(pieces, 1, -1) if fits(pieces, kept)), 1))


def contenders(
    kind: str, config: RunConfig, views: Views, device: torch.device, variants: Sequence[str]
) -> dict[str, Contender]:
    """Everyone who takes part. views: the samples' on the meta device, for counting."""
    ours = count_ours(config, views).flops
    found = {OURS: Contender(Ours, config, ours)}
    for name in variants:
        sizes = {"all": config.data.batch_size, "quarter": max(1, config.data.batch_size // 4)}
        chosen = with_overrides(config, [setting.format(**sizes) for setting in VARIANTS[name]])
        found[f"{OURS}, {name}"] = Contender(Ours, chosen, ours)
    if kind == "clip":
        found[OPEN_CLIP] = Contender(OpenClip, config, count_open_clip(config))
        return found
    theirs = count_baseline(config, views).flops
    found[BASELINE] = Contender(Baseline, config, theirs)
    if config.precision != "fp32" and device.type == "cpu":
        found[BASELINE_FP32] = Contender(Baseline, with_overrides(config, ["precision=fp32"]), theirs)
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


def measure_all(everyone: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each examined, then the first and one other after the other timed in turn; what counts of the first is the last
    time, beside whom all are compared with. Without those that run out of memory."""
    found: dict[str, dict[str, Any]] = {}
    for name, contender in everyone.items():
        with suppress(torch.OutOfMemoryError), Apart(contender.make, contender.config) as rival:
            found[name] = rival.examine(options.profile)
    names = [name for name in everyone if name in found]
    for other in names[1:] or names:  # a single one has no pair, and is timed all the same
        pair = {name: everyone[name] for name in (names[0], other)}
        room = sum(found[name]["resident_mib"] * 2**20 for name in pair) < ROOMY * memory()
        timed = (time_beside(pair, options) if room else None) or time_apart(pair, options)
        for name, timing in timed.items():
            found[name] |= timing
    return found


def time_beside(pair: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict[str, Any]] | None:
    """Steps in turn, of processes that stay, after two to warm up. None if one runs out of memory."""
    with ExitStack() as running, suppress(torch.OutOfMemoryError):
        rivals = {name: running.enter_context(Apart(c.make, c.config)) for name, c in pair.items()}
        for rival in [*rivals.values()] * 2:
            rival.turn()
        return _timed({name: rival.turn for name, rival in rivals.items()}, options, beside=True)
    return None


def time_apart(pair: dict[str, Contender], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Steps in turn, each of a new process, after one to warm up: for rivals that do not fit beside each other."""

    def turn(contender: Contender) -> float:
        with Apart(contender.make, contender.config) as rival:
            rival.turn()
            return rival.turn()

    return _timed({name: partial(turn, contender) for name, contender in pair.items()}, options, beside=False)


def _timed(
    turns: dict[str, Callable[[], float]], options: argparse.Namespace, beside: bool
) -> dict[str, dict[str, Any]]:
    return {
        name: {"milliseconds": t.median, "quartiles": [t.low, t.high], "rounds": t.samples, "beside": beside}
        for name, t in in_turns(turns, rounds=options.rounds, seconds=options.seconds).items()
    }


def memory() -> int:
    """Bytes that the rivals share: the GPU's, or the host's."""
    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else host_memory()


def compared(kind: str, precision: str, device: torch.device, results: dict[str, Any]) -> dict[str, Any]:
    """Whether the losses are the same, the goals, and whom everybody is compared with: to each result of another, how
    many times that one's samples/s it reaches (speedup) and which share of its peak memory it takes (memory)."""
    ours = results.get(OURS)
    reference = next((n for n in (OPEN_CLIP, BASELINE_FP32, BASELINE) if n in results), None)
    if ours is None or reference is None:
        return {"right": False, "reference": reference, "loss_difference": {}, "goals": {}}
    for name, result in results.items():
        if name != reference:
            result["speedup"] = result["samples_per_second"] / results[reference]["samples_per_second"]
            result["memory"] = result["peak_mib"] / results[reference]["peak_mib"]
    differences = {
        name: max(abs(ours["losses"][o] / value - 1) for o, value in other["losses"].items())
        for name, other in results.items() if name not in (OURS, OPEN_CLIP)
    }  # fmt: skip
    goal = GOALS[device.type].get(precision) if kind == "step" else None
    return {
        "right": all(d <= LARGEST_DIFFERENCE[precision] for d in differences.values()), "reference": reference,
        "loss_difference": differences, "goals": {"speedup": goal[0], "memory": goal[1]} if goal else {},
    }  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench step", description=__doc__.split("\n\n")[1])
    gpu = torch.cuda.is_available()
    parser.add_argument("--only", nargs="+", choices=("step", "clip"), help="all objectives, or CLIP alone")
    parser.add_argument("--tower", nargs="+", default=["ViT-S/16", "ViT-B/16"], help="default: %(default)s")
    parser.add_argument(
        "--micro", nargs="+", type=int, default=[96] if gpu else [24], help="samples of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--pieces", type=int, metavar="N",
        help="micro-batches that ours goes through all objectives in (default: 1 on a GPU; on a CPU the fewest that "
        "take half of the baseline's memory)",
    )  # fmt: skip
    precisions = ("fp32", "bf16")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["bf16"] if gpu else [*precisions])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=[], help="ours in other ways, too")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every rival")
    parser.add_argument("--rounds", type=int, default=15 if gpu else 3, help="timed steps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="end a case after so long and three rounds")
    parser.add_argument("--profile", action="store_true", help="the operators that take longest, and gaps between them")
    parser.add_argument("--add", action="store_true", help="keep what was measured here today, and add to it")
    parser.add_argument("--out", type=Path, help="folder for step.json and step.png")
    options = parser.parse_args(arguments)
    if min(options.micro) < 2:
        parser.error("--micro must be at least 2: samples are compared with each other")
    if "compiled" in options.variant and not gpu:
        parser.error("--variant compiled needs a GPU: on a CPU memory is counted operator by operator")
    return options


if __name__ == "__main__":
    sys.exit(main())
