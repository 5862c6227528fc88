"""What an objective is, and the registry.

An objective says which student and which teacher views it needs and turns their features into a loss. A new method is
one file beside this one (a config class, an objective class with `@register("name")`) and a config that names it.

Letters in shapes: G global crops, N local crops, B samples, L tokens of a sequence, D width, K prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ...kernels import prototype_cross_entropy, prototype_sums
from ..config import Config, Fraction
from ..heads import ProjectionHead
from ..image_encoder import ImageEncoder
from ..schedules import Clock, ramp_linear
from ..text_encoder import CaptionFeatures, TextEncoder
from ..views import Reads, Request, View, Views, ViewsConfig


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

    def require(self, views: ViewsConfig) -> None:
        """Raise ValueError if these views do not serve the objective."""


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


class Outcome(NamedTuple):
    """What an objective returns: its loss, unweighted, and detached numbers worth logging.

    A tuple, because ZeRO stage 3 looks for the tensors in a module's output to know when its backward pass begins.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Embeddings(NamedTuple):
    """What an objective compares across samples: any number of tensors [B, ...] of each branch."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]


class Objective(nn.Module, ABC):
    """One training signal. Modules that have no EMA twin (decoders, scales, centers) are its own attributes."""

    Config: ClassVar[type[ObjectiveConfig]]
    embed_dim: int | None = None
    """Width E of the joint space, if it needs the towers' projections to one"""
    whole_captions: bool = False
    """Whether the teacher must encode the padding of captions too"""
    compares_samples: ClassVar[bool] = False
    """Whether the loss compares samples with each other. Such an objective has `embed` and `compare`: with gradient
    accumulation the embeddings of all micro-batches are compared at once (GradCache, Gao et al. 2021)."""

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

    @property
    def student_reads(self) -> dict[View, Reads]:
        """Which tokens of the student's views it reads; all of a view that is not named."""
        return {}

    @property
    def teacher_reads(self) -> dict[View, Reads]:
        """Which tokens of the teacher's views it reads; all of a view that is not named."""
        return {}

    def build_head(self) -> nn.Module | None:
        """A head on top of the encoders that has an EMA twin."""
        return None

    def scheduled(self, clock: Clock) -> dict[str, float]:
        """Scalars of its own that change over time, by name, at this step: for those who watch a run."""
        return {}

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

    def embed(self, student: Features, teacher: Features, clock: Clock) -> Embeddings:
        """What is compared; the loss depends on the features through this alone."""
        raise NotImplementedError(f"{type(self).__name__} does not compare samples")

    def compare(self, embeddings: Embeddings, clock: Clock, collectives: Collectives) -> Outcome:
        """The loss of embeddings [B, ...] of any number of this rank's samples."""
        raise NotImplementedError(f"{type(self).__name__} does not compare samples")

    def end_step(self, collectives: Collectives) -> None:
        """Called once per optimizer step, after it: the place to move centers."""

    def forget_step(self) -> None:
        """Called instead where the step was left out, because its gradient was not finite."""


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


FEW = 4
"""Vectors of which a standard deviation says nothing about collapse"""


@torch.no_grad()
def feature_std(vectors: Tensor) -> dict[str, Tensor]:
    """Standard deviation of unit vectors [..., d], over all directions: sqrt(1 - |mean|^2), 0 where all are the same.

    By its name; nothing for a few vectors. Their number must be the same on all ranks, as must a step's metrics.
    """
    vectors = at_least_float(vectors.detach()).flatten(0, -2)
    return {"feature_std": (1 - vectors.mean(0).square().sum()).clamp(min=0).sqrt()} if len(vectors) >= FEW else {}


def at_least_float(x: Tensor) -> Tensor:
    """Half precisions to fp32; fp64 stays. Losses are never computed in half precision."""
    return x if x.dtype == torch.float64 else x.float()


class Center(nn.Module):
    """Running mean of teacher outputs, subtracted before the softmax so that no prototype takes all (DINO, eq. 4).

    c <- momentum c + (1 - momentum) m, with m the mean over ranks and micro-batches of one optimizer step.
    """

    value: Tensor
    total: Tensor
    count: Tensor

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

    def add_scores(self, u: Tensor, directions: Tensor) -> None:
        """Take in the logits of unit vectors [R, d] on prototypes [K, d]."""
        with torch.no_grad():
            self.add(prototype_sums(u, directions), len(u))

    def forget(self) -> None:
        """Leave out what was taken in since the last move."""
        self.total.zero_()
        self.count.zero_()

    @torch.no_grad()
    def move(self, collectives: Collectives) -> None:
        """Move the center by what was taken in since the last call; without any output it stays."""
        sums = collectives.sum(torch.cat([self.total, self.count[None]]))
        mean = sums[:-1] / sums[-1].clamp(min=1)
        self.value.copy_(torch.where(sums[-1] > 0, self.value.lerp(mean, 1 - self.momentum), self.value))
        self.forget()


class DistillationConfig(ObjectiveConfig):
    """Head, temperatures and centers of an objective that distils prototype scores. The defaults are DINO's head."""

    prototypes: PositiveInt = 8192
    """Outputs K of the head."""
    hidden: PositiveInt = 2048
    """Width of the head's hidden layers."""
    bottleneck: PositiveInt = 256
    """Width of the unit vectors that are compared with the prototypes."""
    layers: PositiveInt = 3
    """Linear layers of the head, before the prototypes."""
    student_temperature: PositiveFloat = 0.1
    """Of the softmax over the student's scores."""
    teacher_temperature: PositiveFloat = 0.04
    """After the warm-up."""
    teacher_temperature_start: PositiveFloat = 0.04
    """Of the teacher's scores, at the start of the warm-up."""
    temperature_epochs: int = Field(5, ge=0)
    """Length of the teacher temperatures' linear warm-up, epochs."""
    temperature_by_epoch: bool = False
    """Move the temperatures once an epoch (the authors' code) instead of with every step."""
    center_momentum: Fraction = 0.9
    """Share of a center that stays in each step."""
    freeze_last_layer: int = Field(0, ge=0)
    """Epochs during which the student's prototypes stay fixed."""


class Distillation(Objective):
    """An objective that distils prototype scores: a projection head with an EMA twin, and centers."""

    config: DistillationConfig

    def __init__(self, config: DistillationConfig, width: int) -> None:
        """width: of the features that go into the head."""
        super().__init__(config)
        self.width = width

    def build_head(self) -> ProjectionHead:
        """A projection head with one set of prototypes."""
        c = self.config
        return ProjectionHead(self.width, c.hidden, c.bottleneck, c.prototypes, c.layers)

    def new_center(self, prototypes: int) -> Center:
        """A center that `end_step` moves, once it is an attribute of this objective."""
        return Center(prototypes, self.config.center_momentum)

    def cross_entropy(
        self,
        student: Tensor,
        teacher: Tensor,
        directions: tuple[Tensor, Tensor],
        center: Center,
        temperature: float,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy between the centered, sharpened scores of teacher rows and the scores of student rows.

        student, teacher: unit vectors [R, d], paired row by row. directions: the student's and the teacher's prototypes
        [K, d], made whatever the batch holds: ZeRO's stage 3 gathers parameters at calls, which must be those of all
        ranks. temperature: the teacher's. row_weight: [R], default 1/R. No row gives 0.
        """
        learned, known = directions
        if not len(student):  # no masked patch in the whole batch: every parameter still gets its gradient
            return 0 * (at_least_float(student).sum() + at_least_float(learned).sum())
        return prototype_cross_entropy(
            student, learned, teacher, known, center.value,
            student_temperature=self.config.student_temperature, teacher_temperature=temperature, row_weight=row_weight,
        )  # fmt: skip

    def scheduled(self, clock: Clock) -> dict[str, float]:
        """The teacher's temperature."""
        return {"teacher_temperature": self.teacher_temperature(clock)}

    def teacher_temperature(self, clock: Clock) -> float:
        """The temperature of the teacher's scores at this step."""
        return self.warmed_up(clock, self.config.teacher_temperature_start, self.config.teacher_temperature)

    def warmed_up(self, clock: Clock, start: float, end: float) -> float:
        """A temperature on its way from `start` to `end`."""
        return ramp_linear(clock, start, end, self.config.temperature_epochs, self.config.temperature_by_epoch)

    def frozen_parameters(self, head: ProjectionHead) -> tuple[list[nn.Parameter], int]:
        """The prototypes, for the first epochs."""
        layers = [layer for layer in (head.last_layer, head.last_layer2) if layer is not None]
        return [layer.weight_v for layer in layers], self.config.freeze_last_layer

    def end_step(self, collectives: Collectives) -> None:
        """Move the centers."""
        for center in self.centers():
            center.move(collectives)

    def forget_step(self) -> None:
        """The centers stay."""
        for center in self.centers():
            center.forget()

    def centers(self) -> list[Center]:
        """All centers."""
        return [module for module in self.children() if isinstance(module, Center)]

    def center_norm(self) -> dict[str, Tensor]:
        """The largest norm of a center, by its name: one that grows without end is a sign of collapse."""
        return {"center_norm": torch.stack([center.value.norm() for center in self.centers()]).max()}


def require_pairs(name: str, views: ViewsConfig) -> None:
    """Raise ValueError if objective `name`, which compares a global crop with another crop, would have no other one."""
    if views.global_crops + views.local_crops < 2:
        raise ValueError(f"objectives.{name} compares crops: set views.global_crops to 2 or more, or views.local_crops")
