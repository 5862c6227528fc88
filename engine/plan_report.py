"""What `harmony-fast plan` prints and draws."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from .config import load_config, with_overrides
from .errors import UserError
from .host_memory import host_memory as total_host_memory
from .measure import ask
from .memory import Device
from .plan import Budget, Plan, Planner
from .rates import Rates, rates_for
from .sizes import GIB, size_of

COLOURS = ["#1f6f8b", "#5ba0b5", "#99c5d1", "#d9a441", "#c8743f", "#8f4a3d", "#7d8471", "#b3b79a", "#54616b", "#a9b4bd"]


def run(
    path: Path,
    overrides: list[str],
    memory: str,
    gpus: int,
    host_memory: str | None = None,
    keep: Sequence[str] = (),
    measure: bool = False,
    png: Path | None = None,
    plain: bool = False,
) -> None:
    """`harmony-fast plan`. Raises UserError for sizes without a unit, and if nothing fits."""
    config = load_config(path, overrides)
    host = size_of(host_memory, "--host-memory") if host_memory else total_host_memory()
    budget = Budget(size_of(memory, "--memory"), host / gpus)
    rates = Rates(**ask(gpus)) if measure else rates_for(budget.device)
    device: Device = "cpu" if measure and not torch.cuda.is_available() else "cuda"
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("going through the passes", total=None)
        report = partial(_advance, progress, task)
        with Planner(config, gpus, rates, device, keep, report) as planner:
            plans = planner.search(budget)
    found = ask(gpus, with_overrides(config, plans[0].overrides)) if measure else None
    if plain:
        print(json.dumps(as_json(plans, budget, gpus, rates, found), indent=1))
    else:
        show(plans, budget, gpus, rates, Console())
        if found:
            print(compared(plans[0], found))
    if png:
        try:
            draw(plans, budget, png)
        except (OSError, ValueError) as error:  # no such folder; no such kind of picture
            raise UserError(f"--picture {png}: {error}") from None


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def compared(plan: Plan, found: dict[str, Any]) -> str:
    """What three steps of a plan took here, beside what was predicted."""
    if found.get("out_of_memory"):
        return "measured: the best plan ran out of memory here; is the card shared, or smaller than --memory?"
    tensors, predicted = found["tensors"], plan.memory.tensors
    rate = plan.batch / found["seconds"]
    return (
        f"measured: {tensors / GIB:.2f} GiB of tensors at a step's peak, predicted {predicted / tensors - 1:+.1%}; "
        f"{rate:,.1f} samples/s without loading, predicted {plan.samples_per_second / rate - 1:+.0%}"
    )


def show(plans: list[Plan], budget: Budget, ranks: int, rates: Rates, console: Console) -> None:
    """The best plan, where its memory goes, and what the next ones would gain or lose."""
    best = plans[0]
    console.print(f"[bold]{' '.join(best.overrides)}[/bold]", soft_wrap=True)
    console.print(
        f"{best.memory.total / GIB:.1f} of {budget.device / GIB:.1f} GiB on each of {ranks} "
        f"card{'s' * (ranks > 1)}; about {best.samples_per_second:,.0f} samples/s with {rates.name}\n"
    )
    console.print(picture(best, budget, min(console.width, 100)))
    console.print(_choices(plans))


def picture(plan: Plan, budget: Budget, width: int) -> Table:
    """A bar for each part, largest first."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])
    longest = max(width - 40, 10)
    for (name, size), colour in zip(parts, COLOURS * 3, strict=False):
        if size > 0.001 * budget.device:
            bar = Text("█" * max(round(longest * size / budget.device), 1), style=colour)
            table.add_row(name, f"{size / GIB:.2f} GiB", bar)
    table.add_row("free", f"{(budget.device - plan.memory.total) / GIB:.2f} GiB", "")
    for name, size in plan.memory.host.items():
        table.add_row(f"{name} (host)", f"{size / GIB:.2f} GiB", "")
    return table


def _choices(plans: list[Plan]) -> Table:
    best = plans[0]
    table = Table(title="The next best", title_justify="left")
    for heading in ("settings that differ", "GiB", "samples/s", "against the best"):
        table.add_column(heading, justify="left" if heading.startswith("settings") else "right")
    for plan in plans[1:]:
        differ = [o for o, b in zip(plan.overrides, best.overrides, strict=True) if o != b]
        change = plan.samples_per_second / best.samples_per_second - 1
        memory = f"{plan.memory.total / GIB:.1f}"
        table.add_row("\n".join(differ), memory, f"{plan.samples_per_second:,.0f}", f"{change:+.1%}")
    return table


def as_json(
    plans: list[Plan], budget: Budget, ranks: int, rates: Rates, found: dict[str, Any] | None = None
) -> dict[str, Any]:
    """For scripts. Bytes and seconds. found: what was measured of the first plan."""
    return {
        "ranks": ranks, "budget": budget.device, "host_budget": budget.host, "rates": vars(rates), "measured": found,
        "plans": [
            {
                "overrides": plan.overrides, "settings": plan.settings, "total": plan.memory.total,
                "tensors": plan.memory.tensors, "held": plan.memory.held, "step": plan.memory.step,
                "host": plan.memory.host, "seconds": plan.seconds, "samples_per_second": plan.samples_per_second,
            }
            for plan in plans
        ],
    }  # fmt: skip


def draw(plans: list[Plan], budget: Budget, path: Path) -> None:
    """A stacked bar for each plan, with the budget as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({n for p in plans for n in p.memory.parts}, key=lambda n: -plans[0].memory.parts.get(n, 0.0))
    figure, axis = plt.subplots(figsize=(9, 0.8 * len(plans) + 1.8), layout="constrained")
    labels = [
        f"micro-batch {p.settings['data.micro_batch_size']}, {p.settings['pass']},\n"
        f"checkpointing {p.settings['activation_checkpointing.image']}, {p.samples_per_second:,.0f} samples/s"
        for p in plans
    ]
    left = [0.0] * len(plans)
    for name, colour in zip(names, COLOURS * 3, strict=False):
        sizes = [p.memory.parts.get(name, 0.0) / GIB for p in plans]
        if max(sizes) > 0.001 * budget.device / GIB:
            axis.barh(labels, sizes, left=left, color=colour, label=name)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.axvline(budget.device / GIB, color="#333333", lw=1)
    axis.invert_yaxis()
    axis.set_xlabel("GiB", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.18))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
