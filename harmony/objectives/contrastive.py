"""Image-text contrast with hard labels and soft EMA-teacher targets (CLIP; Harmony, section 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..config import Fraction
from ..schedules import Clock, ramp_cosine
from ..views import Request, View, Views
from .base import Collectives, Features, Objective, ObjectiveConfig, Outcome, Surroundings, at_least_float, register


class ContrastiveConfig(ObjectiveConfig):
    """Weights of hard and soft targets, and the temperature."""

    hard_weight: Fraction = 1.0
    """Weight of the hard (one-hot) targets at the start; soft targets get the rest."""
    hard_weight_end: Fraction = 0.2
    """Weight of the hard targets at the end of the ramp, a half cosine."""
    hard_weight_epochs: int = Field(10, ge=0)
    """Length of the ramp, epochs."""
    soft_temperature: PositiveFloat = 0.1
    """Temperature of the teacher's similarities."""
    initial_temperature: PositiveFloat = 0.07
    """Temperature that the learned logit scale starts with."""
    max_logit_scale: float | None = Field(100.0, gt=0)
    """Largest logit scale (CLIP's 100); null: unbounded, as in the authors' code."""
    embed_dim: int = Field(512, gt=0)
    """Width E of the joint space."""


@register("contrastive")
class Contrastive(Objective):
    """w hard + (1 - w) soft cross-entropy of the scaled cosine similarities, image to text and text to image."""

    Config = ContrastiveConfig

    def __init__(self, config: ContrastiveConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.embed_dim = config.embed_dim
        # One element rather than a scalar: DeepSpeed cannot broadcast tensors without a dimension.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.initial_temperature)]))

    @property
    def student_views(self) -> Request:
        """The first global crop, unmasked, and the caption."""
        return {View.GLOBAL_PLAIN: 1, View.CAPTION: 1}

    @property
    def teacher_views(self) -> Request:
        """The same views, if soft targets are used at any time."""
        hard_only = self.config.hard_weight == 1 and self.config.hard_weight_end == 1
        return {} if hard_only else self.student_views

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """The log of the largest logit scale."""
        bound = self.config.max_logit_scale
        return [] if bound is None else [(self.logit_scale, math.log(bound))]

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Rows are this rank's samples, columns all ranks'."""
        cfg = self.config
        image, text = (F.normalize(at_least_float(e), dim=-1) for e in embeddings(student))
        images, texts = collectives.gather(image), collectives.gather(text)
        scale = at_least_float(self.logit_scale).exp().squeeze()
        by_image, by_text = scale * image @ texts.T, scale * text @ images.T  # [B, world * B]

        labels = torch.arange(len(image), device=image.device) + collectives.rank * len(image)
        hard = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
        accuracy = (by_image.detach().argmax(-1) == labels).float().mean()
        metrics = {"hard": hard.detach(), "accuracy": accuracy, "logit_scale": scale.detach()}

        ramp = cfg.hard_weight_epochs * clock.steps_per_epoch
        weight = ramp_cosine(clock.step, cfg.hard_weight, cfg.hard_weight_end, ramp)
        if weight == 1:
            return Outcome(hard, metrics)
        to_text, to_image = self.soft_targets(teacher, collectives)
        soft = (F.cross_entropy(by_image, to_text) + F.cross_entropy(by_text, to_image)) / 2
        return Outcome(weight * hard + (1 - weight) * soft, {**metrics, "soft": soft.detach()})

    @torch.no_grad()
    def soft_targets(self, teacher: Features, collectives: Collectives) -> tuple[Tensor, Tensor]:
        """The teacher's beliefs: rows of softmax(similarity / soft_temperature), image to text and text to image."""
        image, text = (F.normalize(at_least_float(e), dim=-1) for e in embeddings(teacher))
        images, texts = collectives.gather(image), collectives.gather(text)
        tau = self.config.soft_temperature
        return (image @ texts.T / tau).softmax(-1), (text @ images.T / tau).softmax(-1)


def embeddings(branch: Features) -> tuple[Tensor, Tensor]:
    """Image and text embeddings [B, E] of one branch, not normalised."""
    caption = branch.captions[View.CAPTION]
    image = branch.image_encoder.project(branch.images[View.GLOBAL_PLAIN][0, :, 0])
    return image, branch.text_encoder.project(caption.packed.tokens[caption.last])
