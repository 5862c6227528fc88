"""Evaluation: one file per task; this file runs them on a run folder and writes metrics.json."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...harmony.model import Branch, Harmony
from ..checkpoint import load_run
from ..config import RunConfig, with_overrides
from ..data.labelled import LabelledSample, read_labelled
from ..errors import UserError
from .features import class_tokens, image_embeddings, text_embeddings
from .knn import knn
from .retrieval import retrieval
from .zero_shot import class_weights, zero_shot

TASKS = ("zero-shot", "retrieval", "knn")


def evaluate_run(run_dir: Path, tasks: list[str], overrides: list[str]) -> dict[str, Any]:
    """Run tasks (all that this run can do, if none is named) on the newest checkpoint; write and return the metrics.

    overrides: `evaluate.key=value`. Raises UserError for an unknown task, missing data, or a task the run cannot do.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task '{task}'; one of {', '.join(TASKS)}")
    config, model = load_run(run_dir, "cuda" if torch.cuda.is_available() else "cpu")
    config = with_overrides(config, overrides)
    metrics = evaluate_model(config, model, tasks)
    path = run_dir / "metrics.json"
    path.write_text(json.dumps({**known_metrics(path), **metrics}, indent=1) + "\n")
    Console().print(as_table(metrics))
    return metrics


def known_metrics(path: Path) -> dict[str, Any]:
    """The metrics of other tasks, from earlier calls; a damaged file counts as none."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def evaluate_model(config: RunConfig, model: Harmony, tasks: list[str]) -> dict[str, Any]:
    """The metrics of one branch of a model. Shape of the result: see `TASKS`, one entry per task."""
    branch = choose_branch(config, model)
    samples = read_labelled(require(config.evaluate.data, "evaluate.data"))
    tokens = class_tokens(branch, samples, config)
    metrics: dict[str, Any] = {}
    if wanted("zero-shot", tasks, branch.text is not None and branch.image.contrastive_projection is not None):
        metrics["zero_shot"] = run_zero_shot(config, branch, samples, tokens)
    if wanted("retrieval", tasks, branch.text is not None and branch.image.contrastive_projection is not None):
        captions = [sample.caption for sample in samples]
        texts = text_embeddings(branch, captions, config)
        metrics["retrieval"] = retrieval(image_embeddings(branch, tokens), texts, captions)
    if wanted("knn", tasks, bool(config.evaluate.bank)):
        bank = read_labelled(require(config.evaluate.bank, "evaluate.bank"))
        key = config.evaluate.group_key
        metrics["knn"] = knn(
            tokens, labels(samples, key), class_tokens(branch, bank, config), labels(bank, key),
            config.evaluate.neighbours,
        )  # fmt: skip
    return metrics


def run_zero_shot(
    config: RunConfig, branch: Branch, samples: list[LabelledSample], tokens: torch.Tensor
) -> dict[str, float]:
    """Zero-shot over all class names that occur in the samples."""
    names = labels(samples, config.evaluate.class_key)
    classes = list(dict.fromkeys(names))
    embed = partial(text_embeddings, branch, config=config)
    weights = class_weights(embed, classes, config.evaluate.templates)
    return zero_shot(image_embeddings(branch, tokens), weights, names, classes)


def choose_branch(config: RunConfig, model: Harmony) -> Branch:
    """The EMA teacher where it has an image tower (and a text tower, if the student has one), else the student."""
    complete = model.teacher.image is not None and (model.teacher.text is not None or model.student.text is None)
    branch = model.teacher if config.evaluate.branch == "teacher" and complete else model.student
    if branch.image is None:
        raise UserError("this run trained no image encoder")
    return branch


def wanted(task: str, tasks: list[str], possible: bool) -> bool:
    """Whether to run a task: named and possible, or none named and possible."""
    if task in tasks and not possible:
        raise UserError(f"this run cannot do {task}: it needs the contrastive objective (knn: evaluate.bank)")
    return possible and (not tasks or task in tasks)


def labels(samples: list[LabelledSample], key: str) -> list[str]:
    """One label of every sample, as text."""
    for sample in samples:
        if key not in sample.labels:
            raise UserError(f"sample {sample.key} has no label '{key}'; it has: {', '.join(sample.labels) or 'none'}")
    return [str(sample.labels[key]) for sample in samples]


def require(sources: list[str], key: str) -> list[str]:
    """The sources, which must be there."""
    if not sources:
        raise UserError(f"{key} is empty: name the tars to evaluate on, e.g. {key}=[demo/twemoji.tar]")
    return sources


def as_table(metrics: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table("task", "metric", "%", title="evaluation")
    for task, values in metrics.items():
        for name, value in values.items():
            for k, v in value.items() if isinstance(value, dict) else [(None, value)]:
                table.add_row(task, name if k is None else f"{name} {k}", f"{100 * v:.2f}")
    return table
