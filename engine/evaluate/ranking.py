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


def same(left: list[str], right: list[str]) -> Tensor:
    """bool [len(left), len(right)]: whether two labels are equal."""
    index = {label: i for i, label in enumerate(dict.fromkeys([*left, *right]))}
    return torch.tensor([index[x] for x in left])[:, None] == torch.tensor([index[x] for x in right])
