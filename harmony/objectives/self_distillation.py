"""Self-distillation over multi-crop: class tokens (DINO) and masked patches (iBOT; Harmony, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

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


class SelfDistillationConfig(ObjectiveConfig):
    """Head, temperatures and centers."""

    class_weight: float = Field(0.5, ge=0)
    """Weight of the class-token term (the authors' lambda1)."""
    patch_weight: float = Field(0.5, ge=0)
    """Weight of the masked-patch term (lambda2)."""
    prototypes: PositiveInt = 8192
    """Outputs K of the head."""
    patch_prototypes: PositiveInt | None = None
    """Outputs of a separate last layer for patches; null: patches share the class token's."""
    hidden: PositiveInt = 2048
    bottleneck: PositiveInt = 256
    layers: PositiveInt = 3
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: PositiveFloat = 0.04
    """Of the class token, after the warm-up."""
    teacher_temperature_start: PositiveFloat = 0.04
    patch_temperature: PositiveFloat = 0.07
    """Of patches, after the warm-up."""
    patch_temperature_start: PositiveFloat = 0.04
    temperature_epochs: int = Field(5, ge=0)
    """Length of the temperatures' linear warm-up, epochs."""
    temperature_by_epoch: bool = False
    """Move the temperatures once an epoch (the authors' code) instead of with every step."""
    center_momentum: Fraction = 0.9
    patch_center: Literal["masked", "all"] = "masked"
    """Which teacher patches move the patch center: those the student must predict, or all (the authors' code)."""
    freeze_last_layer: int = Field(1, ge=0)
    """Epochs during which the student's prototypes stay fixed."""


@register("self_distillation")
class SelfDistillation(Objective):
    """Cross-entropy between the teacher's centered, sharpened prototype scores and the student's."""

    Config = SelfDistillationConfig

    def __init__(self, config: SelfDistillationConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.around = around
        self.class_center = Center(config.prototypes, config.center_momentum)
        self.patch_center = Center(config.patch_prototypes or config.prototypes, config.center_momentum)

    @property
    def student_views(self) -> Request:
        """Global crops with mask tokens, and local crops."""
        views = self.around.views
        return {View.GLOBAL_MASKED: views.global_crops, View.LOCAL: views.local_crops}

    @property
    def teacher_views(self) -> Request:
        """Global crops, unmasked."""
        return {View.GLOBAL_PLAIN: self.around.views.global_crops}

    def build_head(self) -> ProjectionHead:
        """One head for class tokens and patches."""
        c = self.config
        return ProjectionHead(
            self.around.image_width, c.hidden, c.bottleneck, c.prototypes, c.layers, c.patch_prototypes
        )

    def frozen_parameters(self, head: ProjectionHead) -> tuple[list[nn.Parameter], int]:
        """The prototypes, for the first epochs."""
        layers = [layer for layer in (head.last_layer, head.last_layer2) if layer is not None]
        return [layer.weight_v for layer in layers], self.config.freeze_last_layer

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Class term over all pairs of different views, patch term over masked patches of the same view."""
        cfg = self.config
        q_class, q_patch = self.targets(teacher, views, clock)
        z_class, z_patch = self.scores(student, views)
        class_loss = pairwise_cross_entropy(q_class, z_class / cfg.student_temperature)
        patch_loss = masked_cross_entropy(q_patch, z_patch / cfg.student_temperature, views)
        entropy = -(q_class * q_class.clamp(min=1e-30).log()).sum(-1).mean()
        metrics = {"class": class_loss.detach(), "patch": patch_loss.detach(), "teacher_entropy": entropy}
        return Outcome(cfg.class_weight * class_loss + cfg.patch_weight * patch_loss, metrics)

    def scores(self, student: Features, views: Views) -> tuple[Tensor, Tensor]:
        """The student's logits: class tokens [G + N, B, K] and masked patches [M, K'], in fp32 or better."""
        masked = student.images[View.GLOBAL_MASKED]
        classes = [masked[:, :, 0]]
        if View.LOCAL in student.images:
            classes.append(student.images[View.LOCAL][:, :, 0])
        class_tokens = torch.cat(classes)
        patches = masked[:, :, 1:].flatten(0, 2)[views.block_index]
        u = student.head.bottleneck(torch.cat([class_tokens.flatten(0, 1), patches]))
        count = class_tokens.shape[:2].numel()
        z_class = student.head.last_layer(u[:count]).unflatten(0, class_tokens.shape[:2])
        return at_least_float(z_class), at_least_float(student.head.patch_layer()(u[count:]))

    @torch.no_grad()
    def targets(self, teacher: Features, views: Views, clock: Clock) -> tuple[Tensor, Tensor]:
        """The teacher's distributions: class tokens [G, B, K], masked patches [M, K']. Feeds the centers."""
        cfg = self.config
        tokens = teacher.images[View.GLOBAL_PLAIN][: self.around.views.global_crops]
        layer = teacher.head.patch_layer()
        z_class = at_least_float(teacher.head(tokens[:, :, 0]))
        patches = tokens[:, :, 1:].flatten(0, 2)
        if cfg.patch_center == "all":  # the mean of logits is the logit of the mean: no need for P x K of them
            u = teacher.head.bottleneck(patches)
            self.patch_center.add(at_least_float(layer(u.sum(0))), len(u))
            z_patch = at_least_float(layer(u[views.block_index]))
        else:
            z_patch = at_least_float(layer(teacher.head.bottleneck(patches[views.block_index])))
            self.patch_center.add(z_patch.sum(0), len(z_patch))
        self.class_center.add(z_class.sum((0, 1)), z_class.shape[:2].numel())

        def temperature(start: float, end: float) -> float:
            return ramp_linear(clock, start, end, cfg.temperature_epochs, cfg.temperature_by_epoch)

        tau = temperature(cfg.teacher_temperature_start, cfg.teacher_temperature)
        patch_tau = temperature(cfg.patch_temperature_start, cfg.patch_temperature)
        q_class = ((z_class - self.class_center.value) / tau).softmax(-1)
        return q_class, ((z_patch - self.patch_center.value) / patch_tau).softmax(-1)

    def end_step(self, collectives: Collectives) -> None:
        """Move both centers."""
        self.class_center.move(collectives)
        self.patch_center.move(collectives)


def pairwise_cross_entropy(q: Tensor, z: Tensor) -> Tensor:
    """Mean of H(q_a, z_v) over the ordered pairs of different views (a, v) and the batch.

    q: [G, B, K] distributions; z: [G + N, B, K] logits, whose first G views are those of q.
    Sums over a and v are taken before the product over K, so no pair is computed twice.
    """
    crops, batch = q.shape[:2]
    pairs = crops * len(z) - crops
    log_p = z.log_softmax(-1)
    everything = (q.sum(0) * log_p.sum(0)).sum()
    same = (q * log_p[:crops]).sum()
    return (same - everything) / (pairs * batch)


def masked_cross_entropy(q: Tensor, z: Tensor, views: Views) -> Tensor:
    """H(q, z) averaged over each image's masked patches, then over all images and crops; no mask counts as 0.

    q, z: [M, K], rows in the order of views.block_index.
    """
    counts = views.block_mask.sum(-1).flatten()  # [G * B]
    image = views.block_index // views.block_mask.shape[-1]
    rows = -(q * z.log_softmax(-1)).sum(-1)
    return (rows / counts[image]).sum() / counts.numel()
