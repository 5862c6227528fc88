"""What the model sees and makes of a few samples: views and masks, reconstructions, attention of the class token."""

from __future__ import annotations

from itertools import groupby

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..harmony.image_encoder import ImageEncoder, patchify, unpatchify
from ..harmony.model import Harmony
from ..harmony.objectives import Features
from ..harmony.objectives.reconstruction import Reconstruction
from ..harmony.views import View, Views
from .config import RunConfig
from .errors import UserError
from .report_html import Child, Markup, foreign, labelled, picture, shown_scale, tag
from .report_samples import Gallery, displayable, readable

MASK_TOKEN = np.array([124, 108, 240], np.uint8)
"""Colour of patches that the mask token stands for."""
RECONSTRUCTION_SIDE = 144
"""Side at which a reconstruction is shown, CSS pixels."""
VIEWS_SHOWN = 4
"""Samples whose views are shown; the other pictures show the whole gallery."""


def views_of_samples(config: RunConfig, model: Harmony, gallery: Gallery) -> Markup:
    """One card per sample: what each objective is given of it."""
    asked = {*model.student_views, *model.teacher_views}
    cards = [_views_card(config, gallery, i, asked) for i in range(len(gallery.names))[:VIEWS_SHOWN]]
    return tag("div", cards, class_="stack")


def _views_card(config: RunConfig, gallery: Gallery, i: int, asked: set[View]) -> Markup:
    views, patch = gallery.views, config.model.image.patch_size
    crops, small = displayable(views.global_crops[:, i], config), displayable(views.local_crops[:, i], config)
    whole = displayable(gallery.whole[i], config)
    scale = shown_scale(config.views.global_size)

    def strip(label: str, images: np.ndarray) -> Markup:
        return labelled(label, [picture(image, label, scale) for image in images])

    groups = [strip("sample", whole[None])]
    if any(view.is_image for view in asked):
        groups.append(strip("global crops, augmented", crops))
    if View.GLOBAL_MASKED in asked:
        groups.append(strip("with mask tokens (iBOT)", with_mask_tokens(crops, views.block_mask[:, i], patch)))
    if View.GLOBAL_VISIBLE in asked:
        groups.append(strip("what is left to see (MAE)", with_holes(crops, views.removed[:, i], patch)))
    if View.LOCAL in asked and len(small):
        groups.append(strip("local crops", small))
    caption = masked_caption(gallery, i) if View.CAPTION_MASKED in asked else foreign(gallery.captions[i])
    return tag("article", tag("p", caption, class_="caption"), tag("div", groups, class_="groups"), class_="card")


def masked_caption(gallery: Gallery, i: int) -> Markup:
    """The caption as its tokens read, with the masked ones marked. Start and end ids are not shown."""
    views = gallery.views
    words = slice(1, int(views.lengths[i]) - 1)
    pairs = list(zip(views.tokens[i, words].tolist(), views.caption_mask[i, words].tolist(), strict=True))
    parts: list[Child] = []
    for masked, group in groupby(pairs, key=lambda pair: pair[1]):
        text = readable(torch.tensor([token for token, _ in group]))
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


def reconstructions(config: RunConfig, model: Harmony, gallery: Gallery) -> Markup:
    """Per sample: the first global crop, its visible patches, and the reconstruction with its error."""
    if "reconstruction" not in model.objectives:
        raise UserError("this run has no reconstruction objective")
    filled, errors = reconstruct(model, gallery.views)
    patch, scale = config.model.image.patch_size, shown_scale(config.views.global_size, RECONSTRUCTION_SIDE)
    crops = displayable(gallery.views.global_crops[0], config)
    strips = crops, with_holes(crops, gallery.views.removed[0], patch), displayable(filled, config)
    cards = []
    for i, name in enumerate(gallery.names):
        labels = "crop", "visible", f"reconstruction, error {errors[i]:.2f}"
        images = [tag("figure", picture(s[i], label, scale)) for s, label in zip(strips, labels, strict=True)]
        notes = tag("p", foreign(name), tag("span", f"error {errors[i]:.2f}", class_="aside"), class_="caption")
        cards.append(tag("article", notes, tag("div", images, class_="strip row"), class_="card"))
    return tag("div", cards, class_="cards")


@torch.inference_mode()
def reconstruct(model: Harmony, views: Views) -> tuple[Tensor, list[float]]:
    """Global crop 0 with its removed patches predicted [B, 3, H, W], and the mean squared error of each, standardised.

    The model predicts pixels standardised per patch; the true patch's mean and deviation bring them back.
    """
    objective: Reconstruction = model.objectives["reconstruction"]
    encoder = model.student.image
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


def attention_maps(config: RunConfig, encoder: ImageEncoder, gallery: Gallery) -> Markup:
    """Per sample: the image, the mean over heads, and each head."""
    maps = class_attention(encoder, gallery.whole).cpu()
    images = displayable(gallery.whole, config)
    cards = []
    for i, name in enumerate(gallery.names):
        shown = [picture(images[i], "image", class_="map")]
        shown.append(picture(heat(images[i], maps[i].mean(0)), "mean over heads", class_="map framed"))
        shown += [picture(heat(images[i], head), f"head {h + 1}", class_="map") for h, head in enumerate(maps[i])]
        caption = tag("p", foreign(name), class_="caption")
        cards.append(tag("article", caption, tag("div", shown, class_="strip"), class_="card"))
    return tag("div", cards, class_="cards wide")


@torch.inference_mode()
def class_attention(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """What the class token looks at in the last block: [B, 3, H, W] -> softmax weights on the patches [B, heads, P].

    Attention kernels never store these weights, so they are computed here from the block's own queries and keys.
    """
    attention = encoder.blocks[-1].attn
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    try:
        encoder.features(images.to(encoder.cls_token.device))
    finally:
        hook.remove()
    qkv = attention.qkv(inputs[0]).unflatten(0, (len(images), -1)).unflatten(-1, (3, attention.heads, -1))
    q, k, _ = qkv.movedim(-2, 1).unbind(-2)  # [B, heads, 1 + P, d]
    scores = (q[:, :, :1] @ k.mT).squeeze(2) / q.shape[-1] ** 0.5
    return scores.float().softmax(-1)[..., 1:]


def heat(image: np.ndarray, weights: Tensor) -> np.ndarray:
    """Weights on patches [P] as colours over the darkened image: uint8 [S, S, 3], smallest weight to largest."""
    side, size = round(len(weights) ** 0.5), image.shape[0]
    level = ((weights - weights.min()) / (weights.max() - weights.min() + 1e-12)).view(1, 1, side, side)
    smooth = F.interpolate(level, (size, size), mode="bilinear", align_corners=False)[0, 0].numpy()
    colour = matplotlib.colormaps["inferno"](smooth)[..., :3]
    gray = image.mean(-1, keepdims=True) / 255
    return (255 * (0.65 * colour + 0.35 * gray * (0.3 + 0.7 * smooth[..., None]))).astype(np.uint8)
