"""`masked_attention` by Triton: which kernel takes which sequences, with what tiles. The kernels: `_attention_kernels`.

Short and long. A sequence whose keys fit one block (at most 256; fewer where wide heads or fp32 would not leave room,
see `TUNING`) is "short": one program per head reads keys and values once and walks over the queries. Its softmax needs
no rescaling, and its backward pass makes dq, dk and dv in one walk (five matrix products; two kernels need seven). A
longer sequence is cut into tiles of rows: online softmax forward, then one kernel for dq and delta and one for dk and
dv. No kernel uses atomics: gradients are the same bits in every run.

Launches. Short sequences are launched in classes of at most 32, 64, 128 and 256 keys, so that 37 and 50 tokens do not
pay for 256; a class of a few sequences joins the next, because a launch costs more than its padding. What each program
does stands in a table (first token, length, first row), so there are no programs without work, whatever the lengths.
The tables are made and copied to the device once per offsets tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _attention_kernels as kernels
from ._attention_layout import Layout
from .aot import AotCase

FEW = 64
"""A class with fewer sequences joins the next larger one."""
FULL = 512
"""Programs that fill a large GPU; a forward launch with fewer shares the queries of a sequence among several."""


class Tiles(NamedTuple):
    """How a kernel is launched: rows of its blocks of queries and of keys, warps, and stages of its load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Tiles of every kernel for one element size and head dimension; short ones by class, the keys of their block."""

    forward: dict[int, Tiles]
    forward_long: Tiles
    backward: dict[int, Tiles]
    dq: Tiles
    dkdv: Tiles
    backward_before_hopper: int = 256
    """The largest class of the one-walk backward pass on chips whose matrix units read their operands from registers:
    keys and values of a whole sequence do not fit there beside the sums for dk and dv."""

    def backward_classes(self, device: torch.device) -> dict[int, Tiles]:
        """The classes of the one-walk backward pass on this device."""
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10):
            return self.backward
        return {keys: tiles for keys, tiles in self.backward.items() if keys <= self.backward_before_hopper}


# Chosen by ahead-of-time compilation for sm_80, sm_90 and sm_100 (`bench/aot.py`) with Triton 3.6 and 3.9, not by
# timing: no spills for 16-bit elements, at most 99 KiB of shared memory on sm_80 so that sm_86 and sm_89 run the same,
# and at least one side of a product in blocks of 64, which Hopper's and Blackwell's matrix units need.
# Keys: (bytes of an element, padded head dimension).
_NARROW = {
    32: Tiles(32, 32, 4, 2),
    64: Tiles(32, 64, 4, 2),
    128: Tiles(32, 128, 8, 2),
    256: Tiles(32, 256, 8, 2),
}
_ONE_BLOCK = {
    32: Tiles(32, 32, 2, 1),
    64: Tiles(64, 64, 4, 1),
    128: Tiles(64, 128, 4, 1),
    256: Tiles(64, 256, 4, 1),
}
TUNING = {
    (2, 32): Tuning(
        forward=_ONE_BLOCK, forward_long=Tiles(128, 64, 8, 3),
        backward=_NARROW, dq=Tiles(128, 64, 8, 3), dkdv=Tiles(32, 128, 8, 2),
    ),
    (2, 64): Tuning(
        forward=_ONE_BLOCK, forward_long=Tiles(128, 64, 8, 3),
        backward=_NARROW, dq=Tiles(128, 64, 8, 2), dkdv=Tiles(32, 128, 8, 2), backward_before_hopper=128,
    ),
    (2, 128): Tuning(
        forward={32: Tiles(32, 32, 4, 1), 64: Tiles(64, 64, 4, 1), 128: Tiles(64, 128, 4, 1)},
        forward_long=Tiles(128, 64, 8, 2),
        backward={32: Tiles(32, 32, 4, 2), 64: Tiles(32, 64, 8, 2)},
        dq=Tiles(64, 64, 8, 2), dkdv=Tiles(32, 64, 8, 1),
    ),
    (4, 32): Tuning(
        forward={
            32: Tiles(32, 32, 4, 1), 64: Tiles(32, 64, 4, 1), 128: Tiles(16, 128, 8, 1), 256: Tiles(16, 256, 8, 1),
        },
        forward_long=Tiles(64, 32, 8, 2),
        backward={32: Tiles(16, 32, 8, 1), 64: Tiles(16, 64, 8, 1), 128: Tiles(16, 128, 8, 1)},
        dq=Tiles(32, 32, 8, 1), dkdv=Tiles(16, 32, 8, 1),
    ),
    (4, 64): Tuning(
        forward={32: Tiles(32, 32, 4, 1), 64: Tiles(16, 64, 8, 1), 128: Tiles(16, 128, 8, 1)},
        forward_long=Tiles(64, 32, 8, 2),
        backward={32: Tiles(16, 32, 8, 1), 64: Tiles(16, 64, 8, 1)},
        dq=Tiles(32, 32, 8, 1), dkdv=Tiles(16, 32, 8, 1),
    ),
    (4, 128): Tuning(
        forward={32: Tiles(32, 32, 8, 1)}, forward_long=Tiles(32, 32, 8, 1),
        backward={32: Tiles(16, 32, 8, 1)}, dq=Tiles(16, 32, 8, 1), dkdv=Tiles(16, 32, 8, 1),
    ),
}  # fmt: skip


def padded(width: int) -> int:
    """The head dimension as the kernels see it: a power of two from 16."""
    return max(16, 1 << (width - 1).bit_length())


def tuning_of(dtype: torch.dtype, width: int) -> Tuning:
    """The tiles for a dtype and head dimension."""
    return TUNING[dtype.itemsize, max(32, padded(width))]


class Plan(NamedTuple):
    """What is launched: tables int32 [programs, 3] on the device, short ones with their class, long ones by tile."""

    short: list[tuple[int, Tensor]]
    long: list[Tensor]


def plan(layout: Layout, classes: list[int], rows: tuple[int, ...], device: torch.device) -> Plan:
    """Tables for sequences of each class, and for the longer ones cut into tiles of each number of `rows`.

    Made once per layout; once per stream as well, because the copy to the device is awaited by its own stream alone.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return layout.once(("triton", *classes, rows, device, stream), lambda: _make_plan(layout, classes, rows, device))


def _make_plan(layout: Layout, classes: list[int], rows: tuple[int, ...], device: torch.device) -> Plan:
    groups = list(_groups(layout.lengths, classes))
    long = (layout.lengths > classes[-1]).nonzero().flatten()
    parts = [_table(layout, chosen, keys) for keys, chosen in groups]
    parts += [_table(layout, long, count) for count in rows] if len(long) else []
    tables = torch.cat(parts)
    if device.type == "cuda":
        tables = tables.pin_memory().to(device, non_blocking=True)
    split = list(tables.split([len(part) for part in parts]))
    return Plan([(keys, table) for (keys, _), table in zip(groups, split, strict=False)], split[len(groups) :])


def _groups(lengths: Tensor, classes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Short sequences by class: (keys, which sequences)."""
    smallest = torch.bucketize(lengths, torch.tensor(classes))
    smallest[lengths == 0] = len(classes)
    waiting = lengths.new_empty(0)
    counts = torch.bincount(smallest, minlength=len(classes)).tolist()
    for index, keys in enumerate(classes):
        chosen = torch.cat([waiting, (smallest == index).nonzero().flatten()])
        if len(chosen) < FEW and counts[index] and any(counts[index + 1 : len(classes)]):
            waiting = chosen
        elif counts[index]:
            yield keys, chosen
            waiting = chosen[:0]


def _table(layout: Layout, chosen: Tensor, rows: int) -> Tensor:
    """int32 [programs, 3] of the chosen sequences cut into tiles of `rows` rows: first token, length, first row."""
    starts, lengths = layout.starts[chosen], layout.lengths[chosen]
    counts = (lengths + rows - 1) // rows
    owner = torch.repeat_interleave(counts)
    tile = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    return torch.stack([starts[owner], lengths[owner], tile * rows], 1).int()


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and the base-2 log-sum-exp, fp32 [H, T], both contiguous.

    Arguments as `masked_attention`'s, checked; the last dimension of q, k, v is contiguous.
    """
    tokens, heads, width = q.shape
    tuning = tuning_of(q.dtype, width)
    launches = plan(layout, [*tuning.forward], (tuning.forward_long.queries,), q.device)
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    mask = _bytes(key_mask)
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
    with torch.cuda.device_of(q):
        for keys, table in launches.short:
            tiles = tuning.forward[keys]
            parts = min(math.ceil(keys / tiles.queries), math.ceil(FULL / (len(table) * heads)))
            kernels.forward_short[len(table), heads, parts](
                q, k, v, mask, out, lse, table, tokens, scale, *strides, **_options(tiles, width, causal)
            )
        for table in launches.long:
            kernels.forward_long[len(table), heads](
                q, k, v, mask, out, lse, table, tokens, scale, *strides, **_options(tuning.forward_long, width, causal)
            )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, key_mask: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv [T, H, D] from dout [T, H, D], with a contiguous last dimension, and what `forward` returned."""
    tokens, heads, width = q.shape
    tuning = tuning_of(q.dtype, width)
    classes = tuning.backward_classes(q.device)
    launches = plan(layout, [*classes], (tuning.dq.queries, tuning.dkdv.keys), q.device)
    dq, dk, dv = (torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device) for _ in range(3))
    mask = _bytes(key_mask)
    strides = [x.stride(i) for x in (q, k, v, dout) for i in (0, 1)]
    with torch.cuda.device_of(q):
        for keys, table in launches.short:
            kernels.backward_short[len(table), heads](
                q, k, v, mask, out, lse, dout, dq, dk, dv, table, tokens, scale, *strides,
                **_options(classes[keys], width, causal),
            )  # fmt: skip
        if launches.long:
            rows, columns = launches.long
            delta = torch.empty_like(lse)
            kernels.backward_long_dq[len(rows), heads](
                q, k, v, mask, out, lse, dout, dq, delta, rows, tokens, scale, *strides,
                **_options(tuning.dq, width, causal),
            )  # fmt: skip
            kernels.backward_long_dkdv[len(columns), heads](
                q, k, v, mask, lse, dout, delta, dk, dv, columns, tokens, scale, *strides,
                **_options(tuning.dkdv, width, causal),
            )  # fmt: skip
    return dq, dk, dv


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _options(tiles: Tiles, width: int, causal: bool) -> dict[str, Any]:
    """The constants of a launch and the compiler's knobs."""
    return {**_constants(tiles, width, causal), "num_warps": tiles.warps, "num_stages": tiles.stages}


def _constants(tiles: Tiles, width: int, causal: bool) -> dict[str, Any]:
    return dict(D=width, BLOCK_D=padded(width), QUERIES=tiles.queries, KEYS=tiles.keys, CAUSAL=causal)


def aot_cases() -> list[AotCase]:
    """Every entry of `TUNING`, and causal and masked forms of what a training step runs: 16 bit, D 32 and 64."""
    cases = []
    for (size, width), tuning in TUNING.items():
        for kernel, tiles in _launchable(tuning):
            # What needs Hopper may spill elsewhere, where it is not launched.
            everywhere = kernel != "backward_short" or tiles.keys <= tuning.backward_before_hopper
            hot = size == 2 and width <= 64 and everywhere
            cases.append(_aot_case(kernel, "bf16" if size == 2 else "fp32", width, tiles, hot=hot))
    text = [case for case in _launchable(TUNING[2, 64]) if case[1].keys <= 128 and "long" not in case[0]]
    cases += [_aot_case(kernel, "bf16", 64, tiles, causal=True) for kernel, tiles in text]
    vision = [("forward_short", _ONE_BLOCK[256]), ("backward_short", _NARROW[64])]
    cases += [_aot_case(kernel, "fp16", 64, tiles) for kernel, tiles in vision]
    return cases + [_aot_case(kernel, "bf16", 64, tiles, masked=True, hot=False) for kernel, tiles in vision]


def _launchable(tuning: Tuning) -> list[tuple[str, Tiles]]:
    long = {
        "forward_long": tuning.forward_long, "backward_long_dq": tuning.dq, "backward_long_dkdv": tuning.dkdv,
    }  # fmt: skip
    short = {"forward_short": tuning.forward, "backward_short": tuning.backward}
    return [(kernel, tiles) for kernel, classes in short.items() for tiles in classes.values()] + [*long.items()]


def _aot_case(
    kernel: str, dtype: str, width: int, tiles: Tiles, causal: bool = False, masked: bool = False, hot: bool = True
) -> AotCase:
    """A launch as `forward` and `backward` make it, for aligned tensors."""
    function = getattr(kernels, kernel)
    types = {"lse": "*fp32", "delta": "*fp32", "key_mask": "*u8", "tiles": "*i32", "tokens": "i32", "scale": "fp32"}
    constexprs = _constants(tiles, width, causal) | ({} if masked else {"key_mask": None})
    signature = {
        name: types.get(name, "i32" if name.endswith(("_t", "_h")) else f"*{dtype}")
        for name in function.arg_names
        if name not in constexprs
    }
    form = ("causal",) * causal + ("masked",) * masked
    return AotCase(
        name=".".join(("masked_attention", kernel, dtype, f"d{width}", f"k{tiles.keys}", *form)),
        kernel=function, signature=signature, constexprs=constexprs,
        divisible_by_16=tuple(name for name in signature if name not in ("tiles", "tokens", "scale")),
        num_warps=tiles.warps, num_stages=tiles.stages, hot=hot,
    )  # fmt: skip
