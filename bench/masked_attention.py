"""Packed attention, forward and backward, against dense SDPA by groups, varlen, xformers and FlexAttention."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import random
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import masked_attention
from ..kernels.dispatch import half_products
from ..kernels.masked_attention import reference
from .comparison import OURS, Comparison, Result, gradients

IMAGE_VIEWS = {197: 3, 50: 2, 37: 8}
"""Sequences of each length that one sample puts into the student's image pass."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def comparisons(device: torch.device) -> list[Comparison]:
    """The design's mix, each of its lengths alone, captions, long sequences; a small part of it on a CPU."""
    captions = random.Random(0)
    if device.type != "cuda":
        mix = _mix(4)
        text = sorted((captions.randint(8, 77) for _ in range(64)), reverse=True)
        cases = []
        for dtype in (torch.float32, torch.bfloat16) if half_products(torch.bfloat16) else (torch.float32,):
            named = "" if dtype == torch.float32 else ", bf16"
            cases.append(_case(f"mix of 4 samples, 6 heads x 64{named}", mix, 6, dtype, device))
            cases.append(_case(f"64 captions, causal, 8 heads x 64{named}", text, 8, dtype, device, causal=True))
        return cases
    text = sorted((captions.randint(8, 77) for _ in range(2048)), reverse=True)
    cases = [_case("ViT-B, mix of 96 samples", _mix(96), 12, torch.bfloat16, device, flex=True)]
    for length, count in ((197, 480), (50, 1920), (37, 2560), (1024, 96), (4096, 24)):
        cases.append(_case(f"{count} x {length}", [length] * count, 12, torch.bfloat16, device))
    cases.append(_case("2,048 captions, causal", text, 8, torch.bfloat16, device, causal=True, flex=True))
    return cases


def _mix(samples: int) -> list[int]:
    """Lengths as the model packs them: sorted, longest first."""
    return [length for length, count in IMAGE_VIEWS.items() for _ in range(count * samples)]


def _case(
    name: str, lengths: list[int], heads: int, dtype: torch.dtype, device: torch.device, *, causal: bool = False,
    flex: bool = False,
) -> Comparison:  # fmt: skip
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, longest = int(offsets[-1]), max(lengths)

    def inputs() -> tuple[Tensor, ...]:
        # Slices of one projection, as in the model; the gradient comes contiguous.
        qkv = torch.randn(tokens, 3, heads, 64, device=device).to(dtype)
        return *(x.requires_grad_() for x in qkv.detach().unbind(1)), torch.randn_like(qkv[:, 0])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, offsets, longest, causal=causal)

    def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        # One sequence at a time: those of 4,096 take 8 GiB each.
        found = []
        for parts in zip(*(x.detach().split(lengths) for x in (q, k, v, grad)), strict=True):
            q, k, v, of = (x.double() for x in parts)
            leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
            alone = offsets.new_tensor([0, len(of)])
            found.append(gradients(reference(*leaves, alone, causal=causal), *leaves, of=of))
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))

    makers = {"dense SDPA per group": _dense_groups}
    if device.type == "cuda":
        makers |= {"varlen_attn": _varlen, "xformers": _xformers} | ({"FlexAttention": _flex} if flex else {})
    else:
        makers |= {"pad and mask": _padded, "loop over sequences": _loop}
    missing = {}
    if "xformers" in makers and not importlib.util.find_spec("xformers"):
        missing["xformers"] = "not installed (pip install xformers)"
        del makers["xformers"]
    tables = (offsets, longest, causal, device)
    rivals = {OURS: ours} | {name: _Lazily(functools.partial(make, *tables)) for name, make in makers.items()}
    return Comparison(
        "masked_attention", name, inputs,
        {n: functools.partial(_forward_backward, f) for n, f in rivals.items()}, exact,
        tolerance=1e-5 if dtype == torch.float32 else 1.5e-2,
        unavailable=missing,
    )  # fmt: skip


def _forward_backward(attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Result:
    return gradients(attention(q, k, v), q, k, v, of=grad)


class _Lazily:
    """An attention with tables that are made once, at the first call (and fail there, where failures are caught)."""

    def __init__(self, make: Callable[[], Attention]) -> None:
        self._make = make
        self._made: Attention | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Make, then attend."""
        self._made = self._made or self._make()
        return self._made(q, k, v)


def _dense_groups(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    """What is easy to write: sequences of one length are a batch for SDPA."""
    lengths, counts = torch.unique_consecutive(offsets.diff(), return_counts=True)
    sizes = list(zip(counts.tolist(), lengths.tolist(), strict=True))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = zip(*(x.split([c * n for c, n in sizes]) for x in (q, k, v)), strict=True)
        parts = []
        for size, group in zip(sizes, groups, strict=True):
            q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in group)
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)

    return attend


def _varlen(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # torch 2.10 had is_causal, later ones a window
    options = {} if not causal else {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    ends = offsets.to(device)
    # A tuple comes where more than the output is asked for.
    return lambda q, k, v: cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, **options))


def _xformers(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(offsets.diff().tolist(), device=device)
    mask = mask.make_causal() if causal else mask
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], mask)[0]


def _flex(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = int(offsets[-1])
    document = torch.repeat_interleave(offsets.diff().long()).to(device)

    def same_document(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & ((i >= j) | (not causal))

    mask = create_block_mask(same_document, None, None, tokens, tokens, device=device, _compile=True)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return attend


def _padded(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    lengths = offsets.diff().long()
    inside = torch.arange(longest) < lengths[:, None]
    allowed = inside[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(longest, longest, dtype=torch.bool).tril()

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(lengths), longest, *x.shape[1:])
        padded[inside] = x
        return padded.transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (pad(x) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)[inside]

    return attend


def _loop(offsets: Tensor, longest: int, causal: bool, device: torch.device) -> Attention:
    lengths = offsets.diff().tolist()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sequences = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
        parts = [F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0] for q, k, v in sequences]
        return torch.cat([part.transpose(0, 1) for part in parts])

    return attend
