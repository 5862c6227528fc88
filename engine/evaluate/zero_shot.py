"""Zero-shot classification by class names (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .chance import CHANCE
from .classes import read_lines
from .features import in_batches
from .ranking import ranks_of_best, share_within

CLASSES_AT_ONCE = 64
"""Classes whose prompts are embedded in one call."""
ROWS = 4096
"""Images compared at once."""
KS = (1, 5, 10)


def prompts(templates: list[str] | str) -> list[str]:
    """Templates with {} for the class. A name: those that open_clip ships, or a file with one a line.

    Raises UserError, naming the line, where one has no place for the class, or there is no such file.
    """
    if isinstance(templates, list):
        return templates
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    shipped = {"imagenet": OPENAI_IMAGENET_TEMPLATES, "simple": SIMPLE_IMAGENET_TEMPLATES}
    if templates in shipped:
        return [template("{}") for template in shipped[templates]]
    if "{}" in templates:
        return [templates]
    if not Path(templates).is_file():
        raise UserError(f"evaluate.templates: '{templates}' is neither imagenet nor simple nor a file")
    lines = [line.replace("{c}", "{}") for line in read_lines(Path(templates), "evaluate.templates")]
    for line in lines:
        if "{}" not in line:
            raise UserError(f"{templates}: '{line}' has no {{}} for the class name")
    return lines


def class_weights(embed: Callable[[list[str]], Tensor], classes: list[str], templates: list[str] | str) -> Tensor:
    """One unit vector per class, the mean over prompts: [classes, E]. embed: texts -> unit vectors [n, E]."""
    ways = prompts(templates)
    parts = []
    for names in in_batches(classes, CLASSES_AT_ONCE):
        embedded = embed([template.replace("{}", name) for name in names for template in ways])
        parts.append(embedded.unflatten(0, (len(names), len(ways))).mean(1))
    return F.normalize(torch.cat(parts), dim=-1)


def zero_shot(images: Tensor, weights: Tensor, labels: list[str], names: Mapping[str, str]) -> dict[str, Any]:
    """Top-1, top-5 and top-10 accuracy, and the mean over classes of the top-1 accuracy; and what guessing would score.

    images: unit vectors [n, E]; labels: the n true classes; names: of all classes by label; weights: [names, E], each
    name once, in the order of `names`. Of classes with one name the first is found, as in open_clip's evaluation: it
    counts against the later ones, they do not count against it. All other ties count against.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    name, number = torch.tensor([places[each] for each in names.values()]), torch.arange(len(names))
    numbers = {label: i for i, label in enumerate(names)}
    true = torch.tensor([numbers[label] for label in labels])
    ranks = torch.cat([
        ranks_of_best((chunk @ weights.T)[:, name], (name == name[truth]) & (number >= truth))
        for chunk, truth in zip(images.split(ROWS), true[:, None].split(ROWS), strict=True)
    ])  # fmt: skip
    by_class: dict[str, list[bool]] = {}
    for label, right in zip(labels, (ranks < 1).tolist(), strict=True):
        by_class.setdefault(label, []).append(right)
    mean = sum(sum(rights) / len(rights) for rights in by_class.values()) / len(by_class)
    guessed = {f"top{k}": min(k / len(names), 1.0) for k in KS} | {"mean_per_class": 1 / len(names)}
    return {f"top{k}": share_within(ranks, k) for k in KS} | {"mean_per_class": mean, CHANCE: guessed}
