"""Self-distillation of masked words: the teacher reads the clean caption (Harmony, section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ..config import Fraction
from ..heads import ProjectionHead
from ..schedules import Clock, ramp_linear
from ..views import Request, View, Views
from .base import (
    Center,
    Collectives,
    Features,
    Objective,
    ObjectiveConfig,
    Outcome,
    Surroundings,
    at_least_float,
    register,
)


class TextDistillationConfig(ObjectiveConfig):
    """Head, temperatures and center."""

    prototypes: PositiveInt = 2048
    hidden: PositiveInt = 1024
    bottleneck: PositiveInt = 256
    layers: PositiveInt = 2
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.07
    """After the warm-up."""
    teacher_temperature_start: PositiveFloat = 0.04
    temperature_epochs: int = Field(5, ge=0)
    """Length of the temperature's linear warm-up, epochs."""
    temperature_by_epoch: bool = False
    """Move the temperature once an epoch (the authors' code) instead of with every step."""
    center_momentum: Fraction = 0.9
    center_of: Literal["logits", "probabilities"] = "logits"
    """What the center averages: the teacher's logits of masked words, or, as the authors' code does by a slip, its
    softmax outputs over all positions with padding, which tend to 1/K and hardly center at all."""


@register("text_distillation")
class TextDistillation(Objective):
    """Cross-entropy between the teacher's prototype scores of a word and the student's where that word is masked."""

    Config = TextDistillationConfig

    def __init__(self, config: TextDistillationConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.text_width = around.text_width
        self.center = Center(config.prototypes, config.center_momentum)
        self.whole_captions = config.center_of == "probabilities"

    @property
    def student_views(self) -> Request:
        """The masked caption."""
        return {View.CAPTION_MASKED: 1}

    @property
    def teacher_views(self) -> Request:
        """The clean caption."""
        return {View.CAPTION: 1}

    def build_head(self) -> ProjectionHead:
        """A head for words."""
        c = self.config
        return ProjectionHead(self.text_width, c.hidden, c.bottleneck, c.prototypes, c.layers)

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Averaged over each caption's masked words, then over all captions; no masked word counts as 0."""
        context = views.tokens.shape[1]
        z = at_least_float(student.head(student.captions[View.CAPTION_MASKED].at(views.caption_index, context)))
        q = self.targets(teacher, views, clock)
        rows = -(q * (z / self.config.student_temperature).log_softmax(-1)).sum(-1)
        counts = views.caption_mask.sum(-1)
        return Outcome((rows / counts[views.caption_index // context]).sum() / len(counts))

    @torch.no_grad()
    def targets(self, teacher: Features, views: Views, clock: Clock) -> Tensor:
        """The teacher's distributions over prototypes at the masked words: [W, K]. Feeds the center."""
        cfg = self.config
        caption, context = teacher.captions[View.CAPTION], views.tokens.shape[1]
        tau = ramp_linear(
            clock, cfg.teacher_temperature_start, cfg.teacher_temperature, cfg.temperature_epochs,
            cfg.temperature_by_epoch,
        )  # fmt: skip

        def distribution(features: Tensor) -> tuple[Tensor, Tensor]:
            z = at_least_float(teacher.head(features))
            return z, ((z - self.center.value) / tau).softmax(-1)

        z, q = distribution(caption.at(views.caption_index, context))
        if cfg.center_of == "probabilities":
            _, everywhere = distribution(caption.packed.tokens)
            self.center.add(everywhere.sum(0), len(everywhere))
        else:
            self.center.add(z.sum(0), len(z))
        return q

    def end_step(self, collectives: Collectives) -> None:
        """Move the center."""
        self.center.move(collectives)
