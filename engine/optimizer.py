"""AdamW as a run has it: which parameters go together, in which form it keeps its moments, its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..harmony.model import Harmony
from ..harmony.schedules import Clock, warmup_cosine
from ..harmony.teacher import twins
from .config import RunConfig


@dataclass
class Scalars:
    """The optimizer's scalars of one step."""

    lr: float
    weight_decay: float
    ema_momentum: float


def scalars_at(config: RunConfig, clock: Clock) -> Scalars:
    """Learning rate (warm-up, cosine; scaled by batch / 256), weight decay and EMA momentum (cosines) at this step."""
    c, total = config.optimizer, clock.total
    scale = config.data.batch_size / 256
    warmup = round(c.warmup_epochs * clock.steps_per_epoch)
    return Scalars(
        warmup_cosine(clock.step, c.lr * scale, c.min_lr, total, warmup),
        warmup_cosine(clock.step, c.weight_decay, c.weight_decay_end, total),
        warmup_cosine(clock.step, c.ema_momentum, c.ema_momentum_end, total),
    )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices, embeddings, tokens and the logit scale; not for biases and norms.

    As the authors' code has it: there the scale is a tensor without dimensions, and only one dimension is exempt.
    """
    return (parameter.dim() != 1 or parameter.numel() == 1) and not name.endswith(".bias")


def parameter_groups(model: Harmony) -> list[dict[str, Any]]:
    """Trainable parameters by (has a twin, is decayed, epochs frozen): each group is one flat buffer of its own.

    Parameters with a twin must be apart, so that the EMA shard is the group's shard and nothing else.
    """
    twinned = {id(student) for _, student in twins(model.teacher, model.student)}
    frozen = {id(p): epochs for parameters, epochs in model.frozen_parameters() for p in parameters}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (id(parameter) in twinned, is_decayed(name, parameter), frozen.get(id(parameter), 0))
            new = {"params": [], "twin": key[0], "decayed": key[1], "frozen_epochs": key[2]}
            groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW in the form that the configuration asks for; learning rate and decay are set before every step."""
    c = config.optimizer
    options: dict[str, Any] = {"lr": 0.0, "betas": c.betas, "eps": c.eps}
    if c.states == "8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    # Also on the host: DeepSpeed's own for offload has to be compiled, and is no faster (0.059 s against 0.047 for a
    # step of 40 M parameters on two cores of an AMD EPYC).
    return torch.optim.AdamW(groups, fused=True, **options)
