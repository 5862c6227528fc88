"""The exponential moving average of a flat parameter shard, with its low-precision copy, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose

_CHUNK = {"cpu": 2**18}
"""Elements per step of the torch backend, by device type: on a CPU what a core's cache holds."""
_LARGE_CHUNK = 2**24


def ema_update_(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None = None) -> None:
    """ema <- momentum ema + (1 - momentum) source, in place; then copy <- ema, rounded to nearest even.

    The teacher of DINO (Caron et al. 2021, section 3.1) and of Harmony (section 3). Computed in ema's precision as
    ema + (1 - momentum) (source - ema), from the nearer end, like torch.lerp. fp32 at least, because at momentum
    0.996 and above a bf16 average would round the update away.

    ema: fp32 or fp64, any shape and strides (a shard is flat: [n]), also empty. source, copy: that shape and device,
    any float dtype. momentum: 0 to 1; a new value compiles nothing. No gradient flows.
    Triton takes contiguous fp32 averages with fp32, fp16 and bf16 sources and copies, at any address, of any length;
    torch takes the rest. source or copy may be ema itself; if they overlap it otherwise, the result is undefined.
    Raises ValueError for another shape, dtype or device, or a momentum outside [0, 1].
    """
    _check(ema, source, momentum, copy)
    with torch.no_grad():
        _update(ema, source, float(momentum), copy)


def ema_reference(ema: Tensor, source: Tensor, momentum: float) -> Tensor:
    """The new average by its definition, in fp64."""
    return momentum * ema.double() + (1 - momentum) * source.double()


def obstacles(ema: Tensor, source: Tensor, copy: Tensor | None) -> dict[str, str]:
    """Why Triton cannot take these arguments; empty if it can."""
    named = {"ema": ema, "source": source} | ({} if copy is None else {"copy": copy})
    for name, x in named.items():
        if not x.is_contiguous():
            return {"triton": f"{name} is not contiguous"}
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return {"triton": f"{name} is {str(x.dtype)[6:]}"}
    return {}


@torch.library.custom_op("harmony_fast::ema_update_", mutates_args=("ema", "copy"))
def _update(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None) -> None:
    backend = choose("ema", ema, obstacles(ema, source, copy)).backend
    if ema.numel() == 0:
        return
    if backend == "triton":
        from .ema_triton import update

        update(ema, source, momentum, copy)
    else:
        _update_in_torch(ema, source, momentum, copy)


@_update.register_fake
def _update_fake(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None) -> None:
    pass


def _update_in_torch(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None) -> None:
    """In chunks along the first dimension: a source of another dtype is converted piece by piece, and the copy is
    taken while the piece is still in the cache."""
    ema, source = torch.atleast_1d(ema, source)
    rows = max(1, _CHUNK.get(ema.device.type, _LARGE_CHUNK) * len(ema) // ema.numel())
    copies = [None] * -(-len(ema) // rows) if copy is None else torch.atleast_1d(copy).split(rows)
    for average, new, low in zip(ema.split(rows), source.split(rows), copies, strict=True):
        average.lerp_(new.to(average.dtype), 1 - momentum)
        if low is not None:
            low.copy_(average)


def _check(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None) -> None:
    if ema.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"ema must be float32 or float64, not {ema.dtype}")
    for name, x in (("source", source), ("copy", copy)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} must have a float dtype, not {x.dtype}")
        if x.shape != ema.shape:
            raise ValueError(f"{name} must have ema's shape {[*ema.shape]}, not {[*x.shape]}")
        if x.device != ema.device:
            raise ValueError(f"{name} must be on ema's device {ema.device}, not {x.device}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], not {momentum}")
