"""Self-distillation of masked words: the teacher reads the clean caption (Harmony, section 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..schedules import Clock
from ..views import Request, View, Views
from .base import (
    Collectives,
    Distillation,
    DistillationConfig,
    Features,
    Outcome,
    Surroundings,
    at_least_float,
    register,
)


class TextDistillationConfig(DistillationConfig):
    """The head is smaller than the image side's."""

    prototypes: PositiveInt = 2048
    """Outputs K of the head."""
    hidden: PositiveInt = 1024
    """Width of the head's hidden layers."""
    layers: PositiveInt = 2
    """Linear layers of the head, before the prototypes."""
    teacher_temperature: PositiveFloat = 0.07
    """After the warm-up."""
    center_of: Literal["logits", "probabilities"] = "logits"
    """What the center averages: the teacher's logits of masked words, or, as the authors' code does by a slip, its
    softmax outputs over all positions with padding, which tend to 1/K and hardly center at all."""


@register("text_distillation")
class TextDistillation(Distillation):
    """Cross-entropy between the teacher's prototype scores of a word and the student's where that word is masked."""

    Config = TextDistillationConfig
    config: TextDistillationConfig

    def __init__(self, config: TextDistillationConfig, around: Surroundings) -> None:
        super().__init__(config, around.text_width)
        self.center = self.new_center(config.prototypes)
        self.whole_captions = config.center_of == "probabilities"

    @property
    def student_views(self) -> Request:
        """The masked caption."""
        return {View.CAPTION_MASKED: 1}

    @property
    def teacher_views(self) -> Request:
        """The clean caption."""
        return {View.CAPTION: 1}

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Averaged over each caption's masked words, then over all captions; no masked word counts as 0."""
        context = views.tokens.shape[1]
        with torch.no_grad():
            theirs = teacher.head.last_layer()
        learned = student.head.bottleneck(student.captions[View.CAPTION_MASKED].at(views.caption_index, context))
        known = self.teacher_vectors(teacher, views, clock, theirs)
        counts = views.caption_mask.sum(-1)
        of_word = counts[views.caption_index // context] * len(counts)
        weight = 1 / of_word.to(torch.promote_types(known.dtype, torch.float32))
        directions = student.head.last_layer(), theirs
        tau = self.teacher_temperature(clock)
        return Outcome(self.cross_entropy(learned, known, directions, self.center, tau, weight), self.center_norm())

    @torch.no_grad()
    def teacher_vectors(self, teacher: Features, views: Views, clock: Clock, directions: Tensor) -> Tensor:
        """Unit vectors of the masked words as the teacher reads them: [W, d]. Feeds the center with their scores on
        prototypes [K, d]."""
        caption, head = teacher.captions[View.CAPTION], teacher.head
        u = head.bottleneck(caption.at(views.caption_index, views.tokens.shape[1]))
        if self.config.center_of == "probabilities":
            scores = at_least_float(head(caption.tokens)) - self.center.value
            everywhere = (scores / self.teacher_temperature(clock)).softmax(-1)
            self.center.add(everywhere.sum(0), len(everywhere))
        else:
            self.center.add_scores(u, directions)
        return u
