"""The views of a few samples as the model is given them: crops, mask tokens, holes, masked words."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ...harmony.views import View
from ..config import RunConfig
from .markup import Child, Markup, foreign, labelled, picture, shown_scale, tag
from .run import Run
from .samples import Gallery, displayable, readable

MASK_TOKEN = np.array([124, 108, 240], np.uint8)
"""Colour of patches that the mask token stands for."""
VIEWS_SHOWN = 4
"""Samples whose views are shown; the other pictures show the whole gallery."""


def views_of_samples(run: Run) -> Markup:
    """One card per sample: what each objective is given of it."""
    asked = {*run.outline.student_views, *run.outline.teacher_views}
    shown = range(len(run.gallery.names))[:VIEWS_SHOWN]
    return tag("div", [_views_card(run.config, run.gallery, i, asked) for i in shown], class_="stack")


def _views_card(config: RunConfig, gallery: Gallery, i: int, asked: set[View]) -> Markup:
    views, patch = gallery.views, config.model.image.patch_size
    crops, small = displayable(views.global_crops[:, i], config), displayable(views.local_crops[:, i], config)
    whole = displayable(gallery.whole[i], config)
    scale = shown_scale(config.views.global_size)

    def strip(label: str, images: np.ndarray) -> Markup:
        alt = f"{gallery.names[i]}: {label}"
        return labelled(label, [picture(image, alt, scale) for image in images])

    groups = [strip("sample", whole[None])]
    if any(view.is_image for view in asked):
        groups.append(strip("global crops, augmented", crops))
    if View.GLOBAL_MASKED in asked:
        groups.append(strip("with mask tokens (iBOT)", with_mask_tokens(crops, views.block_mask[:, i], patch)))
    if View.GLOBAL_VISIBLE in asked:
        groups.append(strip("what is left to see (MAE)", with_holes(crops, views.removed[:, i], patch)))
    if View.LOCAL in asked and len(small):
        groups.append(strip("local crops", small))
    caption = foreign(gallery.samples[i].caption)
    if View.CAPTION_MASKED in asked:
        caption = masked_caption(gallery, i, config.data.tokenizer)
    return tag("article", tag("p", caption, class_="caption"), tag("div", groups, class_="groups"), class_="card")


def masked_caption(gallery: Gallery, i: int, tokenizer: str) -> Markup:
    """The caption as its tokens read, with the masked ones marked. Start and end ids are not shown."""
    views = gallery.views
    words = slice(1, int(views.lengths[i]) - 1)
    pairs = list(zip(views.tokens[i, words].tolist(), views.caption_mask[i, words].tolist(), strict=True))
    parts: list[Child] = []
    for masked, group in groupby(pairs, key=lambda pair: pair[1]):
        text = readable(torch.tensor([token for token, _ in group]), tokenizer)
        space = " " if text[:1].isalnum() and parts else ""
        parts += [space, tag("mark", text) if masked else text]
    return tag("bdi", parts)


def with_mask_tokens(crops: np.ndarray, masked: Tensor, patch: int) -> np.ndarray:
    """Crops uint8 [n, S, S, 3] with the masked patches (bool [n, P]) painted over."""
    painted = (crops * 0.15 + MASK_TOKEN * 0.85).astype(np.uint8)
    return np.where(by_pixel(masked, patch)[..., None], painted, crops)


def with_holes(crops: np.ndarray, removed: Tensor, patch: int) -> np.ndarray:
    """Crops uint8 [n, S, S, 3] with removed patches (int64 [n, R]) transparent: [n, S, S, 4]."""
    side = crops.shape[1] // patch
    gone = torch.zeros(len(crops), side * side, dtype=torch.bool).scatter_(1, removed.cpu(), True)
    alpha = np.where(by_pixel(gone, patch), 0, 255).astype(np.uint8)[..., None]
    return np.concatenate([crops * (alpha > 0), alpha], -1)


def by_pixel(patches: Tensor, patch: int) -> np.ndarray:
    """A value per patch to a value per pixel: [n, P] -> [n, S, S]."""
    side = round(patches.shape[1] ** 0.5)
    return patches.cpu().numpy().reshape(-1, side, side).repeat(patch, 1).repeat(patch, 2)
