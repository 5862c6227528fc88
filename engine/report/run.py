"""A run folder, read for the report: what several parts of the page need is made when first asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ...harmony.image_encoder import ImageEncoder
from ...harmony.model import Branch, Harmony
from ..checkpoint import LoadedRun, load_run
from ..checkpoint_folder import FINISHED
from ..config import RunConfig, load_config
from ..data.beton_set import BetonSet
from ..errors import UserError
from ..evaluate import choose_branch
from ..evaluate.features import how_to_read, image_tower
from .curves import Entry, read_log
from .samples import COUNT, Gallery, HeldOut, gather


@dataclass
class Run:
    """One run. Raises UserError where a part needs what the run has not: a checkpoint, data, an image tower."""

    folder: Path
    name: str
    """Short, and different from the other runs' on the page."""
    place: int
    """Among the runs of the page."""
    config: RunConfig
    log: list[Entry]
    held: HeldOut
    count: int = COUNT
    """Samples whose pictures are shown."""

    @cached_property
    def outline(self) -> Harmony:
        """The model without its weights: which parts there are, and how large."""
        with torch.device("meta"):
            return Harmony(self.config)

    @cached_property
    def loaded(self) -> LoadedRun:
        """The newest checkpoint."""
        return load_run(self.folder, "cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def checkpoint(self) -> str:
        """The newest checkpoint in words, or why there is none; stays when the weights are forgotten."""
        try:
            return f"checkpoint {self.loaded.checkpoint.name}"
        except UserError as error:
            return str(error)

    @property
    def model(self) -> Harmony:
        """The newest checkpoint's."""
        return self.loaded.model

    @cached_property
    def gallery(self) -> Gallery:
        """The samples shown, and all that the model is given of them."""
        return gather(self.config, self.held, self.count)

    @property
    def objectives(self) -> list[str]:
        """Names of what it learns by."""
        return list(self.config.objectives.active())

    @property
    def branch(self) -> Branch:
        """The branch that is evaluated."""
        return choose_branch(self.config, self.model)

    @property
    def branch_name(self) -> str:
        """In words."""
        return "EMA teacher" if self.branch is self.model.teacher else "student"

    @property
    def image_encoder(self) -> ImageEncoder:
        """Of the evaluated branch; choosing that makes sure that it has one."""
        return image_tower(self.branch)

    @cached_property
    def samples(self) -> int | None:
        """Of the training data, as far as a look at it tells."""
        try:
            data = self.config.data
            return len(BetonSet(data.sources)) if data.loader == "ffcv" else data.samples
        except UserError:
            return None

    @property
    def steps_per_epoch(self) -> int | None:
        """None where the training data are gone."""
        return self.samples // self.config.data.batch_size if self.samples else None

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return (self.folder / FINISHED).is_file()

    @property
    def steps(self) -> int:
        """Done, as far as they were logged."""
        return int(self.log[-1]["step"]) if self.log else 0

    @property
    def total_steps(self) -> int | None:
        """Planned."""
        total = self.config.epochs * (self.steps_per_epoch or 0)
        return min(total, self.config.max_steps or total) if total else self.config.max_steps

    def forget_weights(self) -> None:
        """Free the model and the samples: a page may be about many runs. The name of the checkpoint is kept."""
        _ = self.checkpoint
        for name in ("loaded", "gallery"):
            self.__dict__.pop(name, None)


def read_runs(folders: list[Path]) -> list[Run]:
    """All runs of a page. Runs with the same held-out data share what is read of them. Raises UserError."""
    held: dict[str, HeldOut] = {}
    count = max(min(COUNT, 2 * COUNT // len(folders)), 2)
    runs = []
    for place, (folder, name) in enumerate(zip(folders, short_names(folders), strict=True)):
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: not a run folder (no config.yaml)")
        config = load_config(folder / "config.yaml")
        same = config.evaluate.data, config.evaluate.bank, how_to_read(config), config.data.sources
        data = held.setdefault(repr(same), HeldOut(config))
        runs.append(Run(folder, name, place, config, read_log(folder / "log.jsonl"), data, count))
    return runs


def short_names(folders: list[Path]) -> list[str]:
    """The folders' names; of equal ones as much of the path as tells them apart: `clip` for clip/seed-0."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [Path(os.path.relpath(path, os.path.commonpath(paths))).parts for path in paths]
    same = 0
    while all(len(p) > same + 1 and p[-1 - same] == parts[0][-1 - same] for p in parts):
        same += 1
    return ["/".join(p[: len(p) - same]) for p in parts]
