"""Where the right answer stands among all answers."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks_of_best(scores: Tensor, correct: Tensor) -> Tensor:
    """Per row, how many wrong answers score at least as high as the best right one: int64 [n].

    scores: float [n, m]; correct: bool [n, m]. Ties count against, so equal scores everywhere rank last, not first.
    """
    best = scores.masked_fill(~correct, float("-inf")).amax(1, keepdim=True)
    return ((scores >= best) & ~correct).sum(1)


def share_within(ranks: Tensor, k: int) -> float:
    """Share of rows whose right answer is among the first k."""
    return (ranks < k).float().mean().item()


def chance_within(right: Tensor, of: int, k: int) -> float:
    """Share of rows that have a right answer among the first k of `of` in a random order.

    right: int64 [n], how many right answers each row has.
    """
    missed = torch.ones(len(right), dtype=torch.float64)
    for place in range(min(k, of)):
        missed *= ((of - right.double() - place) / (of - place)).clamp(min=0)
    return 1 - missed.mean().item()
