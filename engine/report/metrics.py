"""What `harmony-fast evaluate` measured: cards for one run, tables for several, with the level of guessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluate.chance import level_of, levels, with_levels
from ..evaluated import METRICS
from .curves import is_number, number
from .markup import Child, Markup, absent, run_name, tag
from .run import Run
from .summary import table

TASK_NAMES = {
    "zero_shot": "Zero-shot classification",
    "retrieval/image_to_text": "Retrieval, image to text",
    "retrieval/text_to_image": "Retrieval, text to image",
    "knn": "Nearest neighbours (kNN)",
    "linear": "Linear probe",
    "few_shot": "Few-shot",
    "finetune": "Finetuned",
}
METRIC_NAMES = {
    "top1": "top-1", "top5": "top-5", "top10": "top-10", "r1": "recall@1", "r5": "recall@5", "r10": "recall@10",
    "miou": "mIoU",
}  # fmt: skip
UNRANKED = ("spread",)
"""Numbers of which the largest is not the best."""
Tasks = dict[str, dict[str, float]]
Levels = dict[str, float]
"""What guessing would score, by the path of a number."""


def measured(runs: list[Run]) -> Child:
    """All metrics of all runs."""
    if len(runs) == 1:
        return metrics_cards(read_metrics(runs[0].folder))
    found: dict[int, Tasks] = {}
    missing: dict[int, UserError] = {}
    told: list[Levels] = []
    for run in runs:
        try:
            metrics = read_metrics(run.folder)
        except UserError as error:
            missing[run.place] = error
            continue
        found[run.place] = by_task(metrics)
        told.append(levels(metrics))
    if not found:
        raise next(iter(missing.values()))
    tasks = dict.fromkeys(task for run in found.values() for task in run)
    tables = [_task_table(task, runs, found, _agreed(told)) for task in tasks]
    return [tag("div", tables, class_="cards wide"), [absent(error) for error in missing.values()]]


def _agreed(told: list[Levels]) -> Levels:
    """Those of which no two runs say different things: else there is not one level, as the runs saw different data."""
    pairs = [pair for known in told for pair in known.items()]
    return {path: level for path, level in pairs if all(known.get(path, level) == level for known in told)}


def _task_table(task: str, runs: list[Run], found: dict[int, Tasks], known: Levels) -> Markup:
    """Runs down, metrics across; the best of each in bold."""
    rows = [(run, found[run.place][task]) for run in runs if task in found.get(run.place, {})]
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    best = {name: max(values.get(name, 0) for _, values in rows) for name in names}

    def cell(values: dict[str, float], name: str) -> Markup:
        if name not in values:
            return tag("td", "–")
        share = values[name]
        bar = tag("span", style=f"width:{100 * share / (best[name] or 1):.1f}%", class_="fill")
        bold = share == best[name] and name not in UNRANKED
        return tag("td", bar, tag("b" if bold else "span", percent(share)), class_="share")

    body = [
        [tag("th", run_name(run.name, run.place), scope="row"), *(cell(values, name) for name in names)]
        for run, values in rows
    ]
    guesses = [level_of(known, f"{task}/{name}") for name in names]
    if any(guesses):
        shown = [tag("td", "–" if level is None else percent(level)) for level in guesses]
        body.append([tag("th", "guessing", scope="row", class_="aside"), *shown])
    heads = ("Run", *(metric_name(name) for name in names))
    return tag("article", tag("h3", task_name(task)), table(heads, body), class_="card")


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """What `harmony-fast evaluate` measured. Raises UserError, which names that command, if it did not."""
    path, command = run_dir / METRICS, f"`harmony-fast evaluate {run_dir}`"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{run_dir.name} has no metrics.json yet; {command} makes it") from None
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read; {command} makes it again") from None
    if not by_task(metrics):
        raise UserError(f"{path} holds no metrics; {command} makes it again")
    return metrics


def metrics_cards(metrics: dict[str, Any]) -> Markup:
    """One card per task: each number with a bar and the level of guessing, as far as the metrics tell."""
    cards = [_task_card(task, values, levels(metrics)) for task, values in by_task(metrics).items()]
    return tag("div", cards, class_="cards tasks")


def by_task(metrics: Any) -> Tasks:
    """Fractions by task; counts, chance levels and other numbers beside them are left out."""
    tasks: Tasks = {}
    for path, value, _ in with_levels(metrics):
        task, _, metric = path.rpartition("/")
        if task and is_number(value) and 0 <= value <= 1:
            tasks.setdefault(task, {})[metric] = float(value)
    return tasks


def _task_card(task: str, values: dict[str, float], known: Levels) -> Markup:
    rows = [_metric(metric, value, level_of(known, f"{task}/{metric}")) for metric, value in values.items()]
    return tag("article", tag("h3", task_name(task)), rows, class_="card")


def _metric(metric: str, value: float, level: float | None) -> Markup:
    """One number. level: what guessing would score."""
    name = tag("span", metric_name(metric))
    bar = [tag("span", style=f"width:{100 * value:.2f}%", class_="fill")]
    chance = None
    if level:
        times = f"{number(value / level)} × " if value > level else ""
        chance = tag("span", f"{times}chance ({percent(level)})", class_="aside")
        bar.append(tag("span", style=f"left:{100 * level:.2f}%", class_="chance"))
    line = tag("div", tag("span", percent(value), class_="value"), name, chance, class_="line")
    return tag("div", line, tag("div", bar, class_="track"), class_="metric")


def task_name(task: str) -> str:
    """A task as people call it."""
    first, _, rest = task.partition("/")
    variant = f"{TASK_NAMES.get(first, first)}, {rest}" if rest else first
    return TASK_NAMES.get(task) or variant.replace("/", ", ").replace("_", " ").capitalize()


def metric_name(metric: str) -> str:
    """A metric as people call it."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def percent(fraction: float) -> str:
    """A share, with more digits where it is small."""
    return f"{number(100 * fraction)} %" if 0 < fraction < 0.1 else f"{100 * fraction:.1f} %"
