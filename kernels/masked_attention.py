"""Attention over packed sequences: block-diagonal, optionally causal. Nothing is padded, no N x N matrix is stored.

Letters in shapes: T tokens of all sequences laid end to end, S sequences, H heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, *, causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale Q K^T) V inside each sequence (Vaswani et al. 2017, section 3.2.1).

    q, k, v: [T, H, D], any strides with a contiguous last dimension. offsets: int32 [S + 1] on the host, from 0 to T;
    sequence s owns tokens offsets[s] to offsets[s + 1]. max_length: the longest sequence. scale: default D^-1/2.
    Returns [T, H, D].

    Neighbouring sequences of equal length become one batched call, so pack sequences sorted by length.
    Raises ValueError if the offsets do not cover the tokens.
    """
    if q.shape != k.shape or q.shape != v.shape or q.dim() != 3:
        raise ValueError(f"q, k, v must be [T, H, D] of one shape, not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if int(offsets[-1]) != q.shape[0]:
        raise ValueError(f"offsets end at {int(offsets[-1])}, but there are {q.shape[0]} tokens")
    parts = []
    for start, count, length in equal_length_runs(offsets):
        block = slice(start, start + count * length)
        qs, ks, vs = (x[block].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def equal_length_runs(offsets: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring sequences of equal length: a list of (first token, sequences, length)."""
    lengths, counts = torch.unique_consecutive(offsets.diff(), return_counts=True)
    starts = torch.cumsum(lengths.long() * counts, 0) - lengths * counts
    return [(s, c, n) for s, c, n in zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True) if n]


def reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """The readable form: one sequence at a time, the attention matrix written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]) * scale
        if causal:
            ahead = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(ahead, float("-inf"))
        out[start:stop] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[start:stop])
    return out
