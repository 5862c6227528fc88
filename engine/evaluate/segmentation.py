"""Segmentation: a linear layer on frozen patch tokens (as DINOv2 evaluates), mean intersection over union.

Letters in shapes: B crops, D width of the image tower, g patches along a side, C classes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...harmony.image_encoder import ImageEncoder
from ..config import RunConfig
from ..data.masks import ADE20K_NAMES, MaskedImage, find_masked
from ..errors import DataError, UserError
from .features import normalised, resized
from .share import Share

OVERLAP = 1 / 3
"""Of neighbouring windows of a test image."""
WARMUP = 0.1 + 1e-6
"""Share of the steps in which the learning rate rises: a tenth and a hair, as OneCycleLR divides by (tenth - 1)."""


@dataclass(frozen=True)
class Labels:
    """What the numbers in masks mean."""

    count: int
    """Classes 0 .. count - 1, after reducing"""
    ignore: int
    reduce_zero: bool

    def of(self, mask: np.ndarray, name: Path) -> Tensor:
        """int64 [H, W], -1 where nothing counts. Raises DataError, naming the file, for a number beyond the classes."""
        classes = reduced(mask, self.ignore, self.reduce_zero)
        if classes.max() >= self.count:
            raise DataError(f"{name}: holds class {classes.max()}; the labelled masks to learn from have {self.count}")
        return torch.from_numpy(classes)


def reduced(mask: np.ndarray, ignore: int, reduce_zero: bool) -> np.ndarray:
    """Class numbers, -1 where nothing counts. reduce_zero: 0 does not count and 1 is the first class."""
    classes = np.where(mask == ignore, -1, mask)
    return np.where(classes > 0, classes - 1, -1) if reduce_zero else classes


class LinearHead(nn.Module):
    """Batch norm, then one score per class and patch."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.classify = nn.Conv2d(width, classes, 1)
        weight, bias = self.classify.parameters()
        nn.init.normal_(weight, std=0.01)
        nn.init.zeros_(bias)

    def forward(self, patches: Tensor, size: int) -> Tensor:
        """[B, D, g, g] -> [B, C, size, size], bilinear between the patches' centres."""
        return F.interpolate(self.classify(self.norm(patches)), (size, size), mode="bilinear", align_corners=False)


@torch.no_grad()
def patch_map(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Patch tokens after the final norm, in place: [B, 3, S, S] -> [B, D, g, g]."""
    tokens = encoder.features(images)[:, 1:]
    side = images.shape[-1] // encoder.config.patch_size
    return tokens.transpose(1, 2).unflatten(-1, (side, side)).float()


def segmentation(
    encoder: ImageEncoder, config: RunConfig, bank: list[str], data: list[str], share: Share
) -> dict[str, Any]:
    """Train the head on the folders `bank`, measure on the folders `data` (the same ones, where they have ADE20K's
    training and validation parts). Raises UserError for a size that patches do not divide, or one class; DataError
    where files are missing, unreadable or do not fit."""
    size = config.evaluate.segmentation.size or config.views.global_size
    if size % encoder.config.patch_size:
        raise UserError(
            f"evaluate.segmentation.size {size} is not a multiple of the patch size {encoder.config.patch_size}"
        )
    train = [pair for root in bank for pair in find_masked(Path(root), "training")]
    test = [pair for root in data for pair in find_masked(Path(root), "validation")]
    labels = known_labels(train, bank, config, share)
    device = encoder.cls_token.device
    torch.manual_seed(0)
    head = LinearHead(encoder.config.width, labels.count).to(device)
    train_head(head, encoder, train, labels, config, size, share)
    share.average([*head.parameters(), *(b for b in head.buffers() if b.is_floating_point())])
    head.eval()
    confusion = torch.zeros(labels.count, labels.count, dtype=torch.int64)
    for pair in share.shown(share.of(test), "segmenting", share.count(len(test))):
        image, mask = pair.load()
        scores = predict(head, encoder, image, config, size)
        truth = labels.of(mask, pair.mask)
        found = F.interpolate(scores[None], truth.shape, mode="bilinear", align_corners=False)[0].argmax(0).cpu()
        confusion += confusion_of(found, truth, labels.count)
    return scores_of(torch.stack(share.merged([confusion])).sum(0))


def known_labels(train: list[MaskedImage], roots: list[str], config: RunConfig, share: Share) -> Labels:
    """From the settings and the masks to learn from. Raises UserError where they hold fewer than two classes."""
    settings = config.evaluate.segmentation
    ade = any((Path(root) / ADE20K_NAMES).is_file() for root in roots)
    reduce_zero = ade if settings.reduce_zero_label is None else settings.reduce_zero_label
    with ThreadPoolExecutor(config.evaluate.workers) as pool:
        masks = pool.map(lambda pair: pair.load_mask(), share.of(train))
        largest = [int(reduced(mask, settings.ignore, reduce_zero).max()) for mask in masks]
    count = 1 + max(share.merged([max(largest, default=-1)]))
    if ade and reduce_zero:
        count = max(count, 150)
    if count < 2:
        raise UserError(f"segmentation needs at least two classes; the masks of {', '.join(roots)} hold {count}")
    return Labels(count, settings.ignore, reduce_zero)


def train_head(
    head: LinearHead, encoder: ImageEncoder, train: list[MaskedImage], labels: Labels, config: RunConfig, size: int,
    share: Share,
) -> None:  # fmt: skip
    """AdamW along a cosine, on random crops, flipped half of the time; the encoder stays as it is."""
    settings, device = config.evaluate.segmentation, encoder.cls_token.device
    batch = min(settings.batch_size, len(train))
    steps = settings.epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, max(steps, 2), pct_start=WARMUP)
    crops = _crops(train, labels, config, size, batch, share)
    for images, masks in share.shown(crops, "training the head", steps):
        scores = head(patch_map(encoder, images.to(device)), size)
        # The mean over the pixels that count; a batch without any teaches nothing.
        loss = F.cross_entropy(scores, masks.to(device), ignore_index=-1, reduction="sum") / (masks >= 0).sum().clamp(1)
        optimizer.zero_grad()
        loss.backward()
        share.average([p.grad for p in head.parameters() if p.grad is not None])
        optimizer.step()
        schedule.step()
    if not math.isfinite(float(head.classify.weight.detach().sum())):
        raise UserError("the segmentation head diverged: lower evaluate.segmentation.lr")


def _crops(
    train: list[MaskedImage], labels: Labels, config: RunConfig, size: int, batch: int, share: Share
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of this rank's crops: images [B, 3, size, size], classes int64 [B, size, size]."""
    generator = torch.Generator().manual_seed(0)

    def load(task: tuple[int, list[float]]) -> tuple[Tensor, Tensor]:
        index, draws = task
        image, mask = train[index].load()
        return random_crop(image, labels.of(mask, train[index].mask), config, size, draws)

    with ThreadPoolExecutor(config.evaluate.workers) as pool:
        for _ in range(config.evaluate.segmentation.epochs):
            order = torch.randperm(len(train), generator=generator)
            draws = torch.rand(len(train), 3, generator=generator)
            for chosen in order[: len(train) // batch * batch].split(batch):
                own = list(share.of(chosen.tolist())) or chosen[:1].tolist()
                images, masks = zip(*pool.map(load, [(i, draws[i].tolist()) for i in own]), strict=True)
                yield torch.stack(images), torch.stack(masks)


def random_crop(
    image: Image.Image, classes: Tensor, config: RunConfig, size: int, draws: list[float]
) -> tuple[Tensor, Tensor]:
    """Shorter side resized to `size`, then a square part, perhaps flipped. draws: three numbers from [0, 1)."""
    pixels = normalised(resized(image, size), config)
    classes = F.interpolate(classes[None, None].float(), pixels.shape[-2:], mode="nearest-exact")[0, 0].long()
    top, left = (int(u * (side - size + 1)) for u, side in zip(draws, pixels.shape[-2:], strict=False))
    pixels, classes = (x[..., top : top + size, left : left + size] for x in (pixels, classes))
    return (pixels.flip(-1), classes.flip(-1)) if draws[2] < 0.5 else (pixels, classes)


@torch.inference_mode()
def predict(head: LinearHead, encoder: ImageEncoder, image: Image.Image, config: RunConfig, size: int) -> Tensor:
    """Scores [C, H, W] of a whole image, its shorter side resized to `size`: the mean over overlapping windows."""
    pixels = normalised(resized(image, size), config).to(encoder.cls_token.device)
    height, width = pixels.shape[-2:]
    places = [(top, left) for top in _starts(height, size) for left in _starts(width, size)]
    total = pixels.new_zeros(head.classify.out_channels, height, width)
    times = pixels.new_zeros(height, width)
    for top, left in places:
        window = pixels[None, :, top : top + size, left : left + size]
        total[:, top : top + size, left : left + size] += head(patch_map(encoder, window), size)[0]
        times[top : top + size, left : left + size] += 1
    return total / times


def _starts(length: int, size: int) -> list[int]:
    """Where windows begin that cover `length`, evenly spread, overlapping by at least `OVERLAP`."""
    count = 1 + math.ceil((length - size) / (size * (1 - OVERLAP)))
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def confusion_of(found: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and found class (columns), int64 [C, C]; truth -1 does not count."""
    counts = truth >= 0
    return torch.bincount(truth[counts] * classes + found[counts], minlength=classes**2).view(classes, classes)


def scores_of(confusion: Tensor) -> dict[str, float]:
    """Mean IoU over the classes that occur in truth or answers, pixel accuracy, mean accuracy of the true classes."""
    right = confusion.diagonal().double()
    true, found = confusion.sum(1).double(), confusion.sum(0).double()
    if not true.sum():
        print("warning: no pixel of the masks of evaluate.data counts (evaluate.segmentation.ignore)", file=sys.stderr)
        return {"miou": 0.0, "pixel_accuracy": 0.0, "mean_accuracy": 0.0}
    union = true + found - right
    return {
        "miou": (right / union)[union > 0].mean().item(), "pixel_accuracy": (right.sum() / true.sum()).item(),
        "mean_accuracy": (right / true)[true > 0].mean().item(),
    }  # fmt: skip
