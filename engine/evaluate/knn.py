"""Weighted nearest-neighbour classification on frozen features (Wu et al. 2018; as DINO evaluates)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

TEMPERATURE = 0.07
ROWS = 1024
"""Queries compared at once."""


def knn(
    queries: Tensor, labels: list[str], bank: Tensor, bank_labels: list[str], neighbours: int | list[int]
) -> dict[str, object]:
    """Accuracy; each of the k nearest votes for its label with weight exp(cosine similarity / 0.07).

    queries: [n, D]; bank: [m, D]; neither needs to be normalised. One k: {"top1"}. Several: {"k10": {"top1", "top5"},
    ...}. Raises UserError where the bank is smaller than k.
    """
    wanted = [neighbours] if isinstance(neighbours, int) else neighbours
    if max(wanted) > len(bank):
        raise UserError(f"{max(wanted)} neighbours asked for (evaluate.neighbours), the bank has {len(bank)} samples")
    index = {label: i for i, label in enumerate(dict.fromkeys(bank_labels))}
    voters = torch.tensor([index[label] for label in bank_labels])
    truth = torch.tensor([index.get(label, -1) for label in labels])
    bank = F.normalize(bank, dim=-1)
    right: dict[int, list[Tensor]] = {k: [] for k in wanted}
    for rows in torch.arange(len(queries)).split(ROWS):
        nearest = (F.normalize(queries[rows], dim=-1) @ bank.T).topk(max(wanted), dim=1)
        weight = (nearest.values.double() / TEMPERATURE).exp()
        for k in wanted:
            votes = weight.new_zeros(len(rows), len(index))
            votes.scatter_add_(1, voters[nearest.indices[:, :k]], weight[:, :k])
            best = votes.topk(min(5, len(index)), dim=1)
            right[k].append((best.indices == truth[rows, None]) & (best.values > 0))
    found = {k: torch.cat(parts).double() for k, parts in right.items()}
    if isinstance(neighbours, int):
        return {"top1": found[neighbours][:, 0].mean().item()}
    return {f"k{k}": {"top1": f[:, 0].mean().item(), "top5": f.sum(1).mean().item()} for k, f in found.items()}
