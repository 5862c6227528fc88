"""Which branch of a run is evaluated and exported, and what was measured of it.

metrics.json         numbers by task, of the newest call of each
metrics.about.json   by task: on which data, with which labelled samples to learn from, which branch, which checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..harmony.model import Branch, Harmony
from .config import RunConfig
from .disk import replace_text
from .errors import UserError

METRICS, ABOUT = "metrics.json", "metrics.about.json"


def choose_branch(config: RunConfig, model: Harmony) -> Branch:
    """The EMA teacher where it has all that the student has (towers, projections to the joint space), else the student.

    Raises UserError where there is no image tower.
    """
    branch = model.teacher if config.evaluate.branch == "teacher" and _complete(model) else model.student
    if branch.image is None:
        raise UserError("this run trained no image encoder")
    return branch


def _complete(model: Harmony) -> bool:
    teacher, student = model.teacher, model.student
    if teacher.image is None or (teacher.text is None and student.text is not None):
        return False
    joint = student.image is not None and student.image.contrastive_projection is not None
    return not joint or teacher.image.contrastive_projection is not None


def known_metrics(path: Path) -> dict[str, Any]:
    """What earlier calls wrote into a file of `METRICS` or `ABOUT`; a damaged file counts as empty."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def leaves(metrics: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of nested mappings, each with the keys that lead to it: ("retrieval/image_to_text/r1", 0.5)."""
    if isinstance(metrics, dict):
        for key, value in metrics.items():
            yield from leaves(value, f"{path}/{key}" if path else str(key))
    else:
        yield path, metrics


def keep_metrics(folder: Path, metrics: dict[str, Any], about: dict[str, Any]) -> None:
    """Put the metrics of some tasks, and what they are of, beside those of other tasks. Raises UserError."""
    for name, content in ((METRICS, metrics), (ABOUT, about)):
        file = folder / name
        replace_text(file, json.dumps({**known_metrics(file), **content}, indent=1) + "\n")


def about(config: RunConfig, checkpoint: str, branch: str) -> dict[str, str]:
    """What numbers are of, in names that tell nothing about the machine."""
    settings = config.evaluate
    sets = {"data": settings.data, "bank": settings.bank}
    names = {key: ", ".join(Path(source).name for source in sources) for key, sources in sets.items() if sources}
    return {**names, "branch": branch, "checkpoint": checkpoint}
