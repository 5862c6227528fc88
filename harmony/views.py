"""The named views of a sample, and how they are drawn: crops, block masks (iBOT), pixel masks (MAE), caption masks.

Letters in shapes: B samples, G global crops, N local crops, P patches of a global crop, S = sqrt(P) patches per side,
C context length in tokens. Every draw is a pure function of a per-sample key (see `randomness`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import Enum, IntEnum

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from .config import Config, Fraction, Range
from .randomness import Purpose, sample_keys, split, uniform
from .schedules import Clock, ramp_steps

CROP_ATTEMPTS = 10
BLOCK_ATTEMPTS = 10


class View(str, Enum):
    """What an objective can ask for. Image views come crop-major: features [crops, B, tokens, D]."""

    GLOBAL_PLAIN = "global.plain"
    """The whole global crop: class token and P patches."""
    GLOBAL_MASKED = "global.masked"
    """The global crop with a mask token in place of the patches of the block mask."""
    GLOBAL_VISIBLE = "global.visible"
    """Class token and the patches that the pixel mask leaves, without mask tokens."""
    LOCAL = "local"
    """The local crops."""
    CAPTION = "caption"
    """The caption at its real length, start and end ids included."""
    CAPTION_MASKED = "caption.masked"
    """The caption with the mask id in place of some words."""

    @property
    def is_image(self) -> bool:
        """Whether the image encoder makes it."""
        return not self.value.startswith("caption")


class Reads(IntEnum):
    """Which tokens of an image view somebody reads; what nobody reads need not be computed to the end."""

    CLASS = 0
    """The class token"""
    MASKED = 1
    """The class token, and the patches under the block mask"""
    ALL = 2
    """Every token"""


Request = dict[View, int]
"""Which views, and for image views of how many crops (the first ones)."""


def union(requests: list[Request]) -> Request:
    """The smallest request that serves all."""
    return {view: max(r.get(view, 0) for r in requests) for view in View if any(r.get(view, 0) for r in requests)}


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
    block_ratios: tuple[Fraction, ...] = (0.0, 0.3)
    """Shares of patches that the block mask hides; each crop draws one of them (iBOT's "predicted ratio")."""
    block_ratio_spreads: tuple[Fraction, ...] = (0.0, 0.2)
    """Uniform spread (+-) around each of `block_ratios`: as many."""
    block_aspect: float = Field(0.3, gt=0, le=1)
    """Smallest aspect ratio of a block; the largest is its inverse."""
    pixel_mask_ratio: Fraction = 0.75
    """Share of patches removed for the reconstruction (MAE), at the start."""
    pixel_mask_ratio_end: Fraction | None = None
    """Share at the end of a linear ramp; null: it stays."""
    pixel_mask_ratio_epochs: int = Field(10, ge=0)
    """Length of the ramp, epochs."""
    pixel_mask_ratio_by_epoch: bool = False
    """Read the ramp, which has one value per step, at the number of the epoch, as the authors' code does by a slip (it
    then hardly moves), instead of at the step."""
    caption_mask_ratio: Fraction = 0.2
    """Probability of a word to be replaced by the mask id; start, end and padding never are."""
    caption_cut_ratio: Fraction = 0.0
    """Probability that a caption is cut after its first phrase, so that short texts, such as class names, are seen in
    training too (sub-caption sampling, as DreamLIP has it)."""
    caption_separators: tuple[int, ...] = (267, 269, 282)
    """Token ids that end a phrase: in open_clip's vocabulary comma, full stop and semicolon as tokens of their own."""

    @model_validator(mode="after")
    def _spreads_for_ratios(self) -> ViewsConfig:
        if not self.block_ratios or len(self.block_ratios) != len(self.block_ratio_spreads):
            raise ValueError(
                f"block_ratios and block_ratio_spreads must be as many, at least one: they are "
                f"{len(self.block_ratios)} and {len(self.block_ratio_spreads)}"
            )
        return self


def pixel_ratio(config: ViewsConfig, clock: Clock) -> float:
    """Share of patches removed for the reconstruction at this step."""
    start, end = config.pixel_mask_ratio, config.pixel_mask_ratio_end
    position = clock.epoch if config.pixel_mask_ratio_by_epoch else clock.step
    length = config.pixel_mask_ratio_epochs * clock.steps_per_epoch
    return start if end is None else ramp_steps(position, start, end, length)


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


def block_masks(
    keys: Tensor, side: int, ratios: tuple[float, ...], spreads: tuple[float, ...], aspect: float = 0.3
) -> Tensor:
    """Block-wise masks over a side x side grid of patches (BEiT, algorithm 1, as iBOT uses it).

    Each key draws one of `ratios` (+- its spread), then rectangles of random area and aspect ratio are added until
    that share is reached or ten rectangles in a row do not fit. All keys advance together: attempt t of a key uses
    its own numbers, so a mask does not depend on the others in the batch.

    keys: int64 [...]. Returns bool [..., side * side], true = masked.
    """
    shape, flat = keys.shape, keys.reshape(-1)
    start, rounds = split(flat, 2).unbind(-1)
    u = uniform(start, 2)
    choice = (u[:, 0] * len(ratios)).long()
    low, spread = torch.tensor(ratios)[choice], torch.tensor(spreads)[choice]
    goal = ((low + spread * (2 * u[:, 1] - 1)) * side * side).long()

    rows = torch.arange(side)
    mask = torch.zeros(len(flat), side, side, dtype=torch.bool)
    count = torch.zeros_like(goal)
    failures = torch.zeros_like(goal)
    smallest = float((side // 3) ** 2)
    for attempt in range(BLOCK_ATTEMPTS * side * side):
        active = (count < goal) & (failures < BLOCK_ATTEMPTS)
        if not active.any():
            break
        u = uniform(rounds + attempt, 4)
        area = smallest + u[:, 0] * ((goal - count) - smallest)
        ratio = torch.exp((2 * u[:, 1] - 1) * math.log(1 / aspect))
        area = area.clamp(min=0)
        h, w = torch.sqrt(area * ratio).round().long(), torch.sqrt(area / ratio).round().long()
        top = (u[:, 2] * (side - h + 1)).long()
        left = (u[:, 3] * (side - w + 1)).long()
        in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
        in_columns = (rows >= left[:, None]) & (rows < (left + w)[:, None])
        new = in_rows[:, :, None] & in_columns[:, None, :] & ~mask
        gain = new.sum((1, 2))
        accept = active & (h < side) & (w < side) & (gain > 0) & (gain <= goal - count)
        mask |= new & accept[:, None, None]
        count += torch.where(accept, gain, 0)
        failures = torch.where(accept, 0, failures + 1)
    return mask.reshape(*shape, side * side)


def pixel_masks(keys: Tensor, patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Random patches to keep and to remove (MAE): the int(P (1 - ratio)) patches with the smallest noise are kept.

    keys: int64 [...]. Returns int64 [..., kept] and int64 [..., removed], each in increasing order.
    """
    return split_by_noise(uniform(keys, patches), ratio)


def split_by_noise(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Indices of the int(P (1 - ratio)) smallest entries of noise [..., P], and of the others; both increasing."""
    kept = int(noise.shape[-1] * (1 - ratio))
    order = noise.argsort(dim=-1, stable=True)
    return order[..., :kept].sort(-1).values, order[..., kept:].sort(-1).values


def caption_lengths(tokens: Tensor) -> Tensor:
    """Number of tokens up to and with the end id, which is the largest id: int64 [B, C] -> int64 [B]."""
    return tokens.argmax(-1) + 1


def cut_captions(keys: Tensor, tokens: Tensor, ratio: float, separators: tuple[int, ...]) -> Tensor:
    """Cut captions, each with probability `ratio`, after their first phrase: the end id takes the place of the first
    separator, zeros follow. A caption without a separator, or that begins with one, stays. int64 [B, C] -> [B, C].
    """
    ends = torch.isin(tokens, torch.tensor(separators))
    place = ends.to(torch.int8).argmax(1)
    chosen = (uniform(keys, 1)[:, 0] < ratio) & (place > 1)
    position = torch.arange(tokens.shape[1])
    last = torch.where(position == place[:, None], tokens.amax(1, keepdim=True), 0)
    return torch.where(chosen[:, None] & (position >= place[:, None]), last, tokens)


def caption_masks(keys: Tensor, lengths: Tensor, context: int, ratio: float) -> Tensor:
    """Words to be masked, each with probability `ratio`; start, end and padding never are. Returns bool [B, C]."""
    return words_only(uniform(keys, context) < ratio, lengths)


def words_only(mask: Tensor, lengths: Tensor) -> Tensor:
    """A mask [B, C] without the start id (position 0), the end id and the padding."""
    position = torch.arange(mask.shape[1])
    return mask & (position > 0) & (position < lengths[:, None] - 1)


@dataclass(frozen=True)
class Masks:
    """What is drawn for the samples of a step, on the host, before they are cut to micro-batches."""

    tokens: Tensor
    """int64 [B, C]: start id, words, end id, zeros"""
    block_mask: Tensor
    """bool [G, B, P], true = replaced by the mask token"""
    kept: Tensor
    """int64 [G, B, K]: patches the reconstruction sees"""
    removed: Tensor
    """int64 [G, B, P - K]: patches it must predict"""
    caption_mask: Tensor
    """bool [B, C], true = replaced by the mask id"""
    drop_keys: Tensor
    """int64 [B]: random keys of stochastic depth"""

    def micro_batch(self, part: slice) -> Masks:
        """Those of some of the samples."""
        block, kept, removed = (t[:, part] for t in (self.block_mask, self.kept, self.removed))
        return Masks(self.tokens[part], block, kept, removed, self.caption_mask[part], self.drop_keys[part])


def draw_masks(
    config: ViewsConfig, patch_size: int, tokens: Tensor, index: Tensor, seed: int, epoch: int, ratio: float
) -> Masks:
    """Draw what belongs to each sample in this epoch.

    tokens: int64 [B, C]; index: int64 [B], the samples' places in the data set; both on the host. ratio: share of
    patches removed for the reconstruction (see `pixel_ratio`).
    """

    def keys(purpose: Purpose) -> Tensor:
        return sample_keys(seed, epoch, index, purpose)

    block = draw_block_masks(config, patch_size, index, seed, epoch)
    kept, removed = pixel_masks(split(keys(Purpose.PIXEL_MASK), config.global_crops).T, block.shape[-1], ratio)
    if config.caption_cut_ratio:
        tokens = cut_captions(keys(Purpose.CAPTION_CUT), tokens, config.caption_cut_ratio, config.caption_separators)
    lengths = caption_lengths(tokens)
    words = caption_masks(keys(Purpose.CAPTION_MASK), lengths, tokens.shape[1], config.caption_mask_ratio)
    return Masks(tokens, block, kept, removed, words, keys(Purpose.DROP_PATH))


def draw_block_masks(config: ViewsConfig, patch_size: int, index: Tensor, seed: int, epoch: int) -> Tensor:
    """The block masks of `draw_masks`: bool [G, B, P]."""
    keys = split(sample_keys(seed, epoch, index, Purpose.BLOCK_MASK), config.global_crops).T
    side, c = config.global_size // patch_size, config
    return block_masks(keys, side, c.block_ratios, c.block_ratio_spreads, c.block_aspect)


@dataclass(frozen=True)
class Views:
    """The views of one micro-batch, ready for the encoders. Index tensors are made on the host: no device sync."""

    global_crops: Tensor
    """float32 [G, B, 3, H, W], normalised"""
    local_crops: Tensor
    """float32 [N, B, 3, h, w], normalised"""
    tokens: Tensor
    """int64 [B, C]: start id, words, end id, zeros"""
    lengths: Tensor
    """int64 [B], on the host: tokens of each caption, start and end ids included"""
    block_mask: Tensor
    """bool [G, B, P], true = replaced by the mask token"""
    block_index: Tensor
    """int64 [M]: places of the true entries in the flattened block_mask"""
    hidden_crops: Tensor
    """int64, on the host: places in the flattened [G, B] of the crops of which the block mask hides something; of the
    others, `global.masked` is `global.plain`"""
    kept: Tensor
    """int64 [G, B, K]: patches the reconstruction sees"""
    removed: Tensor
    """int64 [G, B, P - K]: patches it must predict"""
    caption_mask: Tensor
    """bool [B, C], true = replaced by the mask id"""
    caption_index: Tensor
    """int64 [W]: places of the true entries in the flattened caption_mask"""
    drop_keys: Tensor
    """int64 [B], on the host: random keys of stochastic depth"""
    masked_words: Tensor
    """float32 []: masked words of this rank's whole step, divided by its micro-batches"""

    @property
    def batch_size(self) -> int:
        """Samples in this micro-batch."""
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> Views:
        """A copy on `device` (what is said to be on the host stays there)."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        stay = ("lengths", "drop_keys", "hidden_crops")
        return Views(**{n: t if n in stay else t.to(device, non_blocking=True) for n, t in parts.items()})


def assemble(global_crops: Tensor, local_crops: Tensor, masks: Masks, masked_words: float | None = None) -> Views:
    """`Views` from crops and masks, with the index tensors derived.

    The crops are taken as they are (see `Views`). masked_words: see `Views`; None: this micro-batch is the whole step.
    """
    caption_index = masks.caption_mask.flatten().nonzero().squeeze(1)
    return Views(
        global_crops=global_crops,
        local_crops=local_crops,
        tokens=masks.tokens,
        lengths=caption_lengths(masks.tokens),
        block_mask=masks.block_mask,
        block_index=masks.block_mask.flatten().nonzero().squeeze(1),
        hidden_crops=masks.block_mask.flatten(0, 1).any(1).nonzero().squeeze(1),
        kept=masks.kept,
        removed=masks.removed,
        caption_mask=masks.caption_mask,
        caption_index=caption_index,
        drop_keys=masks.drop_keys,
        masked_words=torch.tensor(float(len(caption_index)) if masked_words is None else masked_words),
    )
