"""How training went: losses, schedules, speed and memory, and whatever else was logged."""

from __future__ import annotations

import inspect

from ...harmony.objectives import REGISTRY
from ..errors import UserError
from .charts import Line, panel
from .curves import Series, number, objective_name, series
from .markup import Child, run_colour, run_dash, tag
from .run import Run
from .schedules import schedules

ORDINARY = {"step", "epoch", "loss", "lr", "weight_decay", "ema_momentum", "samples_per_second"}
"""Logged without a prefix, and shown in places of their own."""
TITLES = {"memory/peak_gib": "Peak memory, GiB", "memory/predicted_gib": "Predicted memory, GiB"}
COLOURS = 6
"""Line colours of objectives in the style sheet."""


def losses(runs: list[Run]) -> Child:
    """The total loss and one panel per objective, all runs over the same axes."""
    need_logs(runs)
    names = list(dict.fromkeys(name for run in runs for name in run.objectives))
    parts = {"loss": ("Total", "Weighted sum of the losses of a run's objectives.", "var(--ink)")}
    for i, name in enumerate(names):
        doc = (inspect.getdoc(REGISTRY[name]) or "").partition("\n\n")[0]
        parts[f"loss/{name}"] = objective_name(name), " ".join(doc.split()), f"var(--line-{i % COLOURS})"
    panels = [panel(title, lines_of(runs, key, own), doc, change=True) for key, (title, doc, own) in parts.items()]
    return tag("div", panels, class_="panels")


def lines_of(runs: list[Run], key: str, own: str) -> list[Line]:
    """A logged quantity of every run; with a single run in the colour `own`."""
    return [line_of(runs, run, series(run.log, key), own) for run in runs]


def line_of(runs: list[Run], run: Run, curve: Series, own: str, reached: float | None = None) -> Line:
    """A curve of one run, in the run's colour where there are several."""
    if len(runs) == 1:
        return Line(run.name, curve, own, None, reached)
    return Line(run.name, curve, run_colour(run.place), run_dash(run.place), reached)


def planned(runs: list[Run]) -> Child:
    """Schedules over the whole of each run, those that stay the same in one line of text."""
    by_run = {run.place: schedules(run) for run in runs}
    panels, fixed = [], []
    for title in dict.fromkeys(title for found in by_run.values() for title in found):
        curves = [(run, by_run[run.place][title]) for run in runs if title in by_run[run.place]]
        values = {value for _, curve in curves for value in curve.values}
        if max(values) - min(values) <= 1e-12 * max(map(abs, values), default=1):
            fixed.append(f"{title[0].lower()}{title[1:]} {number(values.pop())}")
        else:
            lines = [line_of(runs, run, curve, "var(--accent)", float(run.steps)) for run, curve in curves]
            panels.append(panel(title, lines, smooth=False))
    if not panels and not fixed:
        raise UserError("neither the log nor the training file is there, so nothing is known of the schedules")
    constant = tag("p", f"The same at every step: {'; '.join(fixed)}.", class_="note") if fixed else None
    return [tag("div", panels, class_="panels small"), constant]


def speed(runs: list[Run]) -> Child:
    """Throughput and memory over time."""
    need_logs(runs)
    keys = ["samples_per_second", *(key for key in logged_keys(runs) if key.startswith("memory/"))]
    panels = [panel(readable(key), lines_of(runs, key, "var(--accent)")) for key in keys]
    return tag("div", panels, class_="panels small")


def others(runs: list[Run]) -> Child:
    """Everything else with a number: what the objectives report, gradients, whatever later versions log."""
    need_logs(runs)
    shown = [key for key in logged_keys(runs) if not key.startswith(("loss/", "memory/"))]
    groups: dict[str, list[str]] = {}
    for key in shown:
        groups.setdefault(key.partition("/")[0] if "/" in key else "", []).append(key)
    names = list(dict.fromkeys(name for run in runs for name in run.objectives))
    order = sorted(groups, key=lambda group: (names.index(group) if group in names else len(names), group))
    panels = []
    for group in order:
        colour = f"var(--line-{names.index(group) % COLOURS})" if group in names else "var(--accent)"
        for key in groups[group]:
            title = readable(key.partition("/")[2] or key)
            panels.append(panel(title, lines_of(runs, key, colour), above=objective_name(group) if group else ""))
    if not panels:
        raise UserError("nothing else was logged")
    return tag("div", panels, class_="panels small")


def logged_keys(runs: list[Run]) -> list[str]:
    """Every numeric key of the logs that has no place of its own, in the order of their first appearance."""
    keys = dict.fromkeys(key for run in runs for entry in run.log for key in entry)
    return [k for k in keys if k not in ORDINARY and any(series(run.log, k).values for run in runs)]


def readable(key: str) -> str:
    """A key as words."""
    return TITLES.get(key, key.replace("/", ": ").replace("_", " ").capitalize())


def need_logs(runs: list[Run]) -> None:
    """Raises UserError if no run has logged anything."""
    if not any(run.log for run in runs):
        raise UserError("log.jsonl has no logged step yet")
