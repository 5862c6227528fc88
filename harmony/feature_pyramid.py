"""Feature maps at several scales from a plain ViT, as detection and segmentation heads expect them.

Letters in shapes: B images, D width of the tower, O output channels, p patch side in pixels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (4.0, 2.0, 1.0, 0.5)
"""Of the patch grid: strides of p/4, p/2, p and 2p pixels (4, 8, 16, 32 for patches of 16)."""


def as_maps(tokens: Sequence[Tensor], image: Tensor, patch_size: int) -> list[Tensor]:
    """Tokens of some blocks, [B, 1 + P, D] each, class token first, to maps [B, D, H/p, W/p]. image: [B, 3, H, W]."""
    rows, columns = (side // patch_size for side in image.shape[-2:])
    return [block[:, 1:].transpose(1, 2).unflatten(-1, (rows, columns)) for block in tokens]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527, section 3 and appendix A.1).

    Given one map, every level is made of it, as ViTDet does; given as many maps as levels (blocks 3, 6, 9 and 12 of 12,
    say), each level is made of its own, as UPerNet heads on a ViT are fed (BEiT, Bao et al. 2022).
    """

    def __init__(self, width: int, channels: int | None = 256, scales: Sequence[float] = SCALES) -> None:
        """channels: of every level, by a 1 x 1 and a 3 x 3 convolution; None: levels keep the width of their rescaling.

        scales: of the levels, finest first, each 4, 2, 1 or a fraction 1/2, 1/4, ... Raises ValueError for others.
        """
        super().__init__()
        levels = [[*_rescaled(width, scale), *_projected(width, scale, channels)] for scale in scales]
        self.levels = nn.ModuleList(nn.Sequential(*level) for level in levels)
        self.channels = [channels or _width_at(width, scale) for scale in scales]
        """Of each level."""

    def forward(self, maps: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """One map [B, D, h, w], or one for each level -> levels [B, O, h * scale, w * scale]."""
        each = [maps] * len(self.levels) if isinstance(maps, Tensor) else list(maps)
        if len(each) == 1:
            each = each * len(self.levels)
        if len(each) != len(self.levels):
            raise ValueError(f"{len(each)} maps for {len(self.levels)} levels; give one map, or one for each level")
        return [level(x) for level, x in zip(self.levels, each, strict=True)]


class Shrink(nn.Module):
    """The largest of each square of k x k values; odd borders count as well."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, ceil(h / k), ceil(w / k)]."""
        return F.max_pool2d(x, self.factor, self.factor, ceil_mode=True)


def _rescaled(width: int, scale: float) -> list[nn.Module]:
    """To another size: transposed convolutions, which halve the channels, or the maximum of squares."""
    if scale == 4:
        first = nn.ConvTranspose2d(width, width // 2, 2, 2)
        return [first, LayerNorm2d(width // 2), nn.GELU(), nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
    if scale == 2:
        return [nn.ConvTranspose2d(width, width // 2, 2, 2)]
    if scale == 1:
        return []
    if 0 < scale < 1 and (1 / scale).is_integer():
        return [Shrink(int(1 / scale))]
    raise ValueError(f"scale {scale} is none of 4, 2, 1, 1/2, 1/4, ...")


def _width_at(width: int, scale: float) -> int:
    return int(width / scale) if scale > 1 else width


def _projected(width: int, scale: float, channels: int | None) -> list[nn.Module]:
    """To the heads' number of channels."""
    if channels is None:
        return []
    return [
        nn.Conv2d(_width_at(width, scale), channels, 1, bias=False), LayerNorm2d(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
    ]  # fmt: skip
