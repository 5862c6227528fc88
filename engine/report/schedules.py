"""Scalars that follow from the step alone, over the whole length of a run, whatever of it is done."""

from __future__ import annotations

from ...harmony.schedules import Clock
from ...harmony.views import View, pixel_ratio
from ..optimizer import scalars_at
from .curves import Series, series
from .run import Run

POINTS = 200
"""Steps at which a schedule is looked at."""
SCALARS = {"lr": "Learning rate", "weight_decay": "Weight decay", "ema_momentum": "Teacher momentum"}


def schedules(run: Run) -> dict[str, Series]:
    """By title. As planned where the length of the training data is known, else what was logged so far."""
    per_epoch = run.steps_per_epoch
    if not per_epoch:
        logged = {title: series(run.log, key) for key, title in SCALARS.items()}
        return {title: curve for title, curve in logged.items() if curve.values and _taught(run, title)}
    total = run.total_steps or 1
    steps = sorted({round(i * (total - 1) / (POINTS - 1)) for i in range(POINTS)})
    found = [_at(run, Clock(step, per_epoch, run.config.epochs)) for step in steps]
    return {title: Series([step + 1.0 for step in steps], [at[title] for at in found]) for title in found[0]}


def _at(run: Run, clock: Clock) -> dict[str, float]:
    """All scalars of one step."""
    scalars = scalars_at(run.config, clock)
    found = {title: getattr(scalars, key) for key, title in SCALARS.items() if _taught(run, title)}
    if View.GLOBAL_VISIBLE in run.outline.student_views:
        found["Share of patches removed (MAE)"] = pixel_ratio(run.config.views, clock)
    for name, objective in run.outline.objectives.items():
        label = name.replace("_", " ").capitalize()
        found.update({f"{label}: {key.replace('_', ' ')}": v for key, v in objective.scheduled(clock).items()})
    return found


def _taught(run: Run, title: str) -> bool:
    """Whether the scalar means something here: without a teacher there is no momentum."""
    return title != SCALARS["ema_momentum"] or bool(run.outline.teacher_views)
