"""Evaluation: one file per task; this file runs them on a run folder or an exported file and writes metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..checkpoint import load_run
from ..config import RunConfig, with_overrides
from ..data.pictures import PictureSet, open_pictures
from ..errors import UserError
from ..evaluated import about, choose_branch, keep_metrics
from ..export.metadata import exported_file, load_exported
from .chance import CHANCE, agreement, with_levels
from .classes import Labelled, class_names, labels_of, require_several
from .features import Features, Towers, extract, how_to_read, image_embeddings, text_embeddings
from .few_shot import few_shot
from .finetune import finetune
from .knn import knn
from .linear import inputs, linear
from .retrieval import retrieval
from .segmentation import segmentation
from .share import ALONE, Share
from .zero_shot import class_weights, zero_shot


def evaluate_run(path: Path, tasks: list[str], overrides: list[str], share: Share = ALONE) -> dict[str, Any]:
    """Run tasks (the quick ones that this run can do, if none is named); write and return the metrics.

    path: a run folder, of which the newest checkpoint is taken, or what `harmony-fast export` wrote. overrides:
    `evaluate.key=value`. Raises UserError for an unknown task, missing data, or a task the run cannot do.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"unknown task '{task}'; one of {', '.join(TASKS)}")
    config, towers, of = load_towers(path, overrides)
    folder = path if path.is_dir() else path.parent

    def keep(task: str, metrics: dict[str, Any]) -> None:
        if share.is_main:
            keep_metrics(folder, {task: metrics}, {task: of})

    metrics = evaluate_towers(config, towers, tasks, share, keep)
    if share.is_main:
        Console().print(as_table(metrics))
    return metrics


def load_towers(path: Path, overrides: list[str]) -> tuple[RunConfig, Towers, dict[str, str]]:
    """Configuration, and towers of a run or an export, on the GPU if there is one; and what they are, in words."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if not (path / "config.yaml").is_file() and (file := exported_file(path)) is not None:
        config, towers = load_exported(file, device)
        wanted = with_overrides(config, overrides)
        if wanted.evaluate.branch != config.evaluate.branch:
            raise UserError(f"{file}: holds the {config.evaluate.branch}, not the {wanted.evaluate.branch}")
        return wanted, towers, about(wanted, file.name, config.evaluate.branch)
    config, model, checkpoint = load_run(path, device)
    config = with_overrides(config, overrides)
    branch = choose_branch(config, model)
    return config, branch, about(config, checkpoint.name, "teacher" if branch is model.teacher else "student")


def evaluate_towers(
    config: RunConfig,
    towers: Towers,
    tasks: Sequence[str],
    share: Share = ALONE,
    keep: Callable[[str, dict[str, Any]], None] = lambda task, metrics: None,
) -> dict[str, Any]:
    """The metrics of the named tasks, or of the quick ones that can be done. All ranks must call.

    keep: told the metrics of each task when it is done, so that a later one's failure loses nothing.
    """
    work = Evaluation(config, towers, share, tasks)
    if not tasks:
        require(config.evaluate.data, "evaluate.data")
    found: dict[str, Any] = {}
    for task in tasks or [task for task in QUICK if work.can(task)]:
        name = task.replace("-", "_")
        found[name] = TASKS[task](work)
        keep(name, found[name])
    return found


class Evaluation:
    """What the tasks of one call share: each set goes through the tower once."""

    def __init__(self, config: RunConfig, towers: Towers, share: Share, tasks: Sequence[str]) -> None:
        if towers.image is None:
            raise UserError("this run trained no image encoder")
        self.config, self.towers, self.image, self.share = config, towers, towers.image, share
        self._blocks = config.evaluate.linear.blocks if "linear" in tasks else 1

    def pictures(self, key: str) -> PictureSet:
        """The set that `evaluate.data` or `evaluate.bank` names. Raises UserError."""
        return open_pictures(require(getattr(self.config.evaluate, key), f"evaluate.{key}"), how_to_read(self.config))

    @cached_property
    def data(self) -> Features:
        """What is evaluated on."""
        return self._extract("data")

    @cached_property
    def bank(self) -> Features:
        """Labelled samples to learn from."""
        return self._extract("bank")

    def _extract(self, key: str) -> Features:
        return extract(self.towers, self.pictures(key), self.config, self._blocks, self.share)

    @cached_property
    def embed(self) -> Callable[[list[str]], torch.Tensor]:
        """Texts to unit vectors."""
        return partial(text_embeddings, self.towers, config=self.config)

    @property
    def joint(self) -> bool:
        """Whether images and texts have a joint space."""
        return self.towers.text is not None and self.image.contrastive_projection is not None

    def can(self, task: str) -> bool:
        """Whether there is all that a task needs, when none was named."""
        if task == "knn":
            return bool(self.config.evaluate.bank)
        if task == "retrieval":
            return self.joint and all(self.data.captions)
        return self.joint and self.config.evaluate.class_key in self.data.labels[0]

    def require_joint(self, task: str) -> None:
        """Raises UserError without a joint space."""
        if not self.joint:
            raise UserError(f"this run cannot do {task}: it needs the contrastive objective, which trains both towers")

    def labelled(self, task: str) -> tuple[list[str], list[str]]:
        """`evaluate.group_key` of the bank and of the data. Raises UserError where there is none, or one class."""
        self.require_bank(task)
        return self.agreeing(task, self.bank.named_labels, self.data.named_labels)

    def require_bank(self, task: str) -> None:
        """Raises UserError without samples to learn from."""
        if not self.config.evaluate.bank:
            raise UserError(f"this run cannot do {task}: evaluate.bank names no labelled samples to learn from")

    def agreeing(self, task: str, bank: Labelled, data: Labelled) -> tuple[list[str], list[str]]:
        """`evaluate.group_key` of two sets. Raises UserError if they have no label in common, or one class alone."""
        key = self.config.evaluate.group_key
        known, asked = labels_of(bank, key), labels_of(data, key)
        require_several(known, task, key)
        if not set(known) & set(asked):
            raise UserError(f"no {key} of evaluate.data occurs in evaluate.bank: {asked[0]!r} against {known[0]!r}")
        return known, asked


def run_zero_shot(work: Evaluation) -> dict[str, Any]:
    """Zero-shot over the class names that occur in the samples, or over all that `evaluate.classes` gives.

    Classes of one name stay apart, as in open_clip's evaluation, whose numbers ours are to be compared with: ImageNet
    has two called missile and two called sunglasses. Each name goes through the tower once, so that their scores are
    the same to the bit.
    """
    work.require_joint("zero-shot")
    settings = work.config.evaluate
    labels = labels_of(work.data.named_labels, settings.class_key)
    by_label = class_names(labels, settings.classes)
    require_several(list(by_label), "zero-shot", settings.class_key)
    weights = class_weights(work.embed, list(dict.fromkeys(by_label.values())), settings.templates)
    return zero_shot(image_embeddings(work.towers, work.data.last), weights, labels, by_label)


def run_retrieval(work: Evaluation) -> dict[str, Any]:
    """Retrieval over all images and all their captions."""
    work.require_joint("retrieval")
    for name, captions in zip(work.data.names, work.data.captions, strict=True):
        if not captions:
            raise UserError(f"{name} has no caption: retrieval needs one of every image")
    texts = [caption for of_image in work.data.captions for caption in of_image]
    owners = [i for i, of_image in enumerate(work.data.captions) for _ in of_image]
    images = image_embeddings(work.towers, work.data.last)
    return retrieval(images, work.embed(texts), texts, owners, work.data.own_captions)


def run_knn(work: Evaluation) -> dict[str, Any]:
    """Nearest neighbours of the data in the bank."""
    known, asked = work.labelled("knn")
    found = knn(work.data.last, asked, work.bank.last, known, work.config.evaluate.neighbours)
    return found | guessed(known, asked)


def run_linear(work: Evaluation) -> dict[str, Any]:
    """A linear probe, trained on the bank."""
    known, asked = work.labelled("linear")
    settings, device = work.config.evaluate.linear, work.image.cls_token.device
    bank, data = inputs(work.bank, settings), inputs(work.data, settings)
    return linear(bank, known, data, asked, settings, device, work.share) | guessed(known, asked)


def run_few_shot(work: Evaluation) -> dict[str, Any]:
    """Logistic regression on a few samples of the bank."""
    known, asked = work.labelled("few-shot")
    found: dict[str, Any] = few_shot(work.bank.last, known, work.data.last, asked, work.config.evaluate.few_shot)
    return found | guessed(set(known), asked)  # as many of each class are drawn


def run_finetune(work: Evaluation) -> dict[str, Any]:
    """The whole image tower, trained on the bank. Its files are kept in memory, encoded as they are."""
    work.require_bank("finetune")
    bank, data = (list(work.pictures(key).read()) for key in ("bank", "data"))
    known, asked = work.agreeing("finetune", *([(p.name, p.labels) for p in pictures] for pictures in (bank, data)))
    found: dict[str, Any] = finetune(work.image, work.config, bank, known, data, asked, work.share)
    return found | guessed(known, asked)


def guessed(known: Iterable[str], asked: list[str]) -> dict[str, Any]:
    """What naming the label of a random labelled sample would score, to stand beside a task's numbers."""
    return {CHANCE: {"top1": agreement(known, asked)}}


def run_segmentation(work: Evaluation) -> dict[str, Any]:
    """A linear layer on frozen patch tokens. Without a bank, it learns from the training part of the data."""
    settings = work.config.evaluate
    data = require(settings.data, "evaluate.data")
    bank = settings.bank or [root for root in data if (Path(root) / "images" / "training").is_dir()]
    if not bank:
        raise UserError("segmentation: evaluate.bank is empty, and evaluate.data has no training part to learn from")
    return segmentation(work.image, work.config, bank, data, work.share)


TASKS: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "zero-shot": run_zero_shot,
    "retrieval": run_retrieval,
    "knn": run_knn,
    "linear": run_linear,
    "few-shot": run_few_shot,
    "finetune": run_finetune,
    "segmentation": run_segmentation,
}
QUICK = ("zero-shot", "retrieval", "knn")
"""What runs when no task is named."""


def require(sources: list[str], key: str) -> list[str]:
    """The sources, which must be there."""
    if not sources:
        raise UserError(f"{key} is empty: name what to read, e.g. {key}=[demo/twemoji.tar]")
    return sources


def as_table(metrics: dict[str, Any]) -> Table:
    """For the terminal: fractions in percent, words as they are."""
    table = Table("task", "metric", "%", "chance", title="evaluation")
    for path, value, level in with_levels(metrics):
        task, _, metric = path.partition("/")
        shown = value if isinstance(value, str) else f"{100 * value:.2f}"
        table.add_row(task, metric.replace("/", " "), shown, "" if level is None else f"{100 * level:.2f}")
    return table
