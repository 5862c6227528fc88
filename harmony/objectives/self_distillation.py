"""Self-distillation over multi-crop: class tokens (DINO) and masked patches (iBOT; Harmony, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from ..heads import ProjectionHead
from ..schedules import Clock
from ..views import Reads, Request, View, Views, ViewsConfig
from .base import (
    Collectives,
    Distillation,
    DistillationConfig,
    Features,
    Outcome,
    Surroundings,
    at_least_float,
    feature_std,
    register,
    require_pairs,
)


class SelfDistillationConfig(DistillationConfig):
    """Class tokens, and beside them patches with a temperature and a center of their own."""

    class_weight: float = Field(0.5, ge=0)
    """Weight of the class-token term (the authors' lambda1)."""
    patch_weight: float | None = Field(0.5, ge=0)
    """Weight of the masked-patch term (lambda2); null: no such term. Then nothing of it is built, and the student sees
    the global crops unmasked (DINO)."""
    patch_prototypes: PositiveInt | None = None
    """Outputs of a separate last layer for patches; null: patches share the class token's."""
    patch_temperature: PositiveFloat = 0.07
    """Of the teacher's patches, after the warm-up."""
    patch_temperature_start: PositiveFloat = 0.04
    """Of the teacher's patches, at the start of the warm-up."""
    patch_center: Literal["masked", "all"] = "masked"
    """Which teacher patches move the patch center: those the student must predict, or all (the authors' code)."""
    freeze_last_layer: int = Field(1, ge=0)
    """Epochs during which the student's prototypes stay fixed."""

    @model_validator(mode="after")
    def _patches_are_on(self) -> SelfDistillationConfig:
        if self.patch_weight is None and self.patch_prototypes is not None:
            raise ValueError("patch_prototypes is set, but patch_weight is null: no patch would use them")
        return self

    def require(self, views: ViewsConfig) -> None:
        """Two crops."""
        require_pairs("self_distillation", views)


@register("self_distillation")
class SelfDistillation(Distillation):
    """Cross-entropy between the teacher's centered, sharpened prototype scores and the student's."""

    Config = SelfDistillationConfig
    config: SelfDistillationConfig

    def __init__(self, config: SelfDistillationConfig, around: Surroundings) -> None:
        super().__init__(config, around.image_width)
        self.crops, self.local_crops = around.views.global_crops, around.views.local_crops
        self.patches = config.patch_weight is not None
        self.student_view = View.GLOBAL_MASKED if self.patches else View.GLOBAL_PLAIN
        self.class_center = self.new_center(config.prototypes)
        self.patch_center = self.new_center(config.patch_prototypes or config.prototypes) if self.patches else None

    @property
    def student_views(self) -> Request:
        """Global crops, with mask tokens if patches are distilled, and local crops."""
        return {self.student_view: self.crops, View.LOCAL: self.local_crops}

    @property
    def teacher_views(self) -> Request:
        """Global crops, unmasked."""
        return {View.GLOBAL_PLAIN: self.crops}

    @property
    def student_reads(self) -> dict[View, Reads]:
        """Class tokens, and masked patches if they are distilled."""
        return {self.student_view: Reads.MASKED if self.patches else Reads.CLASS, View.LOCAL: Reads.CLASS}

    @property
    def teacher_reads(self) -> dict[View, Reads]:
        """The same, or every patch if the center is that of all."""
        if not self.patches:
            return {View.GLOBAL_PLAIN: Reads.CLASS}
        return {View.GLOBAL_PLAIN: Reads.ALL if self.config.patch_center == "all" else Reads.MASKED}

    def build_head(self) -> ProjectionHead:
        """One head for class tokens and patches."""
        c = self.config
        return ProjectionHead(self.width, c.hidden, c.bottleneck, c.prototypes, c.layers, c.patch_prototypes)

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Class term over all pairs of different views, patch term over masked patches of the same view."""
        cfg = self.config
        with torch.no_grad():
            their_classes, their_patches = teacher.head.directions()
        our_classes, our_patches = student.head.directions()
        known, known_patches = self.teacher_vectors(teacher, views, their_classes, their_patches)
        learned, learned_patches = self.student_vectors(student, views)
        tau = self.teacher_temperature(clock)
        metrics = {"teacher_entropy": self.entropy(known, their_classes, tau), **self.center_norm()}
        metrics |= feature_std(known)

        pairs = [(v, a) for a in range(len(known)) for v in range(len(learned)) if v != a]
        rows = torch.cat([learned[v] for v, _ in pairs]), torch.cat([known[a] for _, a in pairs])
        class_loss = self.cross_entropy(*rows, (our_classes, their_classes), self.class_center, tau)
        metrics["class"] = class_loss.detach()
        if known_patches is None or self.patch_center is None or cfg.patch_weight is None:
            return Outcome(cfg.class_weight * class_loss, metrics)

        # Each image's mean over its masked patches, then the mean over all images and crops: without a mask, 0.
        counts = views.block_mask.sum(-1).flatten()  # [G * B]
        of_patch = counts[views.block_index // views.block_mask.shape[-1]] * counts.numel()
        weight = 1 / of_patch.to(torch.promote_types(known.dtype, torch.float32))
        patch_loss = self.cross_entropy(
            learned_patches, known_patches, (our_patches, their_patches), self.patch_center,
            self.patch_temperature(clock), weight,
        )  # fmt: skip
        metrics["patch"] = patch_loss.detach()
        return Outcome(cfg.class_weight * class_loss + cfg.patch_weight * patch_loss, metrics)

    def scheduled(self, clock: Clock) -> dict[str, float]:
        """The teacher's temperatures, of class tokens and of patches."""
        patches = {"patch_temperature": self.patch_temperature(clock)} if self.patches else {}
        return {**super().scheduled(clock), **patches}

    def patch_temperature(self, clock: Clock) -> float:
        """The temperature of the teacher's patches at this step."""
        return self.warmed_up(clock, self.config.patch_temperature_start, self.config.patch_temperature)

    def student_vectors(self, student: Features, views: Views) -> tuple[Tensor, Tensor]:
        """Unit vectors of class tokens [G + N, B, d] and of masked patches [M, d]."""
        tokens = student.images[self.student_view]
        classes = [tokens[:, :, 0]]
        if View.LOCAL in student.images:
            classes.append(student.images[View.LOCAL][:, :, 0])
        class_tokens = torch.cat(classes)
        rows = class_tokens.flatten(0, 1)
        if self.patches:
            rows = torch.cat([rows, tokens[:, :, 1:].flatten(0, 2)[views.block_index]])
        u = student.head.bottleneck(rows)
        count = class_tokens.shape[:2].numel()
        return u[:count].unflatten(0, class_tokens.shape[:2]), u[count:]

    @torch.no_grad()
    def teacher_vectors(
        self, teacher: Features, views: Views, class_directions: Tensor, patch_directions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Unit vectors of class tokens [G, B, d] and of the patches that the student must predict [M, d]. Feeds the
        centers with their scores on prototypes [K, d]."""
        tokens, head = teacher.images[View.GLOBAL_PLAIN][: self.crops], teacher.head
        classes = head.bottleneck(tokens[:, :, 0])
        self.class_center.add_scores(classes.flatten(0, 1), class_directions)
        if self.patch_center is None:
            return classes, None
        patches = tokens[:, :, 1:].flatten(0, 2)
        if self.config.patch_center == "all":
            u = head.bottleneck(patches)
            self.patch_center.add_scores(u, patch_directions)
            return classes, u[views.block_index]
        u = head.bottleneck(patches[views.block_index])
        self.patch_center.add_scores(u, patch_directions)
        return classes, u

    @torch.no_grad()
    def entropy(self, classes: Tensor, directions: Tensor, temperature: float) -> Tensor:
        """Mean entropy of the teacher's distributions, nats: 0 and log K both mean collapse."""
        scores = at_least_float(classes) @ at_least_float(directions).T
        log_q = ((scores - self.class_center.value) / temperature).log_softmax(-1)
        return -(log_q.exp() * log_q).sum(-1).mean()
