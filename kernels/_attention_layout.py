"""What the offsets of a pack say about attention: read and checked once per offsets tensor, then remembered.

A model calls attention once per layer and direction with the same offsets. Reading them on the host, and copying
tables made from them to the device, would each cost a synchronisation; here both happen in the first call only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")


class Layout:
    """The sequences of a pack: starts and lengths int64 [S] on the host, and what backends keep about them.

    longest: tokens of the longest. weights: numbers in the attention matrices of one head, all sequences together.
    """

    def __init__(self, offsets: Tensor) -> None:
        """Raises ValueError if the offsets do not start at 0, or decrease, or hold no token."""
        self.offsets = offsets.detach().cpu().clone()
        self.version = _version(offsets)
        host = self.offsets.long()
        self.lengths = host.diff()
        self.starts = host[:-1]
        if int(host[0]) != 0:
            raise ValueError(f"offsets must start at 0, not at {int(host[0])}")
        if int(self.lengths.min()) < 0:
            at = int((self.lengths < 0).nonzero()[0])
            raise ValueError(f"offsets must be increasing, but {int(host[at])} comes before {int(host[at + 1])}")
        self.tokens = int(host[-1])
        self.longest = int(self.lengths.max())
        self.weights = int(self.lengths.square().sum())
        self._made: dict[object, Any] = {}

    def holds_for(self, offsets: Tensor) -> bool:
        """Whether the offsets are still what was read. On a device their version tells, without a synchronisation."""
        if offsets.device.type == "cpu":
            return torch.equal(self.offsets, offsets)
        return self.version == _version(offsets)

    def check(self, tokens: int, max_length: int) -> None:
        """Raises ValueError if this is not the layout of `tokens` tokens, or `max_length` not its longest sequence."""
        if self.tokens != tokens:
            raise ValueError(f"offsets end at {self.tokens}, but there are {tokens} tokens")
        if self.longest != max_length:
            raise ValueError(f"max_length is {max_length}, but the longest sequence in offsets has {self.longest}")

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbouring sequences of equal length: a list of (first token, sequences, length)."""
        lengths, counts = torch.unique_consecutive(self.lengths[self.lengths > 0], return_counts=True)
        starts = torch.cumsum(lengths * counts, 0) - lengths * counts
        return list(zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True))

    def once(self, key: object, make: Callable[[], Made]) -> Made:
        """`make()`, remembered under `key` for as long as the offsets live."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def layout_of(offsets: Tensor, tokens: int, max_length: int) -> Layout:
    """The layout of int32 offsets [S + 1], on any device; read anew only if the tensor was changed in place.

    Raises ValueError if the offsets are no layout of `tokens` tokens whose longest sequence has `max_length`.
    """
    layout = _layouts.get(offsets)
    if layout is None or not layout.holds_for(offsets):
        layout = _layouts[offsets] = Layout(offsets)
    layout.check(tokens, max_length)
    return layout


def _version(offsets: Tensor) -> int:
    """Counts in-place changes; inference tensors have no such count."""
    return 0 if offsets.is_inference() else offsets._version
