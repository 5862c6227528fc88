"""Random augmentation of crops, batched, on the device they are on: the recipe of DINO (arXiv 2104.14294) and iBOT.

Flip, colour jitter in random order, grayscale, Gaussian blur, solarize, normalise. Every number is drawn from the
sample's own key, so a crop looks the same whatever else is in its batch. Letters in shapes: B samples, V crops of a
sample, M crops of a block, S side of a crop. The operations take float32 [M, 3, S, S] in [0, 1] and one parameter per
crop, change their argument in place, and equal those of `torchvision.transforms.v2.functional`; tests compare them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import one_hot

from ...harmony.config import Config, Fraction, Range
from ...harmony.randomness import split, uniform

Kind = Literal["global", "local"]

GRAY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in torchvision's gray (ITU-R BT.601)."""
SOLARIZE_THRESHOLD = 128 / 255
ORDERS = list(permutations(range(4)))
"""Every order of the four operations of colour jitter: place -> operation."""


def _above_zero(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] <= 0:
        raise ValueError(f"the lower bound {pair[0]} is not above 0")
    return pair


class AugmentConfig(Config):
    """Probabilities and strengths of the augmentations; the defaults are DINO's."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    jitter: Fraction = 0.8
    """Probability of colour jitter."""
    brightness: NonNegativeFloat = 0.4
    """Brightness is multiplied by a number within 1 +- this."""
    contrast: NonNegativeFloat = 0.4
    """Contrast is multiplied by a number within 1 +- this."""
    saturation: NonNegativeFloat = 0.2
    """Saturation is multiplied by a number within 1 +- this."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Hue is turned by a part of the colour circle within +- this."""
    grayscale: Fraction = 0.2
    """Probability of losing all colour."""
    blur_first_global: Fraction = 1.0
    """Probability of Gaussian blur of a sample's first global crop."""
    blur_other_globals: Fraction = 0.1
    """Probability of Gaussian blur of its further global crops."""
    blur_locals: Fraction = 0.5
    """Probability of Gaussian blur of its local crops."""
    blur_sigma: Annotated[Range, AfterValidator(_above_zero)] = (0.1, 2.0)
    """Standard deviation of the blur, pixels of the crop."""
    solarize_other_globals: Fraction = 0.2
    """Probability of inverting the bright half of the pixels, for all global crops but the first."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue, which are in [0, 1] (ImageNet's mean)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """What they are then divided by (ImageNet's standard deviation)."""


@dataclass(frozen=True)
class Draws:
    """What happens to each crop: tensors [B, V], or [M] once flattened."""

    flip: Tensor
    """bool"""
    order: Tensor
    """int64: row of ORDERS; -1 where there is no jitter"""
    brightness: Tensor
    """float32 factor"""
    contrast: Tensor
    """float32 factor"""
    saturation: Tensor
    """float32 factor"""
    hue: Tensor
    """float32 shift, parts of the circle"""
    grayscale: Tensor
    """bool"""
    blur: Tensor
    """float32 sigma, pixels; 0 where there is no blur"""
    solarize: Tensor
    """bool"""

    def apply(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """`function` of each tensor."""
        return Draws(*(function(getattr(self, f.name)) for f in fields(self)))


def draw(config: AugmentConfig, keys: Tensor, kind: Kind, views: int) -> Draws:
    """The parameters of all crops, from int64 [B] keys (`sample_keys(seed, epoch, index, Purpose.AUGMENT)`).

    Crop v of a sample uses the key `split(split(key, 2)[0 if global else 1], views)[v]` and its uniform numbers
    0 flip, 1 jitter or not, 2 brightness, 3 contrast, 4 saturation, 5 hue, 6 order, 7 grayscale, 8 blur or not,
    9 sigma, 10 solarize.
    """
    first = kind == "global"
    u = uniform(split(split(keys, 2)[:, 0 if first else 1], views), 11).unbind(-1)
    blur, solarize = torch.zeros(views), torch.zeros(views)
    blur[:] = config.blur_other_globals if first else config.blur_locals
    if first:
        blur[0] = config.blur_first_global
        solarize[1:] = config.solarize_other_globals
    low, high = config.blur_sigma
    return Draws(
        flip=u[0] < config.flip,
        order=torch.where(u[1] < config.jitter, (u[6] * len(ORDERS)).long(), -1),
        brightness=_around_one(u[2], config.brightness),
        contrast=_around_one(u[3], config.contrast),
        saturation=_around_one(u[4], config.saturation),
        hue=config.hue * (2 * u[5] - 1),
        grayscale=u[7] < config.grayscale,
        blur=torch.where(u[8] < blur.to(keys.device), low + (high - low) * u[9], 0.0),
        solarize=u[10] < solarize.to(keys.device),
    )


def _around_one(u: Tensor, strength: float) -> Tensor:
    low = max(0.0, 1 - strength)
    return low + (1 + strength - low) * u


def _per_crop(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def gray(x: Tensor) -> Tensor:
    """Luma: [M, 3, S, S] -> [M, 1, S, S]."""
    red, green, blue = x.split(1, 1)
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, clamped. factor: float32 [M]."""
    return x.mul_(_per_crop(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Between the crop's mean gray and x, clamped. factor: float32 [M]."""
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return x.mul_(_per_crop(factor)).add_(mean * (1 - _per_crop(factor))).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Between each pixel's gray and x, clamped. factor: float32 [M]."""
    luma = gray(x).mul_(1 - _per_crop(factor))
    return x.mul_(_per_crop(factor)).add_(luma).clamp_(0, 1)


def _reaches(a: Tensor, b: Tensor | float) -> Tensor:
    """1.0 where a >= b, else 0.0 (on the CPU comparisons and `torch.where` cost ten times an arithmetic operation)."""
    return torch.sub(a, b).mul_(2.0**60).add_(1).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle of HSV by `shift` (float32 [M], parts of a turn); value and saturation stay.

    The shift moves the hue only, so a pixel's largest and smallest channel keep their values: no saturation is
    computed. Hue is measured in sixths of a turn.
    """
    red, green, blue = x.unbind(1)
    high = torch.maximum(red, green)
    low = torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high - low
    scale = chroma.clamp_min(1e-12).reciprocal_()  # a gray pixel has all differences 0: any number will do
    hue = (red - green).mul_(scale).add_(4)
    hue.lerp_((blue - red).mul_(scale).add_(2), _reaches(green, high))
    hue.lerp_((green - blue).mul_(scale), _reaches(red, high))
    hue.add_(6 * shift[:, None, None])
    hue.sub_(hue.div(6).floor_(), alpha=6)
    for channel, centre, sign, offset in ((red, 3, 1, -1), (green, 2, -1, 2), (blue, 4, -1, 2)):
        part = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.addcmul(low, chroma, part, out=channel)
    return x


def to_grayscale(x: Tensor) -> Tensor:
    """All three channels become the luma."""
    return x.copy_(gray(x))


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Gaussian blur with reflected borders, kernel 2 * radius + 1 wide. sigma: float32 [M], pixels, above 0.

    Rows and columns are multiplied with a band matrix [S, S] per crop: for crops of this size faster than a
    convolution with its own kernel for each.
    """
    side = x.shape[-1]
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)  # [M, 2 * radius + 1]
    source = torch.arange(side, device=x.device) + offsets[:, None]  # [2 * radius + 1, S], before reflection
    source = (side - 1) - ((side - 1) - source.abs()).abs()
    places = one_hot(source, side).to(x.dtype).flatten(1)  # which pixel each offset reads: [2 * radius + 1, S * S]
    band = (weights @ places).view(len(x), side, side)
    rows = x.view(len(x), 3 * side, side) @ band.mT  # the three channels stacked: one product per crop
    return torch.matmul(band[:, None], rows.view_as(x), out=x)


def solarize(x: Tensor) -> Tensor:
    """Invert the pixels at or above the threshold."""
    bright = _reaches(x, SOLARIZE_THRESHOLD)
    return x.lerp_(1 - x, bright)


class Augment:
    """The whole chain, from uint8 crops to normalised float32."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config

    def __call__(self, crops: Tensor, keys: Tensor, kind: Kind) -> Tensor:
        """crops: uint8 [B, V, S, S, 3]; keys: int64 [B], of Purpose.AUGMENT. Returns float32 [B, V, 3, S, S].

        Keys may stay on the CPU while the crops are on a GPU: then nothing waits for the GPU. Which crops need an
        operation is decided where the keys are.
        """
        batch, views, side = crops.shape[:3]
        draws = draw(self.config, keys, kind, views).apply(lambda t: t.flatten())
        planes = crops.flatten(0, 1).permute(0, 3, 1, 2).contiguous()
        _where(planes, draws.flip, lambda part: part.flip(-1))  # while a pixel is still three bytes
        x = planes.float().div_(255)
        _jitter(x, draws)
        _where(x, draws.grayscale, to_grayscale)
        radius = min(math.ceil(3 * self.config.blur_sigma[1]), side - 1)  # beyond it, reflection ends
        _where(x, draws.blur > 0, lambda part, sigma: gaussian_blur(part, sigma, radius), draws.blur)
        _where(x, draws.solarize, solarize)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.config.mean, self.config.std))
        return x.sub_(mean).div_(std).view(batch, views, 3, side, side)


def _jitter(x: Tensor, draws: Draws) -> None:
    """Colour jitter of the crops whose order is not -1.

    The crops are sorted by order, so that each order's crops lie together and are changed in place: 24 groups, each
    small enough for a core's cache.
    """
    rows = draws.order.argsort(stable=True)[(draws.order < 0).sum() :]
    sizes = draws.order[rows].bincount(minlength=len(ORDERS)).tolist()
    parameters = torch.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue])[:, rows].to(x.device)
    operations = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
    there = rows.to(x.device, non_blocking=True)
    jittered = x.index_select(0, there)
    groups = zip(ORDERS, jittered.split(sizes), parameters.split(sizes, 1), strict=True)
    for order, group, values in groups:
        for number in order if len(group) else ():
            operations[number](group, values[number])
    _put(x, there, jittered)


def _where(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Apply `operation` to the chosen crops of x (bool [M]) only, with their parameters ([M] each)."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        there = rows.to(x.device, non_blocking=True)
        values = (p[rows].to(x.device, non_blocking=True) for p in parameters)
        _put(x, there, operation(x.index_select(0, there), *values))


def _put(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """x[rows] = values for contiguous tensors, in units of 16 bytes where possible (on the CPU five times faster)."""
    if not len(rows):
        return
    unit = torch.complex128 if x[0].nbytes % 16 == 0 else x.dtype
    x.flatten(1).view(unit).index_copy_(0, rows, values.flatten(1).view(unit))
