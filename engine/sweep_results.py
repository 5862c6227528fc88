"""What a sweep found: mean and spread over seeds as plain data, as a table, and as a plot."""

from __future__ import annotations

import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .disk import replace_text
from .evaluate.chance import level_of, levels
from .evaluated import METRICS, known_metrics
from .report.curves import read_log
from .report.metrics import by_task
from .sweep_recipes import Budget

if TYPE_CHECKING:
    from .sweep import Trial

Found = dict[str, Any]
SHORT = {
    "zero_shot": "zero-shot", "retrieval/image_to_text": "image → text", "retrieval/text_to_image": "text → image",
    "knn": "kNN", "top1": "top-1", "top5": "top-5", "top10": "top-10", "r1": "R@1", "r5": "R@5", "r10": "R@10",
}  # fmt: skip
"""Of metrics and their parts, for headings."""
BLUE, INK, QUIET = "#0072b2", "#1b1f27", "#98a2b3"


def collect(budget: Budget, seeds: int, recipes: list[str], finished: list[Trial], failures: dict[str, str]) -> Found:
    """Everything that was measured so far, recipes in the given order. Metrics are fractions, and what guessing would
    score of the same samples, `chance`, too."""
    found: Found = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "budget": budget.described(),
        "seeds": seeds,
        "recipes": {},
        "failed": failures,
    }
    for recipe in recipes:
        trials = [trial for trial in finished if trial.recipe == recipe]
        if not trials:
            continue
        runs = {str(trial.seed): _measured(trial) for trial in trials}
        found["recipes"][recipe] = {
            "objectives": list(trials[0].config.objectives.active()),
            "summary": {key: _spread([run["metrics"][key] for run in runs.values()]) for key in _metrics(runs)},
            "runs": runs,
        }
    known = {path: level for trial in finished for path, level in levels(known_metrics(trial.folder / METRICS)).items()}
    chance = {key: level_of(known, key) for key in columns(found)}
    return {**found, "chance": {key: level for key, level in chance.items() if level is not None}}


def _measured(trial: Trial) -> Found:
    """Metrics and last logged losses of one run."""
    tasks = by_task(known_metrics(trial.folder / METRICS))
    log = read_log(trial.folder / "log.jsonl")
    losses = {k: v for k, v in (log[-1] if log else {}).items() if k == "loss" or k.startswith("loss/")}
    metrics = {f"{task}/{name}": value for task, values in tasks.items() for name, value in values.items()}
    return {"metrics": metrics, "losses": losses}


def _metrics(runs: dict[str, Found]) -> list[str]:
    """Those that every run of a recipe has."""
    first, *others = (run["metrics"] for run in runs.values())
    return [key for key in first if all(key in other for other in others)]


def _spread(values: list[float]) -> Found:
    """Mean, and the sample standard deviation (n - 1 in the denominator; null for a single value)."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def write_results(out: Path, found: Found) -> None:
    """sweep.json, sweep.md and sweep.png."""
    replace_text(out / "sweep.json", json.dumps(found, indent=1) + "\n")
    replace_text(out / "sweep.md", as_markdown(found))
    draw(found, out / "sweep.png")


def columns(found: Found) -> list[str]:
    """All metrics, in the order in which they first appear."""
    return list(dict.fromkeys(key for recipe in found["recipes"].values() for key in recipe["summary"]))


def heading(metric: str) -> str:
    """A metric's path as people call it."""
    task, _, name = metric.rpartition("/")
    return f"{SHORT.get(task, task.replace('/', ' ').replace('_', ' '))} {SHORT.get(name, name.replace('_', ' '))}"


def as_markdown(found: Found) -> str:
    """One row per recipe, in percent: mean ± spread; what failed is named below."""
    budget, keys = found["budget"], columns(found)
    lines = [
        f"{budget['steps']:,} steps of {budget['batch_size']:,} samples ({budget['steps'] * budget['batch_size']:,} "
        f"samples seen, of {budget['samples']:,} in the data), data `{budget['data']}`, seeds: {found['seeds']}. "
        "In percent: mean ± sample standard deviation over seeds.",
        "",
    ]
    if keys:
        lines.append("| recipe | " + " | ".join(map(heading, keys)) + " |")
        lines.append("|---|" + "---|" * len(keys))
        for name, recipe in found["recipes"].items():
            cells = [_cell(recipe["summary"].get(key), found["seeds"]) for key in keys]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if found["chance"]:
            guessed = [found["chance"].get(key) for key in keys]
            shown = ["-" if level is None else f"{100 * level:.2g}" for level in guessed]
            lines.append("| *guessing* | " + " | ".join(shown) + " |")
    else:
        lines.append("Nothing was evaluated: `evaluate.data` names no samples. Last losses are in sweep.json.")
    lines += [f"\n{name}: failed: {reason}" for name, reason in found["failed"].items()]
    return "\n".join(lines) + "\n"


def _cell(summary: Found | None, seeds: int) -> str:
    """Mean and spread; how many seeds there are, where some are missing."""
    if summary is None:
        return "-"
    spread = "" if summary["std"] is None else f" ± {100 * summary['std']:.1f}"
    return f"{100 * summary['mean']:.1f}{spread}" + (f" (n={summary['n']})" if summary["n"] < seeds else "")


def draw(found: Found, path: Path) -> None:
    """A panel per metric, a row per recipe: a dot for each seed, a bar over mean ± std, a line where guessing is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys, names = columns(found), list(found["recipes"])
    if not keys:
        path.unlink(missing_ok=True)
        return
    across = min(len(keys), 3)
    down = -(-len(keys) // across)
    size = 3.2 * across + 1.6, down * (0.24 * len(names) + 0.9) + 0.3
    figure, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, key in zip(axes.flat, keys, strict=False):
        for row, name in enumerate(names):
            summary = found["recipes"][name]["summary"].get(key)
            if summary:
                values = [100 * run["metrics"][key] for run in found["recipes"][name]["runs"].values()]
                mean, std = 100 * summary["mean"], 100 * (summary["std"] or 0)
                axis.plot([mean - std, mean + std], [row, row], color=BLUE, lw=5, alpha=0.3, solid_capstyle="butt")
                axis.plot(values, [row] * len(values), "o", color=BLUE, ms=3.5, alpha=0.6, mew=0)
                axis.plot([mean], [row], "|", color=INK, ms=9, mew=1.5)
        if key in found["chance"]:
            axis.axvline(100 * found["chance"][key], color=QUIET, lw=1, ls="--")
        axis.set_title(heading(key), fontsize=9, loc="left")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(labelsize=8, length=0)
        axis.grid(axis="x", color="#e3e6ec", lw=0.6)
        axis.set_axisbelow(True)
        axis.set_xlim(left=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    figure.supxlabel("%; dots: seeds, bar: mean ± standard deviation, dashed: guessing", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
