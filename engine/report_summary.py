"""The numbers of a report: what was run, how far and how fast, and what evaluation measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from torch import nn

from ..harmony.model import Harmony
from .config import RunConfig
from .data.beton import open_beton
from .errors import UserError
from .report_curves import Entry, number, series
from .report_html import Markup, tag

TASK_NAMES = {
    "zero_shot": "Zero-shot classification",
    "retrieval/image_to_text": "Retrieval, image to text",
    "retrieval/text_to_image": "Retrieval, text to image",
    "knn": "Nearest neighbours (kNN)",
}
METRIC_NAMES = {"top1": "top-1", "top10": "top-10", "r1": "recall@1", "r5": "recall@5", "r10": "recall@10"}


def facts(config: RunConfig, model: Harmony, log: list[Entry]) -> Markup:
    """What a reader wants to know first. What the run folder does not tell is left out."""
    student, image, text, views = model.student, config.model.image, config.model.text, config.views
    known = {}
    if student.image is not None:
        size = f"width {image.width}, depth {image.depth}, {image.heads} heads, patch {image.patch_size}"
        known["Image tower"] = f"{image.name or 'ViT'}: {size}; {_millions(student.image)}"
        known["Crops"] = f"{views.global_crops} × {views.global_size} px, {views.local_crops} × {views.local_size} px"
    if student.text is not None:
        size = f"width {text.width}, depth {text.depth}, context {text.context}"
        known["Text tower"] = f"{size}; {_millions(student.text)}"
    known["Heads and decoders"] = _millions(student.heads, model.objectives)
    samples = _samples(config)
    known["Data"] = config.data.train.name + (f", {samples:,} samples" if samples else "")
    known["Batch and precision"] = f"{config.data.batch_size}, {config.precision}, ZeRO stage {config.zero.stage}"
    if log:
        known.update(_progress(config, log, samples))
    return tag("dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in known.items()])


def _progress(config: RunConfig, log: list[Entry], samples: int | None) -> dict[str, str]:
    """How far the run got, and how fast."""
    step, batch = int(log[-1]["step"]), config.data.batch_size
    total = config.epochs * (samples // batch) if samples else None
    of = f" of {min(total, config.max_steps or total):,}" if total else ""
    known = {"Steps": f"{step:,}{of}; {step * batch:,} samples seen"}
    speed = series(log, "samples_per_second")
    if speed.values:
        # Each logged rate holds for the steps since the entry before it.
        steps = [b - a for a, b in zip([0.0, *speed.steps[:-1]], speed.steps, strict=True)]
        seconds = sum(n * batch / rate for n, rate in zip(steps, speed.values, strict=True) if rate > 0)
        known["Speed"] = f"{number(statistics.median(speed.values))} samples/s; {_duration(seconds)} in all"
    return known


def _samples(config: RunConfig) -> int | None:
    """Samples of the training file, if it is still there."""
    try:
        return len(open_beton(config.data.train))
    except UserError:
        return None


def _millions(*modules: nn.Module) -> str:
    count = sum(p.numel() for module in modules for p in module.parameters())
    return f"{count / 1e6:.3g} M parameters" if count >= 1e5 else f"{count:,} parameters"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) % 3600 // 60} min"


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """What `harmony-fast evaluate` measured. Raises UserError, which names that command, if it did not."""
    path, command = run_dir / "metrics.json", f"`harmony-fast evaluate {run_dir}`"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no metrics.json yet; {command} makes it") from None
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read; {command} makes it again") from None
    if not by_task(metrics):
        raise UserError(f"{path} holds no metrics; {command} makes it again")
    return metrics


def metrics_cards(metrics: dict[str, Any], random_levels: dict[str, float]) -> Markup:
    """One card per task: each number with a bar and the level of guessing, as far as that is known."""
    given = {path.replace("/chance", ""): value for path, value in _leaves(metrics) if "/chance" in path}
    levels = {**random_levels, **given}
    cards = [_task_card(task, values, levels) for task, values in by_task(metrics).items()]
    return tag("div", cards, class_="cards tasks")


def by_task(metrics: Any) -> dict[str, dict[str, float]]:
    """Fractions by task; counts, chance levels and other numbers beside them are left out."""
    tasks: dict[str, dict[str, float]] = {}
    for path, value in _leaves(metrics):
        task, _, metric = path.rpartition("/")
        if task and "chance" not in path and 0 <= value <= 1:
            tasks.setdefault(task, {})[metric] = value
    return tasks


def _leaves(tree: Any, path: str = "") -> list[tuple[str, float]]:
    """All numbers of nested mappings with their paths."""
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}" if path else str(key))]
    return [(path, float(tree))] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


def _task_card(task: str, values: dict[str, float], levels: dict[str, float]) -> Markup:
    rows = [_metric(metric, value, levels.get(f"{task}/{metric}")) for metric, value in values.items()]
    title = TASK_NAMES.get(task, task.replace("/", ", ").replace("_", " "))
    return tag("article", tag("h3", title), rows, class_="card")


def _metric(metric: str, value: float, level: float | None) -> Markup:
    """One number. level: what guessing would score."""
    name = tag("span", METRIC_NAMES.get(metric, metric.replace("_", " ")))
    bar = [tag("span", style=f"width:{100 * value:.2f}%", class_="fill")]
    chance = None
    if level:
        times = f"{number(value / level)} × " if value > level else ""
        chance = tag("span", f"{times}chance ({_percent(level)})", class_="aside")
        bar.append(tag("span", style=f"left:{100 * level:.2f}%", class_="chance"))
    line = tag("div", tag("span", _percent(value), class_="value"), name, chance, class_="line")
    return tag("div", line, tag("div", bar, class_="track"), class_="metric")


def _percent(fraction: float) -> str:
    return f"{number(100 * fraction)} %" if 0 < fraction < 0.1 else f"{100 * fraction:.1f} %"
