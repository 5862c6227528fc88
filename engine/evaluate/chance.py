"""What guessing would score: kept beside the numbers of a task under `chance`, by the same names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ..evaluated import leaves

CHANCE = "chance"


def agreement(known: Iterable[str], asked: Iterable[str]) -> float:
    """The chance that a random label of the one equals a random label of the other."""
    here, there = Counter(known), Counter(asked)
    return sum(here[label] * there[label] for label in here) / (here.total() * there.total())


def levels(metrics: Any) -> dict[str, float]:
    """What guessing would score, as far as the metrics tell, by the path of the number it belongs to."""
    found = {}
    for path, value in leaves(metrics):
        parts = path.split("/")
        if CHANCE in parts and isinstance(value, int | float) and math.isfinite(value):
            found["/".join(part for part in parts if part != CHANCE)] = float(value)
    return found


def level_of(known: dict[str, float], path: str) -> float | None:
    """What guessing would score, of one number; variants of a task (`knn/k10/top1`) share the task's."""
    return known.get(path, known.get(f"{path.partition('/')[0]}/{path.rpartition('/')[2]}"))


def with_levels(metrics: Any) -> Iterator[tuple[str, Any, float | None]]:
    """Numbers and words of the tasks, each with its path and with what guessing would score, where that is known."""
    known = levels(metrics)
    for path, value in leaves(metrics):
        if CHANCE not in path.split("/"):
            yield path, value, level_of(known, path)
