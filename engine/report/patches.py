"""What single patches tell: where the class token looks, and the principal components of patch tokens as colours."""

from __future__ import annotations

from typing import cast

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...harmony.image_encoder import Block, ImageEncoder
from .markup import Markup, foreign, picture, reduced, tag
from .run import Run
from .samples import displayable, finer

GRID = 16
"""Patches per side, at least: images of runs on small crops are shown to the encoder larger than in training."""
MAP = 160
"""Largest side of an attention map, pixels: twice what is shown, for screens with small pixels."""
BACKGROUND = 0.25
"""Brightness of what is not foreground."""


def attention_maps(run: Run) -> Markup:
    """Per sample: the image, the mean over heads, and each head."""
    gallery, encoder = run.gallery, run.image_encoder
    whole = finer(gallery, run.config, GRID)
    maps = class_attention(encoder, whole).cpu()
    images = displayable(whole, run.config)
    cards = []
    for i, name in enumerate(gallery.names):
        image = reduced(images[i], MAP)
        shown = [picture(image, name, class_="map")]
        shown.append(picture(heat(image, maps[i].mean(0)), f"{name}: mean over heads", class_="map framed"))
        shown += [picture(heat(image, head), f"{name}: head {h + 1}", class_="map") for h, head in enumerate(maps[i])]
        caption = tag("p", foreign(name), class_="caption")
        cards.append(tag("article", caption, tag("div", shown, class_="strip"), class_="card"))
    return tag("div", cards, class_="cards wide")


@torch.inference_mode()
def class_attention(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """What the class token looks at in the last block: [B, 3, H, W] -> softmax weights on the patches [B, heads, P].

    Attention kernels never store these weights, so they are computed here from the block's own queries and keys.
    """
    attention = cast(Block, encoder.blocks[-1]).attn
    inputs: list[Tensor] = []
    hook = attention.qkv.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
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


def patch_colours(run: Run) -> Markup:
    """Per sample: the image, and its patches coloured by three principal components that all samples share."""
    whole = finer(run.gallery, run.config, GRID)
    colours, front = principal_colours(patch_tokens(run.image_encoder, whole))
    images = displayable(whole, run.config)
    cards = []
    for i, name in enumerate(run.gallery.names):
        painted = paint(images[i], colours[i], front[i])
        pair = [picture(images[i], name, class_="patches"), picture(painted, f"{name}: components", class_="patches")]
        caption = tag("p", foreign(name), class_="caption")
        cards.append(tag("article", caption, tag("div", pair, class_="strip row"), class_="card"))
    return tag("div", cards, class_="cards narrow")


@torch.inference_mode()
def patch_tokens(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """After the final norm: [B, 3, H, W] -> [B, P, D], on the host."""
    return encoder.features(images.to(encoder.cls_token.device))[:, 1:].float().cpu()


def principal_colours(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Colours in [0, 1] [B, P, 3] and what is foreground, bool [B, P], for patch tokens [B, P, D].

    In two steps, as DINOv2 shows its features (Oquab et al. 2023, section 7): one component parts foreground from
    background; three components of the foreground alone become red, green and blue. Both are of all images together.
    For the first step each image is centred by itself: what sets images apart, which is most of what a token says
    early in training, would part images otherwise. The sign of a component is arbitrary: foreground is the side that
    has less of the images' borders.
    """
    within = tokens - tokens.mean(1, keepdim=True)
    front = components(within.flatten(0, 1), 1).view(tokens.shape[:2]) > 0
    border = on_border(tokens.shape[1])
    if front[:, border].float().mean() > front[:, ~border].float().mean():
        front = ~front
    colours = torch.zeros(*tokens.shape[:2], 3)
    if front.sum() > 3:
        scores = components(tokens[front], 3)
        low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
        colours[front] = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colours, front


def components(rows: Tensor, count: int) -> Tensor:
    """Scores of centred rows [N, D] on their first principal components: [N, count]."""
    centred = (rows - rows.mean(0)).double()
    _, axes = torch.linalg.eigh(centred.mT @ centred)  # in increasing order
    return (centred @ axes.flip(-1)[:, :count]).to(rows.dtype)


def on_border(patches: int) -> Tensor:
    """Which of a square of patches lie at its edge: bool [P]."""
    side = round(patches**0.5)
    place = torch.arange(side)
    edge = (place == 0) | (place == side - 1)
    return (edge[:, None] | edge).flatten()


def paint(image: np.ndarray, colours: Tensor, front: Tensor) -> np.ndarray:
    """Patches in their colours, the background as the darkened image: uint8 [S, S, 3]."""
    side, size = round(len(front) ** 0.5), image.shape[0]
    shape = (size, size)
    flat = F.interpolate(colours.view(1, side, side, 3).permute(0, 3, 1, 2), shape, mode="nearest")[0]
    where = F.interpolate(front.float().view(1, 1, side, side), shape, mode="nearest")[0, 0].bool().numpy()
    gray = np.broadcast_to(image.mean(-1, keepdims=True) * BACKGROUND, image.shape)
    return np.where(where[..., None], 255 * flat.permute(1, 2, 0).numpy(), gray).astype(np.uint8)
