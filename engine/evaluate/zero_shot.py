"""Zero-shot classification by class names (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ranking import ranks_of_best, same, share_within


def class_weights(embed, classes: list[str], templates: list[str]) -> Tensor:
    """One unit vector per class, the mean over prompts: [classes, E]. embed: texts -> unit vectors [n, E]."""
    by_template = [embed([template.replace("{}", name) for name in classes]) for template in templates]
    return F.normalize(torch.stack(by_template).mean(0), dim=-1)


def zero_shot(images: Tensor, weights: Tensor, labels: list[str], classes: list[str]) -> dict[str, float]:
    """Top-1 and top-10 accuracy. images: unit vectors [n, E]; weights: [classes, E]; labels: the n true classes."""
    ranks = ranks_of_best(images @ weights.T, same(labels, classes))
    return {"top1": share_within(ranks, 1), "top10": share_within(ranks, 10)}
