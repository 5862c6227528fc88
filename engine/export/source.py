"""What is exported: the towers of a run, and what is known about them; and what a format makes of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...harmony.image_encoder import ImageEncoder
from ...harmony.text_encoder import TextEncoder
from ..checkpoint import load_run
from ..checkpoint_folder import step_of
from ..config import RunConfig
from ..errors import UserError
from ..evaluated import ABOUT, METRICS, choose_branch, known_metrics


class JointSpace(NamedTuple):
    """What takes images and texts to one space: the text tower, and both projections [width of the tower, E]."""

    text: TextEncoder
    image_projection: Tensor
    text_projection: Tensor
    logit_scale: Tensor


@dataclass(frozen=True)
class Source:
    """One branch of a run."""

    name: str
    """Of the run's folder."""
    config: RunConfig
    image: ImageEncoder
    text: TextEncoder | None
    branch: str
    """teacher or student"""
    logit_scale: Tensor | None
    """float32 []: logarithm of the factor of the cosines; None without a joint space"""
    logit_bias: Tensor | None
    """float32 []: what the sigmoid loss adds to them"""
    step: int
    """Optimizer steps done."""
    metrics: dict[str, Any]
    """By task, as `evaluate` found them; those of the other branch are left out."""
    about: dict[str, Any]
    """By task, what they are of."""
    folder: Path = Path()
    """Where it goes."""

    @property
    def joint(self) -> JointSpace | None:
        """The joint space of images and texts, if they have one."""
        image, text = self.image.contrastive_projection, self.text
        if image is None or text is None or text.text_projection is None or self.logit_scale is None:
            return None
        return JointSpace(text, image.detach(), text.text_projection.detach(), self.logit_scale)

    def at(self, folder: Path) -> Source:
        """The same, to go to a folder."""
        return replace(self, folder=folder)

    def shareable(self) -> RunConfig:
        """The configuration without the places of files, which say more about a machine than about a model."""
        config = self.config.model_copy(deep=True)
        train = [shareable_name(source) for source in config.data.sources]
        config.data = config.data.model_copy(update={"train": train, "prepare_from": [], "cache_dir": None})
        away: dict[str, Any] = {"data": [], "bank": [], "images": None, "classes": None}
        config.evaluate = config.evaluate.model_copy(update=away)
        config.run_dir = Path("runs") / self.name
        return config


@dataclass(frozen=True)
class Exported:
    """What a format makes of a run."""

    weights: dict[str, Tensor]
    weights_name: str
    """Of the file, as the library expects it."""
    files: dict[str, Any]
    """Name -> text, or plain data that becomes JSON."""
    library: str
    """As the model card's `library_name`."""
    usage: str
    """Python that loads it; FOLDER and FILE stand for the places."""
    notes: list[str] = field(default_factory=list)
    """What a user should know, for the card."""


def shareable_name(source: str) -> str:
    """A data source by the name of its file alone: commands and addresses may hold passwords and keys."""
    if source.startswith("pipe:"):
        return "a command"
    if "://" not in source:
        return Path(source).name
    path = re.split("[?#]", source)[0].rpartition("://")[2].partition("/")[2]
    return Path(path).name or "an address"


def read_source(run_dir: Path, branch: str | None) -> Source:
    """The newest checkpoint of a run. branch: teacher or student; None: the one that is evaluated.

    Raises UserError where there is no checkpoint, or no such branch with an image tower.
    """
    config, model, checkpoint = load_run(run_dir)
    if branch not in (None, "teacher", "student"):
        raise UserError(f"unknown branch '{branch}'; teacher or student")
    chosen = getattr(model, branch) if branch else choose_branch(config, model)
    if chosen.image is None:
        raise UserError(f"{run_dir}: its {branch} has no image tower")
    became = "teacher" if chosen is model.teacher else "student"
    contrastive = dict(model.objectives.items()).get("contrastive")
    scale, bias = (getattr(contrastive, name, None) for name in ("logit_scale", "logit_bias"))
    about = known_metrics(run_dir / ABOUT)
    known = known_metrics(run_dir / METRICS)
    metrics = {task: found for task, found in known.items() if about.get(task, {}).get("branch", became) == became}
    return Source(
        run_dir.resolve().name, config, chosen.image, chosen.text, became, _scalar(scale), _scalar(bias),
        step_of(checkpoint), metrics, about,
    )  # fmt: skip


def _scalar(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().float().reshape(())
