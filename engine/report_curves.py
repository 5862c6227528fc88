"""Curves of a run's log as small multiples: inline SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harmony.objectives import REGISTRY
from .errors import UserError
from .report_html import Child, Markup, tag

NAMES = {
    "contrastive": "Contrastive (CLIP)",
    "self_distillation": "Self-distillation (iBOT)",
    "reconstruction": "Reconstruction (MAE)",
    "masked_language": "Masked language (MLM)",
    "text_distillation": "Text self-distillation",
}
RUN_CURVES = {
    "lr": "Learning rate",
    "weight_decay": "Weight decay",
    "ema_momentum": "Teacher momentum",
    "gradient_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
}
POINTS = 240
"""Points drawn of a curve; longer logs are averaged in groups."""
SMOOTHED_FROM = 16
"""Curves with at least so many points get a smoothed line over the raw one."""
COLOURS = 6
"""Line colours in the style sheet."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One logged quantity; only its finite values."""

    steps: list[float]
    values: list[float]


def objective_name(name: str) -> str:
    """An objective as people call it."""
    return NAMES.get(name, name.replace("_", " ").capitalize())


def read_log(path: Path) -> list[Entry]:
    """The logged steps in order; a line cut short (by a run that still writes) is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and _is_number(entry.get("step")):
            entries.append(entry)
    return entries


def series(log: list[Entry], key: str) -> Series:
    """The values of `key`."""
    found = [(e["step"], e[key]) for e in log if _is_number(e.get(key))]
    return Series([float(s) for s, _ in found], [float(v) for _, v in found])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def loss_panels(log: list[Entry], objectives: list[str]) -> Markup:
    """The total loss and one panel per objective."""
    if not log:
        raise UserError("log.jsonl has no logged step yet")
    panels = [_panel("Total", series(log, "loss"), "var(--ink)", "Weighted sum of the losses below.", change=True)]
    for i, name in enumerate(objectives):
        doc = (inspect.getdoc(REGISTRY[name]) or "").partition("\n\n")[0]
        colour = f"var(--line-{i % COLOURS})"
        panels.append(_panel(objective_name(name), series(log, f"loss/{name}"), colour, doc, change=True))
    return tag("div", panels, class_="panels")


def run_panels(log: list[Entry], objectives: list[str]) -> Markup:
    """Schedules, gradient norm and throughput, then what the objectives report beside their loss."""
    if not log:
        raise UserError("log.jsonl has no logged step yet")
    panels = [_panel(title, series(log, key), "var(--quiet)", "") for key, title in RUN_CURVES.items()]
    extra = dict.fromkeys(key for entry in log for key in entry if "/" in key and not key.startswith("loss/"))
    places = {name: i for i, name in enumerate(objectives)}
    for key in sorted(extra, key=lambda key: places.get(key.partition("/")[0], len(places))):
        objective, _, metric = key.partition("/")
        place = places.get(objective, len(places))
        title = f"{objective.capitalize()}: {metric}".replace("_", " ")
        panels.append(_panel(title, series(log, key), f"var(--line-{place % COLOURS})", ""))
    return tag("div", panels, class_="panels small")


def _panel(title: str, curve: Series, colour: str, explanation: str, change: bool = False) -> Markup | None:
    """Title, start and end value, and the curve."""
    if not curve.values:
        return None
    start, end = curve.values[0], curve.values[-1]
    numbers: list[Child] = [tag("span", number(start), class_="from"), " → ", tag("b", number(end))]
    if change and start > 0 and len(curve.values) > 1:
        percent = 100 * (end / start - 1)
        numbers.append(tag("span", f"{percent:+.0f} %".replace("-", "−"), class_="down" if percent < 0 else "up"))
    heading = tag("div", tag("h3", title), tag("div", numbers, class_="numbers"), class_="heading")
    note = tag("p", explanation) if explanation else None
    return tag("div", heading, _plot(curve, colour, title), note, class_="panel")


def _plot(curve: Series, colour: str, title: str) -> Markup:
    """The curve over 100 x 100 units stretched to its box; labels are HTML, so that no text is stretched with it."""
    curve = thinned(curve)
    ticks = nice_ticks(min(curve.values), max(curve.values))
    low, high = min(ticks[0], *curve.values), max(ticks[-1], *curve.values)
    first, last = curve.steps[0], curve.steps[-1]

    def height(value: float) -> float:
        return 100 - 100 * (value - low) / (high - low)

    def path(values: list[float], class_: str) -> Markup:
        x = [100 * (s - first) / ((last - first) or 1) for s in curve.steps]
        points = " ".join(f"{a:.2f},{height(b):.2f}" for a, b in zip(x, values, strict=True))
        return tag("polyline", points=points, class_=class_, stroke=colour, vector_effect="non-scaling-stroke")

    smooth = len(curve.values) >= SMOOTHED_FROM
    grid = [tag("line", x1=0, x2=100, y1=f"{height(t):.2f}", y2=f"{height(t):.2f}",
                vector_effect="non-scaling-stroke") for t in ticks]  # fmt: skip
    lines = [path(curve.values, "raw" if smooth else "main")]
    lines += [path(smoothed(curve.values), "main")] if smooth else []
    svg = tag("svg", grid, lines, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=title)
    texts = zip(ticks, tick_labels(ticks), strict=True)
    labels = [tag("span", text, style=f"top:{height(t):.1f}%") for t, text in texts]
    steps = [tag("span", f"step {first:,.0f}"), tag("span", f"{last:,.0f}")]
    return tag("div", tag("div", labels, class_="y"), svg, tag("div", steps, class_="x"), class_="plot")


def thinned(curve: Series) -> Series:
    """At most POINTS points, each the mean of a group of neighbours."""
    size = math.ceil(len(curve.values) / POINTS)
    starts = range(0, len(curve.values), size)
    means = [[statistics.fmean(x[i : i + size]) for i in starts] for x in (curve.steps, curve.values)]
    return Series(*means)


def smoothed(values: list[float]) -> list[float]:
    """Centred moving average over about a tenth of the curve, over less near its ends so that it lags nowhere."""
    radius = max(len(values) // 20, 1)
    out = []
    for i in range(len(values)):
        reach = min(radius, i, len(values) - 1 - i)
        out.append(statistics.fmean(values[i - reach : i + reach + 1]))
    return out


def nice_ticks(low: float, high: float) -> list[float]:
    """A few round numbers within the range, at least three (for a constant: around it)."""
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-12):
        margin = abs(high) / 2 or 0.5
        return [low - margin, low, low + margin]
    power = 10 ** math.floor(math.log10(high - low))
    ticks: list[float] = []
    for multiple in (5, 2.5, 2, 1, 0.5, 0.25):  # the last gives at least three
        if len(ticks) < 3:
            step = power * multiple
            ticks = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return ticks


def tick_labels(ticks: list[float]) -> list[str]:
    """The ticks with as many decimals as tell them apart."""
    step = ticks[1] - ticks[0]
    digits = next((n for n in range(6) if abs(round(step, n) - step) <= 1e-3 * step), None)
    if digits is None:
        return [number(tick) for tick in ticks]
    return [f"{tick:,.{digits}f}".replace("-", "−") for tick in ticks]


def number(value: float) -> str:
    """About three significant digits, without needless zeros."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
