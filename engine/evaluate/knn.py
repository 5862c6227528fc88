"""Weighted nearest-neighbour classification on frozen features (Wu et al. 2018; as DINO evaluates)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07


def knn(queries: Tensor, labels: list[str], bank: Tensor, bank_labels: list[str], neighbours: int) -> dict[str, float]:
    """Top-1 accuracy; each of the k nearest votes for its label with weight exp(cosine similarity / 0.07).

    queries: [n, D]; bank: [m, D]; neither needs to be normalised.
    """
    index = {label: i for i, label in enumerate(dict.fromkeys(bank_labels))}
    similarity = F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).T
    nearest = similarity.topk(min(neighbours, len(bank)), dim=1)
    weight = (nearest.values.double() / TEMPERATURE).exp()
    voters = torch.tensor([index[label] for label in bank_labels])[nearest.indices]
    votes = weight.new_zeros(len(queries), len(index)).scatter_add_(1, voters, weight)
    truth = torch.tensor([index.get(label, -1) for label in labels])
    return {"top1": (votes.argmax(1) == truth).double().mean().item()}
