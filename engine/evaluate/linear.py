"""Linear probe on cached features: one linear layer per learning rate, all trained at once (as DINOv2 evaluates)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..evaluate_config import LinearConfig
from .features import Features
from .share import ALONE, Share

HELD_OUT = 10
"""One in so many labelled samples is not trained on: it chooses the learning rate."""
SEED = 0
"""Of the layers, the batches, and of which samples are held out."""


def inputs(features: Features, config: LinearConfig) -> Tensor:
    """What the layers see: class tokens of the last blocks, and the mean patch token if wanted, side by side [n, F]."""
    tokens = features.tokens[:, -config.blocks :].flatten(1)
    return torch.cat([tokens, features.patches], 1) if config.average_patches else tokens


@dataclass(frozen=True)
class Probe:
    """Linear layers that were trained side by side, and the shift and scale of their inputs."""

    layers: nn.ModuleList
    mean: Tensor
    deviation: Tensor

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """[n, F] -> [layers, n, classes]."""
        x = (x - self.mean) / self.deviation
        return torch.stack([layer(x) for layer in self.layers])


def train_probe(x: Tensor, labels: Tensor, classes: int, config: LinearConfig, share: Share = ALONE) -> Probe:
    """One layer per learning rate: SGD with momentum 0.9 along a cosine, all on the same batches.

    x: [n, F], standardised first (MAE puts a batch norm there); labels: int64 [n]. The layers share no parameter, so
    each comes out as if trained alone.
    """
    mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-6
    generator = torch.Generator().manual_seed(SEED)
    layers = nn.ModuleList(_layer(x.shape[1], classes) for _ in config.learning_rates).to(x.device)
    batch = min(config.batch_size, len(x))
    groups = [
        {"params": layer.parameters(), "lr": rate * batch / 256}
        for layer, rate in zip(layers, config.learning_rates, strict=True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
    steps = config.epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in share.shown(range(config.epochs), "training probes", config.epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chosen in order[: len(x) // batch * batch].split(batch):
            rows = (x[chosen] - mean) / deviation
            loss = torch.stack([F.cross_entropy(layer(rows), labels[chosen]) for layer in layers]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Probe(layers, mean, deviation)


def _layer(width: int, classes: int) -> nn.Linear:
    """Every layer starts from the same weights: normal 0.01 (DINO)."""
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(SEED))
    nn.init.zeros_(layer.bias)
    return layer


def linear(
    x: Tensor, labels: list[str], queries: Tensor, query_labels: list[str], config: LinearConfig, device: torch.device,
    share: Share = ALONE,
) -> dict[str, object]:  # fmt: skip
    """Top-1 and top-5 accuracy with the learning rate that is best on a held-out tenth of the labelled samples.

    x: [m, F], to learn from; queries: [n, F]. Also the accuracy of every rate, by rate. Every rank trains the same
    layers, and the main one shows how far. Raises UserError where there are too few samples.
    """
    classes = sorted(set(labels))
    index = {label: i for i, label in enumerate(classes)}
    truth = torch.tensor([index[label] for label in labels], device=device)
    asked = torch.tensor([index.get(label, -1) for label in query_labels], device=device)
    if len(x) < 2 * HELD_OUT:
        raise UserError(f"linear needs at least {2 * HELD_OUT} labelled samples, the bank has {len(x)}")
    x, queries = x.to(device), queries.to(device)
    held = torch.zeros(len(x), dtype=torch.bool, device=device)
    held[torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[: len(x) // HELD_OUT]] = True
    probe = train_probe(x[~held], truth[~held], len(classes), config, share)
    chosen = _right(probe.logits(x[held]), truth[held])[..., 0].mean(1).argmax()
    right = _right(probe.logits(queries), asked)
    rates = {f"{rate:g}": right[i, :, 0].mean().item() for i, rate in enumerate(config.learning_rates)}
    return {
        "top1": right[chosen, :, 0].mean().item(), "top5": right[chosen].sum(1).mean().item(),
        "lr": f"{config.learning_rates[int(chosen)]:g}", "top1_by_lr": rates,
    }  # fmt: skip


def _right(logits: Tensor, truth: Tensor) -> Tensor:
    """Whether each of the five best classes is the true one: [layers, n, classes] -> float64 [layers, n, 5]."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    return (best == truth[None, :, None]).double()
