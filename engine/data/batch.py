"""What leaves the loader."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RawBatch:
    """One rank's samples of one step, straight from the decoder: B samples, G global and N local crops, C context.

    Crops are uint8 RGB, channels last, neither flipped nor jittered.
    """

    global_crops: Tensor
    """uint8 [B, G, size, size, 3]"""
    local_crops: Tensor
    """uint8 [B, N, size, size, 3]; N may be 0"""
    tokens: Tensor
    """int64 [B, C]: start id, words, end id, zeros"""
    index: Tensor
    """int64 [B]: the sample's place in the data set"""

    def to(self, device: torch.device) -> RawBatch:
        """A copy on `device`; the same object where it already is there."""
        return RawBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
