"""Which branch of a run is evaluated and exported, and what was measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..harmony.model import Branch, Harmony
from .config import RunConfig
from .errors import UserError


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
    """The metrics of other tasks, from earlier calls; a damaged file counts as none."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
