"""`harmony-fast bench scaling`: what ranks hold and send, and a prediction of speed on 1 to 64 GPUs.

Memory that a rank holds for the whole run and bytes that it sends in a step, for the paper's configuration with image
towers of four sizes, by the formulas of `engine/scaling.py`, which tests hold against bytes counted on 2 ranks. Then
the time of a step by `engine/plan.seconds`, from passes gone through on the meta device and rates from data sheets:
hours for three data sets on four machines, and samples/s on up to 64 GPUs. Nothing is run: counts and predictions, no
measurements. Writes scaling.json, hours.json and hours.png to bench/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..engine.build import build_model
from ..engine.config import load_config
from ..engine.memory import go_through
from ..engine.plan import Plan, Planner, Shape, seconds
from ..engine.rates import SHARE_REACHED, Rates, rates_for
from ..engine.scaling import Sizes, held_bytes, sent_bytes
from ..engine.sizes import GIB
from .machine import RESULTS
from .scaling_report import hours_table, memory_table, plot

TOWERS = {
    **{name: [f"model.image={{name: {name}}}"] for name in ("ViT-S/16", "ViT-B/16", "ViT-L/16")},
    "ViT-H/14": ["model.image={width: 1280, depth: 32, heads: 16, patch_size: 14}", "views.local_size=98"],
}
DATA_SETS = {"CC3M": 3.3e6, "CC12M": 12.4e6, "YFCC15M": 14.8e6}
"""Pairs in the lists (Sharma et al. 2018; Changpinyo et al. 2021; CLIP's subset of YFCC100M)"""


class Machine(NamedTuple):
    """GPUs of one kind in one node."""

    name: str
    gpus: int
    memory: float
    """Of a GPU, GiB"""


MACHINES = [Machine("1 x 24 GB", 1, 24), Machine("1 x 80 GB", 1, 80), Machine("8 x 24 GB, PCIe", 8, 24),
            Machine("8 x 80 GB, NVLink", 8, 80)]  # fmt: skip
NODE = 8
"""GPUs"""
NETWORKS = {"100 Gbit/s Ethernet": 12.5e9, "8 x 400 Gbit/s InfiniBand": 400e9}
"""Of a node, bytes per second. A ring leaves a node at one of its GPUs, so what a GPU sends is what a node sends"""
REACHED = 0.8
"""Share of a network's rate that all-reduces reach"""
SHARE_OF_MEMORY = 0.95
"""Of a card, what a micro-batch may be predicted to take"""
PAPER_BATCH, GPU_BATCH = 768, 96


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the tables; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench scaling", description=__doc__.split("\n\n")[1])
    default = Path(__file__).parents[1] / "configs" / "cc3m.yaml"
    parser.add_argument("--config", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="default: %(default)s")
    parser.add_argument("--only", choices=("scaling", "hours"), nargs="+", default=["scaling", "hours"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if "scaling" in options.only:
        found = held_and_sent(options.config, options.ranks)
        print(memory_table(found))
        (options.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if "hours" in options.only:
        found = predictions(options.config)
        print(hours_table(found))
        (options.out / "hours.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        plot(found, options.out / "hours.png")
    return 0


def sizes_of(config: Path, overrides: list[str]) -> Sizes:
    """Parameters of a configuration with another image tower, counted on the meta device."""
    with torch.device("meta"):
        model = build_model(load_config(config, overrides))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(trained, sum(p.numel() for p in model.teacher.parameters()))


def held_and_sent(config: Path, ranks: list[int]) -> dict[str, Any]:
    """Bytes by tower, stage and ranks."""
    towers = []
    for name, overrides in TOWERS.items():
        sizes = sizes_of(config, overrides)
        stages = [
            [{"held": sum(held_bytes(sizes, s, n).values()), "sent": sent_bytes(sizes, s, n)} for n in ranks]
            for s in range(4)
        ]
        towers.append({"tower": name, "trained": sizes.trained, "twins": sizes.twins, "stages": stages})
    return {"ranks": ranks, "towers": towers}


def predictions(config: Path) -> dict[str, Any]:
    """Hours on four machines, and speed on 1 to 64 GPUs of 80 GB."""
    epochs = load_config(config).epochs
    machines = []
    for machine in MACHINES:
        rates = rates_for(machine.memory * GIB)
        plan = largest(config, machine.gpus, rates, machine.memory * GIB, PAPER_BATCH)
        speed = plan.samples_per_second
        machines.append({
            "machine": machine.name, "rates": dataclasses.asdict(rates), "samples_per_second": speed,
            "micro": plan.settings["data.micro_batch_size"], "seconds": plan.seconds,
            "hours": {name: epochs * count / speed / 3600 for name, count in DATA_SETS.items()},
        })  # fmt: skip
    return {
        "epochs": epochs, "data_sets": DATA_SETS, "machines": machines, "growth": growth(config),
        "assumptions": assumptions(),
    }  # fmt: skip


def growth(config: Path) -> list[dict[str, Any]]:
    """Samples/s on 1 to 64 GPUs of 80 GB, 96 samples on each in one pass: inside a node over NVLink, between nodes over
    either network. The passes are the same on every GPU: they are gone through once."""
    inside = rates_for(80 * GIB)
    rows: list[dict[str, Any]] = []
    chosen = load_config(config, [f"data.batch_size={GPU_BATCH}", "zero.stage=1"])
    passes = go_through(chosen, 1)
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        links = {"one node": inside.link} if gpus <= NODE else NETWORKS
        for name, rate in links.items():
            link = rate if gpus <= NODE else min(inside.link, REACHED * rate)
            parts = seconds(chosen, gpus, passes, dataclasses.replace(inside, link=link))
            speed = GPU_BATCH * gpus / sum(parts.values())
            alone = rows[0]["samples_per_second"] if rows else speed
            rows.append({
                "gpus": gpus, "link": name, "batch": GPU_BATCH * gpus, "samples_per_second": speed, "seconds": parts,
                "efficiency": speed / gpus / alone,
            })  # fmt: skip
    return rows


def largest(config: Path, gpus: int, rates: Rates, memory: float, batch: int) -> Plan:
    """The largest micro-batch of one packed pass without recomputation that is predicted to fit."""
    planner = Planner(load_config(config, [f"data.batch_size={batch}"]), gpus, rates)
    for micro in (size for size in (96, 48, 24, 12, 6) if batch // gpus % size == 0):
        [plan] = planner.examine({
            "data.micro_batch_size": micro, **Shape("packed", 0, 0).settings, "zero.stage": 1,
            "optimizer.states": "fp32", "zero.offload_optimizer": False, "zero.offload_parameters": False,
        })  # fmt: skip
        if plan.memory.total <= SHARE_OF_MEMORY * memory:
            break
    return plan


def assumptions() -> list[str]:
    """Everything that the predictions rest on, in words."""
    lines = [
        "the paper's configuration (configs/cc3m.yaml) with ViT-B/16 in bf16, ZeRO stage 1, one packed pass a "
        "micro-batch, nothing recomputed, captions of 16 tokens; a batch of 768 in the table of hours",
        f"products run at {SHARE_REACHED:.0%} of the data sheet's dense bf16 rate, the device's memory at 80 % of its; "
        "what operators write is read twice and written once, and adds to the products' time",
        "the host needs 6 microseconds to start an operator; nothing else of it is felt, the loader included",
        f"between nodes collectives reach {REACHED:.0%} of {' or '.join(NETWORKS)} a node, but no more than inside; a "
        "ring leaves a node at one GPU; bytes by engine/scaling.py",
        "half of the compute hides communication, but at least a quarter of it is felt",
        "AdamW and the EMA move 32 bytes a parameter of a rank's share",
    ]
    for memory in sorted({machine.memory for machine in MACHINES}):
        r = rates_for(memory * GIB)
        lines.append(
            f"{memory:.0f} GB: {r.name}: {r.flops / 1e12:.0f} TFLOP/s and {r.memory / 1e9:,.0f} GB/s after these "
            f"shares, {r.link / 1e9:.0f} GB/s to other GPUs of its node"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
