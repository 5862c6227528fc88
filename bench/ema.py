"""The EMA of a shard with its low-precision copy, against foreach and the measured copy bandwidth."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ema_update_
from ..kernels.ema import ema_reference
from .comparison import OURS, Comparison, Result

MOMENTUM = 0.996
PARAMETERS = 86_000_003
"""About a ViT-B; no multiple of a block."""
COPY = "copy of as many bytes (bandwidth)"


def comparisons(device: torch.device) -> list[Comparison]:
    """Sources in fp32 (the optimizer's masters) and bf16, copies in bf16."""
    n = PARAMETERS if device.type == "cuda" else 10_000_003
    return [_case(n, source, device) for source in (torch.float32, torch.bfloat16)]


def _case(n: int, source: torch.dtype, device: torch.device) -> Comparison:
    def inputs() -> tuple[Tensor, ...]:
        return (
            torch.randn(n, device=device), torch.randn(n, device=device).to(source),
            torch.full((n,), float("nan"), device=device, dtype=torch.bfloat16),
        )  # fmt: skip

    def exact(ema: Tensor, new: Tensor, copy: Tensor) -> tuple[Tensor, ...]:
        expected = ema_reference(ema, new, MOMENTUM)
        return expected, expected

    moved = n * (8 + source.itemsize + 2)
    buffers: list[Tensor] = []

    def copy_bytes(*_: Tensor) -> Result:
        """Read and write as many bytes as the operation does; computes nothing."""
        if not buffers:
            buffers.extend(torch.zeros(2, moved // 2, dtype=torch.uint8, device=device))
        buffers[1].copy_(buffers[0])
        return ()

    return Comparison(
        "ema", f"{n:,} parameters, {str(source)[6:]} source, bf16 copy", inputs,
        {OURS: _ours, "foreach lerp + copy": _foreach}, exact, tolerance=2.5e-3,
        bytes_moved=moved, yardsticks={COPY: copy_bytes},
    )  # fmt: skip


def _ours(ema: Tensor, source: Tensor, copy: Tensor) -> Result:
    ema_update_(ema, source, MOMENTUM, copy)
    return ema, copy


def _foreach(ema: Tensor, source: Tensor, copy: Tensor) -> Result:
    torch._foreach_lerp_([ema], [source.to(ema.dtype)], 1 - MOMENTUM)
    torch._foreach_copy_([copy], [ema])
    return ema, copy
