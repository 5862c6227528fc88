"""From decoded crops to the views of a micro-batch."""

from __future__ import annotations

import torch

from ...harmony.randomness import Purpose, sample_keys
from ...harmony.views import Views, draw_views
from ..config import RunConfig
from .augment import Augment
from .batch import RawBatch


def make_views(config: RunConfig, batch: RawBatch, epoch: int, device: torch.device | str = "cpu") -> Views:
    """Augment on `device` and draw the masks; the same for the same (seed, epoch, samples)."""
    keys = sample_keys(config.seed, epoch, batch.index, Purpose.AUGMENT)  # on the host, so that nothing waits for a GPU
    crops = batch.to(torch.device(device))
    augment = Augment(config.data.augment)
    return draw_views(
        config.views, config.model.image.patch_size,
        augment(crops.global_crops, keys, "global").transpose(0, 1),
        augment(crops.local_crops, keys, "local").transpose(0, 1),
        batch.tokens, batch.index, config.seed, epoch,
    ).to(torch.device(device))  # fmt: skip
