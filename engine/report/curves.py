"""The numbers behind a curve: reading the log, thinning, smoothing, round ticks, short numbers."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = {
    "contrastive": "Contrastive (CLIP)",
    "self_distillation": "Self-distillation (DINO, iBOT)",
    "reconstruction": "Reconstruction (MAE)",
    "masked_language": "Masked language (MLM)",
    "text_distillation": "Text self-distillation",
}
POINTS = 240
"""Points drawn of a curve; longer logs are averaged in groups."""

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
        if isinstance(entry, dict) and is_number(entry.get("step")):
            entries.append(entry)
    return entries


def series(log: list[Entry], key: str) -> Series:
    """The values of `key`."""
    found = [(e["step"], e[key]) for e in log if is_number(e.get(key))]
    return Series([float(s) for s, _ in found], [float(v) for _, v in found])


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thinned(curve: Series) -> Series:
    """At most POINTS points, each the mean of a group of neighbours."""
    size = math.ceil(len(curve.values) / POINTS)
    starts = range(0, len(curve.values), size)
    means = [[statistics.fmean(x[i : i + size]) for i in starts] for x in (curve.steps, curve.values)]
    return Series(*means)


def smoothed(values: list[float]) -> list[float]:
    """At each point the line fitted to about a tenth of the curve around it: a moving average, save near the ends,
    where the line keeps it from lagging."""
    window = min(2 * max(len(values) // 20, 3) + 1, len(values))
    out = []
    for i in range(len(values)):
        first = min(max(i - window // 2, 0), len(values) - window)
        around, centre = values[first : first + window], (window - 1) / 2
        mean = statistics.fmean(around)
        slope = sum((x - centre) * (y - mean) for x, y in enumerate(around))
        slope /= sum((x - centre) ** 2 for x in range(window)) or 1
        out.append(mean + slope * (i - first - centre))
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
