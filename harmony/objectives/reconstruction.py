"""Masked autoencoding of pixels (MAE, He et al. 2022; Harmony, section 3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..heads import PixelDecoder
from ..image_encoder import patchify
from ..schedules import Clock
from ..views import Request, View, Views, ViewsConfig
from .base import Collectives, Features, Objective, ObjectiveConfig, Outcome, Surroundings, at_least_float, register


class ReconstructionConfig(ObjectiveConfig):
    """Size of the decoder."""

    width: PositiveInt = 512
    """Width of the decoder's tokens."""
    depth: PositiveInt = 8
    """Transformer blocks of the decoder."""
    heads: PositiveInt = 16
    """Attention heads of the decoder."""
    crops: PositiveInt | None = None
    """How many global crops are reconstructed; null: all. Their losses add up, as in the authors' code."""
    position_embedding: Literal["sincos", "zeros"] = "sincos"
    """The decoder's fixed positions. zeros: as the authors' code leaves them; then all removed patches look alike."""

    def require(self, views: ViewsConfig) -> None:
        """So many global crops, and patches that are removed from them, at both ends of the ramp."""
        if self.crops is not None and self.crops > views.global_crops:
            raise ValueError(
                f"objectives.reconstruction.crops {self.crops}: views.global_crops is {views.global_crops}"
            )
        if 0 in (views.pixel_mask_ratio, views.pixel_mask_ratio_end):
            raise ValueError(
                "objectives.reconstruction predicts removed patches: views.pixel_mask_ratio must be above 0"
            )


@register("reconstruction")
class Reconstruction(Objective):
    """Squared error of the removed patches' pixels, standardised per patch; summed over the global crops."""

    Config = ReconstructionConfig

    def __init__(self, config: ReconstructionConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.patch_size = around.patch_size
        self.crops = config.crops or around.views.global_crops
        self.decoder = PixelDecoder(
            around.image_width, around.patches, around.patch_size, config.width, config.depth, config.heads
        )
        if config.position_embedding == "zeros":
            self.decoder.pos_embed.zero_()

    @property
    def student_views(self) -> Request:
        """The kept patches of the global crops."""
        return {View.GLOBAL_VISIBLE: self.crops}

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """The teacher is not asked."""
        prediction = at_least_float(self.predict(student, views))
        target = normalised_pixels(views.global_crops[: self.crops], self.patch_size)
        removed = views.removed[: self.crops, :, :, None].expand(-1, -1, -1, target.shape[-1])
        error = (prediction - target.gather(2, removed)).square().mean((1, 2, 3))  # [crops]
        return Outcome(error.sum(), {f"crop_{i}": e for i, e in enumerate(error.detach())})

    def predict(self, student: Features, views: Views) -> Tensor:
        """Standardised pixels of the removed patches: [crops, B, removed, 3 p p]."""
        visible = student.images[View.GLOBAL_VISIBLE]
        flat = (visible, views.kept[: self.crops], views.removed[: self.crops])
        return self.decoder(*(x.flatten(0, 1) for x in flat)).unflatten(0, visible.shape[:2])


def normalised_pixels(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch, standardised with its own mean and unbiased variance: [..., 3, H, W] -> [..., P, 3 p p]."""
    pixels = patchify(images, patch_size)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()
