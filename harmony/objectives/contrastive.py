"""Image-text contrast: softmax with hard labels and soft EMA-teacher targets (CLIP, Radford et al. 2021; Harmony,
section 3.2), or a sigmoid for each pair (SigLIP, Zhai et al. 2023)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from ...kernels import contrastive_terms
from ..config import Fraction
from ..schedules import Clock, ramp_cosine
from ..views import Reads, Request, View, Views
from .base import (
    Collectives,
    Embeddings,
    Features,
    Objective,
    ObjectiveConfig,
    Outcome,
    Surroundings,
    at_least_float,
    feature_std,
    register,
)

ACCURACY_ROWS = 256
SIGMOID = {"hard_weight": 1.0, "hard_weight_end": 1.0, "initial_temperature": 0.1, "max_logit_scale": None}
"""What kind: sigmoid means for keys that are not given (SigLIP, section 3.2)."""


class ContrastiveConfig(ObjectiveConfig):
    """Weights of hard and soft targets, and the temperature."""

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: each image chooses among all texts and the reverse (CLIP); sigmoid: each pair by itself, with a learned
    bias (SigLIP): no soft targets then, and unless said otherwise the scale starts at 10 and has no bound."""
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
    initial_bias: float = -10.0
    """What the learned bias of the sigmoids starts with; not used with softmax."""
    max_logit_scale: float | None = Field(100.0, gt=0)
    """Largest logit scale (CLIP's 100); null: unbounded, as in the authors' code."""
    embed_dim: int = Field(512, gt=0)
    """Width E of the joint space."""

    @model_validator(mode="before")
    @classmethod
    def _sigmoid(cls, given: Any) -> Any:
        return {**SIGMOID, **given} if isinstance(given, dict) and given.get("kind") == "sigmoid" else given

    @model_validator(mode="after")
    def _sigmoid_is_hard(self) -> ContrastiveConfig:
        if self.kind == "sigmoid" and (self.hard_weight != 1 or self.hard_weight_end != 1):
            raise ValueError("kind: sigmoid has no soft targets; set hard_weight and hard_weight_end to 1.0")
        return self


@register("contrastive")
class Contrastive(Objective):
    """w hard + (1 - w) soft cross-entropy of the scaled cosine similarities, image to text and text to image; or the
    sigmoid loss of all pairs."""

    Config = ContrastiveConfig
    config: ContrastiveConfig
    compares_samples = True

    def __init__(self, config: ContrastiveConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.embed_dim = config.embed_dim
        # One element rather than a scalar: DeepSpeed cannot broadcast tensors without a dimension.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.initial_temperature)]))
        self.logit_bias = nn.Parameter(torch.tensor([config.initial_bias])) if config.kind == "sigmoid" else None

    @property
    def student_views(self) -> Request:
        """The first global crop, unmasked, and the caption."""
        return {View.GLOBAL_PLAIN: 1, View.CAPTION: 1}

    @property
    def teacher_views(self) -> Request:
        """The same views, if soft targets are used at any time."""
        hard_only = self.config.hard_weight == 1 and self.config.hard_weight_end == 1
        return {} if hard_only else self.student_views

    @property
    def student_reads(self) -> dict[View, Reads]:
        """The image's class token."""
        return {View.GLOBAL_PLAIN: Reads.CLASS}

    @property
    def teacher_reads(self) -> dict[View, Reads]:
        """As the student's."""
        return self.student_reads

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """The log of the largest logit scale."""
        bound = self.config.max_logit_scale
        return [] if bound is None else [(self.logit_scale, math.log(bound))]

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """The loss of one micro-batch by itself."""
        return self.compare(self.embed(student, teacher, clock), clock, collectives)

    def embed(self, student: Features, teacher: Features, clock: Clock) -> Embeddings:
        """Unit vectors [B, E] of images and texts; the teacher's only while soft targets count."""
        taught = () if self.hard_weight(clock) == 1 else embeddings(teacher)
        return Embeddings(embeddings(student), taught)

    def compare(self, embeddings: Embeddings, clock: Clock, collectives: Collectives) -> Outcome:
        """Rows are this rank's samples, columns all ranks'."""
        image, text = embeddings.student
        images, texts = collectives.gather(image), collectives.gather(text)
        scale, weight = at_least_float(self.logit_scale).exp().squeeze(), self.hard_weight(clock)
        offset = collectives.rank * len(image)
        taught = {}
        if weight < 1:
            known = dict(zip(("teacher_image", "teacher_text"), embeddings.teacher, strict=True))
            taught = {**known, **{f"all_{name}": collectives.gather(x) for name, x in known.items()}}
        bias = None if self.logit_bias is None else at_least_float(self.logit_bias).squeeze()
        hard, soft = contrastive_terms(
            image, text, scale, all_image=images, all_text=texts, **taught, row_offset=offset,
            soft_temperature=self.config.soft_temperature, kind=self.config.kind, logit_bias=bias,
        )  # fmt: skip
        metrics = {"hard": hard.detach(), "accuracy": accuracy(image, texts, offset), "logit_scale": scale.detach()}
        metrics |= feature_std(image) | {f"text_{name}": value for name, value in feature_std(text).items()}
        if bias is not None:
            metrics["logit_bias"] = bias.detach()
        if soft is None:
            return Outcome(hard, metrics)
        return Outcome(weight * hard + (1 - weight) * soft, {**metrics, "soft": soft.detach()})

    def scheduled(self, clock: Clock) -> dict[str, float]:
        """The weight of the hard targets, where there are others."""
        return {"weight_of_hard_targets": self.hard_weight(clock)} if self.teacher_views else {}

    def hard_weight(self, clock: Clock) -> float:
        """Weight of the hard targets at this step."""
        c = self.config
        return ramp_cosine(clock.step, c.hard_weight, c.hard_weight_end, c.hard_weight_epochs * clock.steps_per_epoch)


def embeddings(branch: Features) -> tuple[Tensor, Tensor]:
    """Unit vectors of images and texts [B, E] of one branch, fp32 or better."""
    caption = branch.captions[View.CAPTION]
    assert branch.image_encoder is not None and branch.text_encoder is not None  # both have a view
    image = branch.image_encoder.project(branch.images[View.GLOBAL_PLAIN][0, :, 0])
    text = branch.text_encoder.project(caption.tokens[caption.last])
    return F.normalize(at_least_float(image), dim=-1), F.normalize(at_least_float(text), dim=-1)


@torch.no_grad()
def accuracy(image: Tensor, texts: Tensor, offset: int) -> Tensor:
    """Share of images whose nearest text is their own; of the first ones only, so that it costs next to nothing."""
    nearest = (image[:ACCURACY_ROWS] @ texts.T).argmax(-1)
    return (nearest == torch.arange(len(nearest), device=image.device) + offset).float().mean()
