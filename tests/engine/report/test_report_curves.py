"""The building blocks of the report: escaping, numbers, ticks, smoothing."""

from __future__ import annotations

import re

import pytest
from harmony_fast.engine.report.curves import nice_ticks, number, smoothed, tick_labels
from harmony_fast.engine.report.markup import RUN_COLOURS, STYLE, Markup, tag


def test_texts_are_escaped_by_construction() -> None:
    assert tag("p", "<i>", Markup("<b></b>"), ["&"], None, title='"') == '<p title="&quot;">&lt;i&gt;<b></b>&amp;</p>'
    assert tag("img", alt="<", hidden=None) == '<img alt="&lt;">'


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (5.5512, "5.55"), (0.05, "0.05"), (-0.5, "−0.5"), (1e-4, "1e−4"), (100.0, "100")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (5.1, 5.6), (0.23, 9.0), (-3.0, 900.0), (2.0, 2.0), (0.0, 0.0), (1e-9, 2e-9)]
)
def test_ticks_lie_in_order_and_near_the_range(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 3 <= len(ticks) <= 6
    assert ticks == sorted(ticks)
    if high > low:
        assert low - 1e-9 <= ticks[0] <= ticks[-1] <= high + 1e-9


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.98, 0.98005, 0.9801], ["0.98000", "0.98005", "0.98010"]),
        ([0.0, 2.5, 5.0], ["0.0", "2.5", "5.0"]),
        ([0.0, 1000.0, 2000.0], ["0", "1,000", "2,000"]),
        ([0.0, 1e-6, 2e-6], ["0", "1e−6", "2e−6"]),
    ],
)
def test_tick_labels_tell_ticks_apart(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize("count", [1, 2, 5, 40, 240])
def test_smoothing_does_not_lag(count: int) -> None:
    values = [3.0 - 0.5 * i for i in range(count)]
    assert smoothed(values) == pytest.approx(values)


def test_smoothing_makes_noise_smaller_at_the_ends_too() -> None:
    noise = [float((7 * i * i + 3 * i) % 11 - 5) for i in range(200)]
    smooth = smoothed(noise)
    for part in (slice(0, 8), slice(96, 104), slice(192, 200)):
        assert sum(v * v for v in smooth[part]) < 0.5 * sum(v * v for v in noise[part])


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_texts_and_lines_stand_out_in_both_schemes() -> None:
    style = STYLE.read_text(encoding="utf-8")
    light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
    schemes = [
        dict(re.findall(r"--([a-z]+-?[a-z0-9]*): (#[0-9a-f]{6})", part.split("* {")[0])) for part in (light, dark)
    ]
    for colours in (schemes[0], {**schemes[0], **schemes[1]}):
        for text in ("ink", "quiet", "accent", "good"):
            assert min(contrast(colours[text], colours[under]) for under in ("page", "card")) >= 4.5
        for text, under in (("good", "good-soft"), ("ink", "mark"), ("ink", "fill"), ("ink", "grid")):
            assert contrast(colours[text], colours[under]) >= 4.5
        for i in range(RUN_COLOURS):
            assert contrast(colours[f"run-{i}"], colours["card"]) >= 3
