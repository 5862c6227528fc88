"""What an objective is, and the registry.

An objective says which student and which teacher views it needs and turns their features into a loss. A new method is
one file beside this one (a config class, an objective class with `@register("name")`) and a config that names it.

Letters in shapes: G global crops, N local crops, B samples, L tokens of a sequence, D width, K prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Config
from ..image_encoder import ImageEncoder
from ..schedules import Clock
from ..text_encoder import CaptionFeatures, TextEncoder
from ..views import Request, View, Views, ViewsConfig


class Collectives:
    """What the method needs from other ranks. This one is a single process; the engine has the distributed one."""

    rank: int = 0
    world_size: int = 1

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate [B, ...] of all ranks in rank order: [world_size * B, ...]. Gradients flow back to every rank."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        return x


class ObjectiveConfig(Config):
    """What all objectives can be told."""

    weight: float = Field(1.0, ge=0)
    """Factor of this objective in the total loss."""


@dataclass
class Features:
    """What one branch (student or teacher) made of a micro-batch, as one objective sees it."""

    images: dict[View, Tensor]
    """[crops, B, L, D] for each image view, after the final norm"""
    captions: dict[View, CaptionFeatures]
    """Before the final norm"""
    image_encoder: ImageEncoder | None
    text_encoder: TextEncoder | None
    head: Any
    """This objective's own head of this branch, or None"""


@dataclass
class Outcome:
    """What an objective returns: its loss, unweighted, and detached numbers worth logging."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """One training signal. Modules that have no EMA twin (decoders, scales, centers) are its own attributes."""

    Config: ClassVar[type[ObjectiveConfig]]
    embed_dim: int | None = None
    """Width E of the joint space, if it needs the towers' projections to one"""
    whole_captions: bool = False
    """Whether the teacher must encode the padding of captions too"""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def student_views(self) -> Request:
        """The views it needs from the student."""

    @property
    def teacher_views(self) -> Request:
        """The views it needs from the EMA teacher."""
        return {}

    def build_head(self) -> nn.Module | None:
        """A head on top of the encoders that has an EMA twin."""
        return None

    def frozen_parameters(self, head: Any) -> tuple[list[nn.Parameter], int]:
        """Parameters of the student's head that stay fixed at the start, and for how many epochs."""
        return [], 0

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """Own parameters that are clamped after every optimizer step, with their largest value."""
        return []

    @abstractmethod
    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """The loss of this micro-batch, a mean over all ranks' samples once the ranks' losses are averaged."""

    def end_step(self, collectives: Collectives) -> None:
        """Called once per optimizer step, after it: the place to move centers."""


@dataclass(frozen=True)
class Surroundings:
    """What an objective may know when it is built."""

    image_width: int
    patch_size: int
    text_width: int
    text_heads: int
    vocabulary: int
    views: ViewsConfig

    @property
    def patches(self) -> int:
        """Patches of a global crop."""
        return (self.views.global_size // self.patch_size) ** 2


REGISTRY: dict[str, type[Objective]] = {}


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Class decorator: make an objective known to configurations by this name."""

    def add(cls: type[Objective]) -> type[Objective]:
        REGISTRY[name] = cls
        return cls

    return add


def at_least_float(x: Tensor) -> Tensor:
    """Half precisions to fp32; fp64 stays. Losses are never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


class Center(nn.Module):
    """Running mean of teacher outputs, subtracted before the softmax so that no prototype takes all (DINO, eq. 4).

    c <- momentum c + (1 - momentum) m, with m the mean over ranks and micro-batches of one optimizer step.
    """

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def add(self, total: Tensor, count: int) -> None:
        """Take in the sum [K] of `count` outputs."""
        self.total += total
        self.count += count

    @torch.no_grad()
    def move(self, collectives: Collectives) -> None:
        """Move the center by what was taken in since the last call; without any output it stays."""
        sums = collectives.sum(torch.cat([self.total, self.count[None]]))
        mean = sums[:-1] / sums[-1].clamp(min=1)
        self.value.copy_(torch.where(sums[-1] > 0, self.value.lerp(mean, 1 - self.momentum), self.value))
        self.total.zero_()
        self.count.zero_()
