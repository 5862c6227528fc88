"""Few-shot classification: logistic regression on k labelled samples of each class, drawn several times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..evaluate_config import FewShotConfig

ITERATIONS = 500
"""Of L-BFGS at most; it stops where the gradient is near 0."""


def few_shot(
    bank: Tensor, bank_labels: list[str], queries: Tensor, labels: list[str], config: FewShotConfig
) -> dict[str, dict[str, float]]:
    """Top-1 accuracy by number of shots: mean and standard deviation over the draws.

    bank: [m, D]; queries: [n, D]; neither needs to be normalised. Raises UserError where a class has fewer samples than
    are to be drawn.
    """
    classes = sorted(set(bank_labels))
    index = {label: i for i, label in enumerate(classes)}
    known = torch.tensor([index[label] for label in bank_labels])
    truth = torch.tensor([index.get(label, -1) for label in labels])
    counts = known.bincount()
    if int(counts.min()) < max(config.shots):
        raise UserError(
            f"few-shot with {max(config.shots)} samples of each class: the class '{classes[int(counts.argmin())]}' has "
            f"{int(counts.min())} (evaluate.few_shot.shots)"
        )
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    results = {}
    for shots in config.shots:
        scores = []
        for seed in range(config.draws):
            chosen = draw(known, shots, seed)
            weight, bias = logistic_regression(bank[chosen], known[chosen], len(classes), config.c)
            predicted = (queries.double() @ weight.T + bias).argmax(1)
            scores.append((predicted == truth).double().mean())
        result = torch.stack(scores)
        results[f"k{shots}"] = {"top1": result.mean().item(), "spread": result.std(correction=0).item()}
    return results


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Places of `shots` samples of each class. labels: int64 [m], each of 0 .. classes - 1 at least `shots` times."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]  # shuffled inside each class
    ends = labels.bincount().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return by_class[(starts[:, None] + torch.arange(shots)).flatten()]


def logistic_regression(features: Tensor, labels: Tensor, classes: int, c: float) -> tuple[Tensor, Tensor]:
    """Weights [classes, D] and biases [classes], float64, that minimise c x sum of cross-entropies + |weights|^2 / 2.

    The problem of scikit-learn's LogisticRegression(C=c), solved by L-BFGS on the features' device.
    """
    x = features.double()
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = c * F.cross_entropy(x @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
        value = value / (c * len(x))
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
