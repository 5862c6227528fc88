"""From decoded crops to the views of the micro-batches of one optimizer step."""

from __future__ import annotations

import torch

from ...harmony.randomness import Purpose, sample_keys
from ...harmony.schedules import Clock
from ...harmony.views import Views, assemble, draw_masks, pixel_ratio
from ..config import RunConfig
from .augment import Augment
from .batch import RawBatch


class StepViews:
    """The micro-batches of a step: `views[k]` augments on `device` and puts the masks, drawn once, beside the crops.

    The same for the same (seed, epoch, samples), each time it is asked for. len() micro-batches of equal size.
    """

    def __init__(
        self, config: RunConfig, batch: RawBatch, clock: Clock, device: torch.device | str = "cpu", parts: int = 1
    ) -> None:
        """parts: how many micro-batches; must divide the samples."""
        self._config, self._batch, self._device, self._parts = config, batch, torch.device(device), parts
        # On the host, so that nothing waits for a GPU.
        self._keys = sample_keys(config.seed, clock.epoch, batch.index, Purpose.AUGMENT)
        self._masks = draw_masks(
            config.views, config.model.image.patch_size, batch.tokens, batch.index, config.seed, clock.epoch,
            pixel_ratio(config.views, clock),
        )  # fmt: skip
        self._masked_words = float(self._masks.caption_mask.sum()) / parts
        self._augment = Augment(config.data.augment)

    def __len__(self) -> int:
        return self._parts

    def __getitem__(self, k: int) -> Views:
        """Raises IndexError after the last one."""
        if not 0 <= k < self._parts:
            raise IndexError(k)
        size = len(self._batch.index) // self._parts
        part = slice(k * size, (k + 1) * size)
        crops = (self._batch.global_crops[part], self._batch.local_crops[part])
        large, small = (c.to(self._device, non_blocking=True) for c in crops)
        keys = self._keys[part]
        return assemble(
            self._augment(large, keys, "global").transpose(0, 1),
            self._augment(small, keys, "local").transpose(0, 1),
            self._masks.micro_batch(part),
            self._masked_words,
        ).to(self._device)
