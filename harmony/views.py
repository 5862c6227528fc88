"""The views of a sample: crop geometry, block masks (iBOT), pixel masks (MAE) and caption masks (MLM).

Letters in shapes: B samples, G global crops, N local crops, P patches of a global crop, S = sqrt(P) patches per side,
C context length in tokens. Every draw is a pure function of a per-sample key (see `randomness`).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from .config import Config, Fraction, Range
from .randomness import split, uniform

CROP_ATTEMPTS = 10


class ViewsConfig(Config):
    """Geometry of the crops (multi-crop of SwAV/DINO, sizes of the Harmony paper, section 4)."""

    global_crops: PositiveInt = 2
    """Global crops per image."""
    global_size: PositiveInt = 224
    """Side of a global crop, pixels."""
    global_scale: Range = (0.32, 1.0)
    """Share of the image's area a global crop covers."""
    local_crops: int = Field(8, ge=0)
    """Local crops per image."""
    local_size: PositiveInt = 96
    """Side of a local crop, pixels."""
    local_scale: Range = (0.05, 0.32)
    """Share of the image's area a local crop covers."""
    aspect: Range = (3 / 4, 4 / 3)
    """Width / height of a crop before it is resized to a square, drawn log-uniformly."""


def crop_boxes(keys: Tensor, height: Tensor, width: Tensor, count: int, scale: Range, aspect: Range) -> Tensor:
    """Random resized crops, as torchvision's `RandomResizedCrop` draws them.

    Ten attempts at a box of random area and aspect ratio, the first that fits wins; if none fits, the largest
    centred box of an allowed aspect ratio. Crop c of a sample uses `split(keys, count)[c]`; attempt a uses its
    uniform numbers 4a (area), 4a+1 (aspect), 4a+2 (top), 4a+3 (left).

    keys: int64 [B]; height, width: int64 [B], pixels. Returns int64 [B, count, 4]: top, left, height, width.
    """
    u = uniform(split(keys, count), 4 * CROP_ATTEMPTS).double().unflatten(-1, (CROP_ATTEMPTS, 4))  # [B, count, 10, 4]
    high, wide = height.double()[:, None, None], width.double()[:, None, None]
    area = high * wide * (scale[0] + (scale[1] - scale[0]) * u[..., 0])
    ratio = torch.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * u[..., 1])
    w = torch.floor(torch.sqrt(area * ratio) + 0.5)
    h = torch.floor(torch.sqrt(area / ratio) + 0.5)
    fits = (w >= 1) & (h >= 1) & (w <= wide) & (h <= high)
    top = torch.floor(u[..., 2] * (high - h + 1))
    left = torch.floor(u[..., 3] * (wide - w + 1))
    attempts = torch.stack([top, left, h, w], -1)
    first = fits.to(torch.int8).argmax(-1)
    chosen = attempts.gather(2, first[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)

    high, wide = high[..., 0], wide[..., 0]  # [B, 1]
    w = torch.where(wide / high > aspect[1], torch.floor(high * aspect[1] + 0.5), wide)
    h = torch.where(wide / high < aspect[0], torch.floor(wide / aspect[0] + 0.5), high)
    centred = torch.stack([torch.floor((high - h) / 2), torch.floor((wide - w) / 2), h, w], -1)  # [B, 1, 4]
    return torch.where(fits.any(-1)[..., None], chosen, centred).long()
