"""Charts as inline SVG, coloured by the page's style sheet; labels are HTML: no text is stretched with the box."""

from __future__ import annotations

from dataclasses import dataclass

from .curves import Series, nice_ticks, number, smoothed, thinned, tick_labels
from .markup import Child, Markup, foreign, tag

SMOOTHED_FROM = 16
"""Curves with at least so many points get a smoothed line over the raw one."""
NAMED = 3
"""Up to so many lines, the last values in a panel carry their names; the colours say the same."""


@dataclass(frozen=True)
class Line:
    """One curve of a panel."""

    name: str
    """Of the run, where there are several."""
    curve: Series
    colour: str
    dash: str | None = None
    reached: float | None = None
    """For a schedule: the step at which the run stands; what lies beyond is drawn faint."""


def panel(
    title: str, lines: list[Line], note: str = "", change: bool = False, smooth: bool = True, above: str = ""
) -> Markup | None:
    """Title, values, and the curves over the same axes; None without any value.

    change: tell by how much the value changed, for losses. smooth: where there are enough points. above: what the
    quantity belongs to.
    """
    lines = [line for line in lines if line.curve.values]
    if not lines:
        return None
    values = _from_to(lines[0], change) if len(lines) == 1 else _last_values(lines)
    eyebrow = tag("p", above, class_="eyebrow") if above else None
    heading = tag("div", eyebrow, tag("h3", title), values, class_="heading")
    return tag("article", heading, _plot(lines, title, smooth), tag("p", note) if note else None, class_="panel")


def _from_to(line: Line, change: bool) -> Markup:
    start, end = line.curve.values[0], line.curve.values[-1]
    numbers: list[Child] = [tag("span", number(start), class_="from"), " → ", tag("b", number(end))]
    if change and start > 0 and len(line.curve.values) > 1:
        percent = 100 * (end / start - 1)
        numbers.append(tag("span", f"{percent:+.0f} %".replace("-", "−"), class_="down" if percent < 0 else "up"))
    return tag("div", numbers, class_="numbers")


def _last_values(lines: list[Line]) -> Markup:
    def item(line: Line) -> Markup:
        name = tag("span", foreign(line.name), class_=None if len(lines) <= NAMED else "unseen")
        swatch = tag("line", x1=0, x2=20, y1=5, y2=5, stroke=line.colour, stroke_dasharray=line.dash)
        picture = tag("svg", swatch, viewBox="0 0 20 10", class_="swatch", aria_hidden="true")
        return tag("li", picture, name, " ", tag("b", number(line.curve.values[-1])), title=line.name)

    return tag("ul", [item(line) for line in lines], class_="ends")


def _plot(lines: list[Line], title: str, smooth: bool) -> Markup:
    """The curves over 100 x 100 units stretched to their box."""
    curves = [thinned(line.curve) for line in lines]
    every = [value for curve in curves for value in curve.values]
    ticks = nice_ticks(min(every), max(every))
    low, high = min(ticks[0], *every), max(ticks[-1], *every)
    first, last = min(c.steps[0] for c in curves), max(c.steps[-1] for c in curves)

    def across(step: float) -> float:
        return 100 * (step - first) / ((last - first) or 1)

    def up(value: float) -> float:
        return 100 - 100 * (value - low) / (high - low)

    def path(line: Line, steps: list[float], values: list[float], class_: str) -> Markup:
        points = " ".join(f"{across(a):.2f},{up(b):.2f}" for a, b in zip(steps, values, strict=True))
        return tag("polyline", tag("title", line.name), points=points, class_=class_, stroke=line.colour,
                   stroke_dasharray=line.dash, vector_effect="non-scaling-stroke")  # fmt: skip

    drawn = [tag("line", x1=0, x2=100, y1=f"{up(t):.2f}", y2=f"{up(t):.2f}", vector_effect="non-scaling-stroke")
             for t in ticks]  # fmt: skip
    main = []
    for line, curve in zip(lines, curves, strict=True):
        if smooth and len(curve.values) >= SMOOTHED_FROM:
            drawn.append(path(line, curve.steps, curve.values, "raw"))
            main.append(path(line, curve.steps, smoothed(curve.values), "main"))
        elif line.reached is not None and line.reached < curve.steps[-1]:
            done = max(sum(step <= line.reached for step in curve.steps), 1)
            drawn.append(path(line, curve.steps, curve.values, "ahead"))
            main.append(path(line, curve.steps[:done], curve.values[:done], "main"))
        else:
            main.append(path(line, curve.steps, curve.values, "main"))
    words = f"{title}, steps {first:,.0f} to {last:,.0f}, from {number(min(every))} to {number(max(every))}"
    svg = tag("svg", drawn, main, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=words)
    labels = [tag("span", text, style=f"top:{up(t):.1f}%") for t, text in zip(ticks, tick_labels(ticks), strict=True)]
    steps = [tag("span", f"step {first:,.0f}"), tag("span", f"{last:,.0f}")]
    return tag("div", tag("div", labels, class_="y"), svg, tag("div", steps, class_="x"), class_="plot")
