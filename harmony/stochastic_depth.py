"""Stochastic depth (Huang et al. 2016) on packed tokens: the work of a dropped residual branch is not done.

Letters in shapes: S sequences, T packed tokens, T' those of the kept sequences, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Layout, offsets_of
from .randomness import uniform


class Kept(NamedTuple):
    """The sequences that a residual branch is computed for."""

    places: Tensor
    """int64 [T']: packed places of their tokens"""
    layout: Layout
    """Of those tokens by themselves"""
    scale: float
    """What the branch is multiplied with, 1 / (1 - rate), so that its expectation stays"""


BranchesKept = tuple[Kept | None, Kept | None]
"""Of the two residual branches of a block; None: all sequences"""


def draw_kept(keys: Tensor, layout: Layout, rate: float, depth: int, device: torch.device) -> list[BranchesKept]:
    """Draw, for each of `depth` blocks, the sequences that its two branches are computed for.

    keys: int64 [S] on the host, one per sequence: a draw depends on its sequence's key alone. rate: probability of
    being dropped in the last block, growing linearly from 0 at the first. Nothing waits for `device`.
    """
    u = uniform(keys, 2 * depth).unflatten(-1, (depth, 2))
    rates = [rate * i / max(depth - 1, 1) for i in range(depth)]
    return [(_kept(u[:, i, 0], layout, r, device), _kept(u[:, i, 1], layout, r, device)) for i, r in enumerate(rates)]


def _kept(u: Tensor, layout: Layout, rate: float, device: torch.device) -> Kept | None:
    """u: uniform draws [S]. If no sequence is kept, the first one is computed and multiplied with 0, so that the
    branch's parameters have a gradient in every step."""
    if not rate:
        return None
    rows = (u >= rate).nonzero().squeeze(1)
    scale = 1 / (1 - rate) if len(rows) else 0.0
    rows = rows if len(rows) else torch.zeros(1, dtype=torch.int64)
    lengths = layout.offsets.diff()[rows]
    offsets = offsets_of(lengths)
    # Token t of the kept ones lies at t + shift of its sequence; only S' numbers travel to the device.
    shift, repeats = torch.stack([layout.offsets[rows] - offsets[:-1], lengths]).long().to(device, non_blocking=True)
    tokens = int(offsets[-1])
    index = torch.arange(tokens, device=device) + torch.repeat_interleave(shift, repeats, output_size=tokens)
    return Kept(index, Layout(offsets, int(lengths.max())), scale)


def add_branch(x: Tensor, branch: Callable[[Tensor, Layout], Tensor], layout: Layout, kept: Kept | None) -> Tensor:
    """x + branch(x), the branch computed for the kept sequences alone: [T, D] -> [T, D]."""
    if kept is None:
        return x + branch(x, layout)
    part = branch(x.index_select(0, kept.places), kept.layout)
    return x.index_add(0, kept.places, part.to(x.dtype), alpha=kept.scale)
