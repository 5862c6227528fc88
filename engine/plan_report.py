"""What `harmony-fast plan` prints and draws."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from .config import load_config
from .errors import UserError
from .plan import Budget, Plan, Planner
from .rates import Rates, rates_for

COLOURS = ["#1f6f8b", "#5ba0b5", "#99c5d1", "#d9a441", "#c8743f", "#8f4a3d", "#7d8471", "#b3b79a", "#54616b", "#a9b4bd"]
GIB = 2**30
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def run(
    path: Path, overrides: list[str], memory: str, gpus: int, host_memory: str | None, png: Path | None, plain: bool
) -> None:
    """`harmony-fast plan`. Raises UserError for sizes without a unit, and if nothing fits."""
    config = load_config(path, overrides)
    host = (
        size_of(host_memory, "--host-memory")
        if host_memory
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    budget = Budget(size_of(memory, "--memory"), host / gpus)
    rates = rates_for(budget.device)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("going through the passes", total=None)
        planner = Planner(config, gpus, rates, lambda done, of: progress.update(task, completed=done, total=of))
        plans = planner.search(budget)
    if png:
        draw(plans, budget, png)
    if plain:
        print(json.dumps(as_json(plans, budget, gpus, rates), indent=1))
    else:
        show(plans, budget, gpus, rates, Console())


def size_of(text: str, option: str) -> float:
    """Bytes of a size with its unit: 24GiB. Raises UserError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise UserError(f"{option} {text}: a number with its unit is needed, as in 24GiB (or {', '.join(UNITS)})")
    if not float(match[1]):
        raise UserError(f"{option} {text}: is nothing")
    return float(match[1]) * units[match[2].lower()]


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


def as_json(plans: list[Plan], budget: Budget, ranks: int, rates: Rates) -> dict[str, Any]:
    """For scripts. Bytes and seconds."""
    return {
        "ranks": ranks, "budget": budget.device, "host_budget": budget.host, "rates": vars(rates),
        "plans": [
            {
                "overrides": plan.overrides, "settings": plan.settings, "total": plan.memory.total,
                "held": plan.memory.held, "step": plan.memory.step, "host": plan.memory.host,
                "seconds": plan.seconds, "samples_per_second": plan.samples_per_second,
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
