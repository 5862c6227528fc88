"""The results of `harmony-fast bench step` for the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .machine import caption
from .step_rivals import PARTS

COLOURS = ("#d9a441", "#7a9e7e", "#1f6f8b", "#5b8fb0", "#a35d6a", "#8a7ca8", "#b8c4cc")


def show(case: dict[str, Any], console: Console) -> None:
    """One case."""
    title = (
        f"{'all objectives' if case['kind'] == 'step' else 'CLIP alone'}, {case['tower']}, {case['micro']} samples, "
        f"{case['precision']}; products at {case['product_rate'] / 1e9:,.0f} GFLOP/s"
    )
    made = Table(title=title, title_justify="left", min_width=100)
    for heading in ("", "samples/s", "ratio", "ms a step", "quartiles", "peak GiB", "ratio", "GFLOP a sample", "MFU"):
        made.add_column(heading, justify="left" if not heading else "right")
    for name, r in case["results"].items():
        low, high = r["quartiles"]
        made.add_row(
            name, f"{r['samples_per_second']:#.3g}", ratio(r, "speedup"), f"{r['milliseconds']:,.0f}",
            f"{low:,.0f} - {high:,.0f}", f"{r['peak_mib'] / 1024:.2f}", ratio(r, "memory"),
            f"{r['flops_per_sample'] / 1e9:.1f}", f"{100 * r['mfu']:.0f} %",
        )  # fmt: skip
    for name, why in case["not_run"].items():
        made.add_row(name, "-", why)
    made.caption = "; ".join(_compared(case))
    console.print(made)
    parts = Table(title="milliseconds of a step's parts", title_justify="left", min_width=100)
    for heading in ("", *PARTS, "rest"):
        parts.add_column(heading, justify="left" if not heading else "right")
    for name, r in case["results"].items():
        parts.add_row(name, *(f"{r['breakdown_ms'][part]:,.0f}" for part in (*PARTS, "rest")))
    console.print(parts)


def ratio(result: dict[str, Any], key: str) -> str:
    """Against whom all are compared; empty for that one."""
    return f"{result[key]:.2f} x" if key in result else ""


def _compared(case: dict[str, Any]) -> list[str]:
    """What the columns of ratios are to be held against, and whether all did the same."""
    goal = case["goals"]
    words = [f"goals: {goal['speedup']} x {case['reference']}'s samples/s, {goal['memory']} x its peak"] if goal else []
    words += [f"losses of the first step differ from {n}'s by {d:.0e}" for n, d in case["loss_difference"].items()]
    alone = [name for name, result in case["results"].items() if not result["beside"]]
    return [*words, f"no room beside each other, so a new process a step: {' and '.join(alone)}"] if alone else words


def in_order(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All objectives first, then CLIP alone; towers as they were measured first; fp32 before bf16."""
    towers = [*dict.fromkeys(case["tower"] for case in cases)]
    return sorted(cases, key=lambda c: (c["kind"] != "step", towers.index(c["tower"]), c["precision"] != "fp32"))


def plot(report: dict[str, Any], path: Path) -> None:
    """A row per case: the parts of each rival's step, and its peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = in_order(report["cases"])
    size = 11, 0.8 + sum(0.9 + 0.4 * len(c["results"]) for c in cases)
    ratios = [2 + len(c["results"]) for c in cases]
    figure, axes = plt.subplots(
        len(cases), 2, figsize=size, squeeze=False, layout="constrained", width_ratios=[3, 1], height_ratios=ratios
    )
    for (time, memory), case in zip(axes, cases, strict=True):
        names = list(case["results"])[::-1]
        left = [0.0] * len(names)
        for part, colour in zip((*PARTS, "rest"), COLOURS, strict=True):
            values = [case["results"][n]["breakdown_ms"][part] for n in names]
            # The parts come from a step with a stopwatch: they are drawn as shares of the median without one.
            scales = [r["milliseconds"] / sum(r["breakdown_ms"].values()) for r in map(case["results"].get, names)]
            values = [v * s for v, s in zip(values, scales, strict=True)]
            time.barh(names, values, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        memory.barh(names, [case["results"][n]["peak_mib"] / 1024 for n in names], color=COLOURS[2])
        memory.set_yticks([])
        what = "all objectives" if case["kind"] == "step" else "CLIP alone"
        time.set_title(f"{what}, {case['tower']}, {case['micro']} samples, {case['precision']}", fontsize=9, loc="left")
        time.set_xlabel("ms a step", fontsize=8)
        memory.set_xlabel("peak GiB", fontsize=8)
        for axis in (time, memory):
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    parts = dict(zip(labels, handles, strict=True))  # each name once, though every rival has its parts
    figure.legend(parts.values(), parts.keys(), fontsize=7, ncols=7, frameon=False, loc="outside lower center")
    figure.suptitle(caption(report), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
