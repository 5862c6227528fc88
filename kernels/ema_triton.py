"""Triton kernel of `ema_update_`: one launch for a whole flat shard.

Bytes per element that must move: read and write the fp32 average (8), read the source (4 or 2), write the copy (2 or
4). Nothing is read twice, so the memory bandwidth is the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

BLOCK = 4096
WARPS = 8
"""256 threads with 16 elements each: several 16-byte loads in flight per thread."""


@triton.jit
def _move(ema, source, copy, inside, weight, momentum, BLOCK: tl.constexpr):
    """One block. inside: bool [BLOCK], or None where the block is whole."""
    i = tl.arange(0, BLOCK)
    old = tl.load(ema + i, mask=inside)
    new = tl.load(source + i, mask=inside).to(tl.float32)
    # As torch.lerp: from the nearer end, so that both ends and a source equal to the average are met exactly.
    moved = tl.where(weight < 0.5, old + weight * (new - old), new - momentum * (new - old))
    tl.store(ema + i, moved, mask=inside)
    if copy is not None:
        tl.store(copy + i, moved.to(copy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def ema_kernel(ema, source, copy, n: tl.int64, weight, momentum, BLOCK: tl.constexpr):
    """ema [n] fp32 <- lerp(ema, source [n], weight); copy [n] <- ema, unless None. weight = 1 - momentum."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    ema += start
    source += start
    if copy is not None:
        copy += start
    # Only the last block is masked: a mask of unknown length would forbid wide loads everywhere.
    if start + BLOCK <= n:
        _move(ema, source, copy, None, weight, momentum, BLOCK)
    else:
        _move(ema, source, copy, tl.arange(0, BLOCK) < n - start, weight, momentum, BLOCK)


def update(ema: Tensor, source: Tensor, momentum: float, copy: Tensor | None) -> None:
    """See `ema_update_`. All contiguous, on one device, not empty."""
    n = ema.numel()
    with torch.cuda.device_of(ema):
        ema_kernel[(triton.cdiv(n, BLOCK),)](
            ema, source, copy, n, 1.0 - momentum, momentum, BLOCK=BLOCK, num_warps=WARPS
        )


def aot_cases() -> list[AotCase]:
    """Every pair of dtypes, and a shard at an odd address (no wide loads)."""
    names = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
    cases = [_case(f"ema.{s}.to.{c}", names[s], names.get(c), True) for s in names for c in ("none", *names)]
    return [*cases, _case("ema.fp32.to.bf16.unaligned", "*fp32", "*bf16", False)]


def _case(name: str, source: str, copy: str | None, aligned: bool) -> AotCase:
    pointers = {"ema": "*fp32", "source": source} | ({"copy": copy} if copy else {})
    return AotCase(
        name, ema_kernel, {**pointers, "n": "i64", "weight": "fp32", "momentum": "fp32"},
        {"BLOCK": BLOCK} | ({} if copy else {"copy": None}), tuple(pointers) if aligned else (), num_warps=WARPS,
        hot=aligned and source == "*fp32",  # the optimizer's master weights
    )  # fmt: skip
