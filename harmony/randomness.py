"""Counter-based random numbers: every draw is a pure function of (seed, epoch, sample index, what for).

So a run does not depend on the number of workers or ranks, and resuming in the middle of an epoch is exact.
The generator is splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014),
evaluated at a counter instead of stepped. The data loader holds the same arithmetic in numba; a test compares them.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What a stream of random numbers is for. The numbers are part of the reproducibility contract: append only."""

    ORDER = 0
    CROP = 1
    AUGMENT = 2
    BLOCK_MASK = 3
    PIXEL_MASK = 4
    CAPTION_MASK = 5
    DROP_PATH = 6
    CAPTION_CUT = 7


def _signed(value: int) -> int:
    """The two's complement reading of an unsigned 64-bit number (torch has no uint64 arithmetic)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 bit patterns."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser on int64 bit patterns, any shape."""
    x = (x ^ _shift_right(x, 30)) * _signed(MIX1)
    x = (x ^ _shift_right(x, 27)) * _signed(MIX2)
    return x ^ _shift_right(x, 31)


def sample_keys(seed: int, epoch: int, index: Tensor, purpose: Purpose) -> Tensor:
    """One 64-bit key per sample: mix(mix(mix(mix(seed) + epoch) + index) + purpose).

    index: int64 [B], the sample's place in the data set. Returns int64 [B].
    """
    head = mix(mix(torch.tensor(_signed(seed), device=index.device)) + epoch)
    return mix(mix(head + index) + int(purpose))


def split(keys: Tensor, count: int) -> Tensor:
    """`count` new keys for each key (for example one per crop): int64 [...] -> int64 [..., count]."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    return mix(keys[..., None] + counter * _signed(GOLDEN))


def uniform(keys: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each key, 24 bits each: int64 [...] -> float32 [..., count]."""
    return _shift_right(split(keys, count), 40).to(torch.float32) * 2.0**-24
