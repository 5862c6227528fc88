"""How training went: losses, schedules, speed and memory, where the step's time goes, and whatever else was logged."""

from __future__ import annotations

import inspect
import statistics

from ...harmony.objectives import REGISTRY
from ..errors import UserError
from .charts import Line, panel, shares
from .curves import Series, number, objective_name, series
from .markup import Child, Markup, run_colour, run_dash, run_name, tag
from .run import Run
from .schedules import schedules

ORDINARY = {"step", "epoch", "loss", "lr", "weight_decay", "ema_momentum", "samples_per_second"}
"""Logged without a prefix, and shown in places of their own."""
TITLES = {"samples_per_second": "Samples per second", "gradient_norm": "Gradient norm"}
COLOURS = 6
"""Line colours of objectives in the style sheet."""
GIB = 2**30


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


def lines_of(runs: list[Run], key: str, own: str, scale: float = 1.0) -> list[Line]:
    """A logged quantity of every run; with a single run in the colour `own`. scale: values are divided by it."""
    return [line_of(runs, run, scaled(series(run.log, key), scale), own) for run in runs]


def line_of(runs: list[Run], run: Run, curve: Series, own: str, reached: float | None = None) -> Line:
    """A curve of one run, in the run's colour where there are several."""
    if len(runs) == 1:
        return Line(run.name, curve, own, None, reached)
    return Line(run.name, curve, run_colour(run.place), run_dash(run.place), reached)


def scaled(curve: Series, scale: float) -> Series:
    """Values divided by `scale`."""
    return curve if scale == 1 else Series(curve.steps, [value / scale for value in curve.values])


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
    """Throughput and memory over time, and the parts of a step."""
    need_logs(runs)
    keys = [key for key in logged_keys(runs) if "memory" in key]
    panels = [panel("Samples per second", lines_of(runs, "samples_per_second", "var(--accent)"))]
    for key in keys:
        large = max((v for run in runs for v in series(run.log, key).values), default=0) > 1e6  # bytes
        title = readable(key) + (", GiB" if large else "")
        panels.append(panel(title, lines_of(runs, key, "var(--accent)", GIB if large else 1.0)))
    bars = [_step_time(runs, run) for run in runs]
    return [tag("div", panels, class_="panels small"), tag("div", bars, class_="cards wide") if any(bars) else None]


def _step_time(runs: list[Run], run: Run) -> Markup | None:
    """The median of each part of a step, where the run logged them (as `time/<part>`, in seconds)."""
    curves = {key[5:]: series(run.log, key).values for key in logged_keys([run]) if key.startswith("time/")}
    parts = {part.replace("_", " "): 1000 * statistics.median(values) for part, values in curves.items() if values}
    if sum(parts.values()) <= 0:
        return None
    name = "Where a step's time goes" if len(runs) == 1 else run_name(run.name, run.place)
    return shares(name, parts, "ms")


def others(runs: list[Run]) -> Child:
    """Everything else with a number: what the objectives report, gradients, whatever later versions log."""
    need_logs(runs)
    shown = [key for key in logged_keys(runs) if not key.startswith(("loss/", "time/")) and "memory" not in key]
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
