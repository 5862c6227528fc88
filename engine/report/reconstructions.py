"""What the pixel decoder makes of patches that the student does not see (MAE)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...harmony.image_encoder import patchify, unpatchify
from ...harmony.model import Harmony
from ...harmony.objectives import Features
from ...harmony.objectives.reconstruction import Reconstruction
from ...harmony.views import View, Views
from ..evaluate.features import image_tower
from .markup import Markup, foreign, picture, shown_scale, tag
from .run import Run
from .samples import displayable
from .views import with_holes

SIDE = 144
"""Side at which a crop is shown, CSS pixels."""


def reconstructions(run: Run) -> Markup:
    """Per sample: the first global crop, its visible patches, and the reconstruction with its error."""
    config, gallery = run.config, run.gallery
    filled, errors = reconstruct(run.model, gallery.views)
    patch, scale = config.model.image.patch_size, shown_scale(config.views.global_size, SIDE)
    crops = displayable(gallery.views.global_crops[0], config)
    strips = crops, with_holes(crops, gallery.views.removed[0], patch), displayable(filled, config)
    cards = []
    for i, name in enumerate(gallery.names):
        labels = "crop", "what the student sees", "reconstruction"
        images = [
            tag("figure", picture(s[i], f"{name}: {label}", scale)) for s, label in zip(strips, labels, strict=True)
        ]
        notes = tag("p", foreign(name), tag("span", f"error {errors[i]:.2f}", class_="aside"), class_="caption")
        cards.append(tag("article", notes, tag("div", images, class_="strip row"), class_="card"))
    return tag("div", cards, class_="cards")


@torch.inference_mode()
def reconstruct(model: Harmony, views: Views) -> tuple[Tensor, list[float]]:
    """Global crop 0 with its removed patches predicted [B, 3, H, W], and the mean squared error of each, standardised.

    The model predicts pixels standardised per patch; the true patch's mean and deviation bring them back.
    """
    objective, encoder = cast(Reconstruction, model.objectives["reconstruction"]), image_tower(model.student)
    views = views.to(encoder.cls_token.device)
    images = encoder(views, {View.GLOBAL_VISIBLE: objective.crops})
    predicted = objective.predict(Features(images, {}, encoder, None, None), views)[0].float()  # [B, R, 3 p p]
    pixels = patchify(views.global_crops[0], objective.patch_size)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    index = views.removed[0, :, :, None].expand_as(predicted)
    errors = (predicted - ((pixels - mean) / deviation).gather(1, index)).square().mean((1, 2))
    there = views.removed[0, :, :, None]
    restored = predicted * deviation.gather(1, there) + mean.gather(1, there)
    return unpatchify(pixels.scatter(1, index, restored), objective.patch_size), errors.tolist()
