"""Packing: the tokens of many sequences laid end to end, with offsets. Nothing is padded.

Letters in shapes: T packed tokens, S sequences, B samples, C context length, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each sequence lies in a pack: longest first (neighbours of equal length share one attention call)."""

    offsets: Tensor
    """int32 [S + 1], on the host: sequence s owns tokens offsets[s] to offsets[s + 1]"""
    max_length: int
    """Tokens of the longest sequence"""


def pack_dense(groups: list[Tensor]) -> tuple[Tensor, Layout]:
    """Groups of equal-length sequences, each [n, L, D], laid end to end in the given order: tokens [T, D], layout."""
    lengths = torch.cat([torch.full((g.shape[0],), g.shape[1], dtype=torch.int32) for g in groups])
    tokens = torch.cat([g.flatten(0, 1) for g in groups]) if len(groups) > 1 else groups[0].flatten(0, 1)
    return tokens, Layout(offsets_of(lengths), max(g.shape[1] for g in groups))


def unpack_dense(tokens: Tensor, groups: list[Tensor]) -> list[Tensor]:
    """The inverse of `pack_dense`: views of `tokens` [T, E] with the groups' shapes [n, L, E]."""
    sizes = [g.shape[0] * g.shape[1] for g in groups]
    return [t.unflatten(0, g.shape[:2]) for t, g in zip(tokens.split(sizes), groups, strict=True)]


def offsets_of(lengths: Tensor) -> Tensor:
    """int [S] -> int32 [S + 1]: running sum from 0."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)


def repeated(layout: Layout, times: int) -> Layout:
    """The same sequences several times, one copy behind the other."""
    lengths = layout.offsets.diff().repeat(times)
    return layout if times == 1 else Layout(offsets_of(lengths), layout.max_length)


@dataclass(frozen=True)
class CaptionLayout:
    """Where the captions of one view lie in a pack of their own."""

    layout: Layout
    """S = B sequences"""
    source: Tensor
    """int64 [T]: where each packed token comes from in the padded captions [B * C]"""
    position: Tensor
    """int64 [T]: its position in its caption"""
    first: Tensor
    """int64 [B]: packed place of each caption's first token"""
    last: Tensor
    """int64 [B]: packed place of each caption's end id"""


def lay_out_captions(lengths: Tensor, context: int, whole_context: bool = False) -> CaptionLayout:
    """Pack captions, longest first.

    lengths: int64 [B] on the host, up to and with the end id. whole_context packs the padding too (the authors' code
    averages the text center over it).
    """
    packed = torch.full_like(lengths, context) if whole_context else lengths
    order = packed.argsort(descending=True, stable=True)
    position = torch.arange(context)
    inside = position < packed[order][:, None]
    offsets = offsets_of(packed[order])
    first = torch.empty_like(order)
    first[order] = offsets[:-1].long()
    return CaptionLayout(
        layout=Layout(offsets, int(packed.max())),
        source=(order[:, None] * context + position)[inside],
        position=position.expand(len(order), -1)[inside],
        first=first,
        last=first + lengths - 1,
    )
