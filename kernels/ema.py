"""The exponential moving average of a flat parameter shard, with its low-precision copy."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_update_(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None = None) -> None:
    """ema <- momentum ema + (1 - momentum) source, in place; then copy <- ema, rounded to its dtype.

    ema: fp32 (or fp64) [n]; source: [n], any float dtype; copy: [n], any float dtype, or None.
    fp32 because at momentum 0.996 and above a bf16 average would round the update away.
    Raises ValueError if the lengths differ or ema is not fp32 or fp64.
    """
    if ema.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"ema must be float32 or float64, not {ema.dtype}")
    if ema.shape != source.shape or (copy is not None and copy.shape != ema.shape):
        raise ValueError(f"ema, source and copy must have one shape, not {[*ema.shape]} and {[*source.shape]}")
    ema.lerp_(source.to(ema.dtype), 1 - momentum)
    if copy is not None:
        copy.copy_(ema)
