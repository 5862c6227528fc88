"""From decoded crops to the views of the micro-batches of one optimizer step."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

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
        if self._device.type != "cuda":
            return self._make(part)
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(side):
            views = self._make(part)
        current.wait_stream(side)
        for tensor in (getattr(views, field.name) for field in fields(views)):
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory is not given away before the step has read it
        return views

    def _make(self, part: slice) -> Views:
        raw = (self._batch.global_crops[part], self._batch.local_crops[part])
        views = assemble(*raw, self._masks.micro_batch(part), self._masked_words).to(self._device)
        return replace(
            views,
            global_crops=self._augment(views.global_crops, self._keys[part], "global").transpose(0, 1),
            local_crops=self._augment(views.local_crops, self._keys[part], "local").transpose(0, 1),
        )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where crops are copied and augmented while the GPU still computes the micro-batch before."""
    return torch.cuda.Stream(device)
