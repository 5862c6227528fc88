"""Decode and cut with PIL alone: the crops of `crops.cut_batch` where FFCV is not built.

Same boxes; pixels differ by the decoder's rounding, and where one side is enlarged and the other shrunk.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...harmony.randomness import split
from ...harmony.views import ViewsConfig, crop_boxes
from .images import open_image, to_rgb


def header(data: bytes) -> tuple[int, int]:
    """Height and width of an image file, pixels, without decoding it. Raises Rejected."""
    width, height = open_image(data).size
    return height, width


def draw_boxes(keys: Tensor, height: Tensor, width: Tensor, views: ViewsConfig) -> np.ndarray:
    """All boxes of B samples: int64 [B, G + N, 4], top, left, height, width.

    keys: int64 [B], of Purpose.CROP; height, width: int64 [B], pixels.
    """
    kinds = split(keys, 2)
    global_boxes = crop_boxes(kinds[:, 0], height, width, views.global_crops, views.global_scale, views.aspect)
    if not views.local_crops:
        return global_boxes.numpy()
    local_boxes = crop_boxes(kinds[:, 1], height, width, views.local_crops, views.local_scale, views.aspect)
    return torch.cat([global_boxes, local_boxes], 1).numpy()


def reduction(boxes: np.ndarray, sides: np.ndarray) -> int:
    """`crops.reduction`: 1, 2, 4 or 8, how many times smaller the image may be decoded."""
    spare = int((boxes[:, 2:].min(1) // sides).min())
    return max(part for part in (1, 2, 4, 8) if part <= max(spare, 1))


def cut(data: bytes, boxes: np.ndarray, global_crops: np.ndarray, local_crops: np.ndarray) -> None:
    """Decode an image file and cut its boxes, int64 [G + N, 4], into uint8 [G, S, S, 3] and [N, s, s, 3].

    Raises Rejected where it cannot be decoded.
    """
    outs = [*global_crops, *local_crops]
    image = open_image(data)
    width, height = image.size
    part = reduction(boxes, np.array([len(out) for out in outs])) if image.format == "JPEG" else 1
    if part > 1:
        image.draft("RGB", (width // part, height // part))
        part = round(width / image.width)
    rgb = to_rgb(image)
    for (top, left, h, w), out in zip((boxes / part).tolist(), outs, strict=True):
        side = len(out)
        shrunk = h >= side and w >= side
        box = (left, top, min(left + w, rgb.width), min(top + h, rgb.height))
        filter_ = Image.Resampling.BOX if shrunk else Image.Resampling.BILINEAR
        out[:] = np.asarray(rgb.resize((side, side), filter_, box))
