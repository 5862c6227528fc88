"""Triton kernels for softmaxes over inner products: statistics of rows, and tiles of the gradient of logits.

Shared by the contrastive and the prototype loss. For rows x_m, columns y_n and, as targets, labels and/or teachers:

    z_mn = z_factor * scale * <x_m, y_n>                t_mn = t_factor * (<x'_m, y'_n> - center_n)

`statistics_kernel` walks over the columns once and keeps, for each row, logsumexp z, the label's z, logsumexp t, and
sum_n softmax(t)_n z_n, the last three online like the first (Milakov and Gimelshein 2018). `gradient_kernel` makes a
tile of logits again and writes the gradient with respect to them.

All matrices are contiguous; products accumulate in fp32. fp32 vectors are multiplied in full fp32 ("ieee"), or as
TF32 where torch.backends.cuda.matmul.allow_tf32 lets torch do so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

FAR_BELOW = tl.constexpr(-1.0e30)  # stands for -inf where it meets a factor of 0
LOG2_E = tl.constexpr(1.4426950408889634)  # the kernels count in powers of 2, which the hardware has
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def inner_products(
    x, y, x_rows, y_rows, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """<x_m, y_n> in fp32, [BM, BN]. x, y point to a first row; places beyond the last row repeat it."""
    m = tl.minimum(tl.arange(0, BM), x_rows - 1)
    n = tl.minimum(tl.arange(0, BN), y_rows - 1)
    k = tl.arange(0, BK)
    products = tl.zeros([BM, BN], tl.float32)
    for start in range(0, WIDTH, BK):
        x_block = x + m[:, None] * WIDTH + (start + k)[None, :]
        y_block = y + n[None, :] * WIDTH + (start + k)[:, None]
        if WIDTH % BK == 0:
            a, b = tl.load(x_block), tl.load(y_block)
        else:
            a = tl.load(x_block, mask=(start + k)[None, :] < WIDTH, other=0.0)
            b = tl.load(y_block, mask=(start + k)[:, None] < WIDTH, other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["rows", "columns", "steps", "offset"])
def statistics_kernel(
    x0, x1, y0, y1, tx0, tx1, ty0, ty1, scale, center, partial, rows, columns, steps, offset, z_factor, t_factor,
    LABELS: tl.constexpr, WIDTH: tl.constexpr, TEACHER_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TEACHER_BK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, split of the columns, direction) -> partial[direction, split, 4, rows].

    The directions' vectors: x0 against y0, x1 against y1. A split has `steps` tiles of columns. The four: logsumexp
    z, the label's z (0 if in another split), logsumexp t, mean of z under softmax(t).
    """
    first = tl.program_id(0) * BM
    split = tl.program_id(1)
    direction = tl.program_id(2)
    x, y = x0, y0
    if direction == 1:
        x, y = x1, y1
    x += first.to(tl.int64) * WIDTH
    if tx0 is not None:
        tx, ty = tx0, ty0
        if direction == 1:
            tx, ty = tx1, ty1
        tx += first.to(tl.int64) * TEACHER_WIDTH
    if scale is not None:
        z_factor *= tl.load(scale)
    z_factor *= LOG2_E
    t_factor *= LOG2_E
    m = first + tl.arange(0, BM)
    z_max = tl.full([BM], FAR_BELOW, tl.float32)
    z_sum = tl.zeros([BM], tl.float32)
    label = tl.zeros([BM], tl.float32)
    t_max = tl.full([BM], FAR_BELOW, tl.float32)
    t_sum = tl.zeros([BM], tl.float32)
    tz_sum = tl.zeros([BM], tl.float32)
    stop = tl.minimum((split + 1) * steps * BN, columns)
    for start in range(split * steps * BN, stop, BN):
        n = start + tl.arange(0, BN)
        base = tl.cast(start, tl.int64)
        z = inner_products(x, y + base * WIDTH, rows - first, columns - start, WIDTH, PRECISION, BM, BN, BK)
        z = tl.where((n < columns)[None, :], z * z_factor, FAR_BELOW)
        # Few tiles meet the diagonal: the others need not look for it.
        if LABELS and (start < first + offset + BM) & (start + BN > first + offset):
            label += tl.sum(tl.where(n[None, :] == (m + offset)[:, None], z, 0.0), 1)
        top = tl.maximum(z_max, tl.max(z, 1))
        z_sum = z_sum * tl.exp2(z_max - top) + tl.sum(tl.exp2(z - top[:, None]), 1)
        z_max = top
        if tx0 is not None:
            t = inner_products(
                tx, ty + base * TEACHER_WIDTH, rows - first, columns - start, TEACHER_WIDTH, PRECISION, BM, BN,
                TEACHER_BK,
            )  # fmt: skip
            if center is not None:
                t -= tl.load(center + n, mask=n < columns, other=0.0)[None, :]
            t = tl.where((n < columns)[None, :], t * t_factor, FAR_BELOW)
            top = tl.maximum(t_max, tl.max(t, 1))
            shrink = tl.exp2(t_max - top)
            q = tl.exp2(t - top[:, None])
            t_sum = t_sum * shrink + tl.sum(q, 1)
            tz_sum = tz_sum * shrink + tl.sum(q * z, 1)
            t_max = top
    out = partial + (direction * tl.num_programs(1) + split).to(tl.int64) * 4 * rows + m
    tl.store(out, (z_max + tl.log2(z_sum)) * LN_2, mask=m < rows)
    if LABELS:
        tl.store(out + rows, label * LN_2, mask=m < rows)
    if tx0 is not None:
        tl.store(out + 2 * rows, (t_max + tl.log2(t_sum)) * LN_2, mask=m < rows)
        tl.store(out + 3 * rows, tz_sum / t_sum * LN_2, mask=m < rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    partial, lse, teacher_lse, losses, row_weight, rows, splits, factor, LABELS: tl.constexpr, BLOCK: tl.constexpr
):
    """Join the splits: program (block of rows, direction) -> lse, teacher_lse [directions, rows].

    losses: [terms, directions, rows], factor * row_weight * (logsumexp z - label's z), and with the teacher's mean.
    """
    direction = tl.program_id(1)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = r < rows
    z_lse = tl.full([BLOCK], FAR_BELOW, tl.float32)
    label = tl.zeros([BLOCK], tl.float32)
    t_lse = tl.full([BLOCK], FAR_BELOW, tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        part = partial + tl.cast(direction * splits + split, tl.int64) * 4 * rows + r
        z_part = tl.load(part, mask=valid, other=0.0)
        top = tl.maximum(z_lse, z_part)
        z_lse = top + tl.log(tl.exp(z_lse - top) + tl.exp(z_part - top))
        if LABELS:
            label += tl.load(part + rows, mask=valid, other=0.0)
        if teacher_lse is not None:
            t_part = tl.load(part + 2 * rows, mask=valid, other=0.0)
            top = tl.maximum(t_lse, t_part)
            before, new = tl.exp(t_lse - top), tl.exp(t_part - top)
            mean = (mean * before + tl.load(part + 3 * rows, mask=valid, other=0.0) * new) / (before + new)
            t_lse = top + tl.log(before + new)
    weight = factor
    if row_weight is not None:
        weight *= tl.load(row_weight + r, mask=valid, other=0.0)
    out = direction * rows + r
    tl.store(lse + out, z_lse, mask=valid)
    if LABELS:
        tl.store(losses + out, weight * (z_lse - label), mask=valid)
    if teacher_lse is not None:
        tl.store(teacher_lse + out, t_lse, mask=valid)
        soft = losses + (tl.num_programs(1) * rows if LABELS else 0)
        tl.store(soft + out, weight * (z_lse - mean), mask=valid)


@triton.jit
def log2_sums(lse, index, limit):
    """Logarithms of sums of exponentials, in powers of 2."""
    return tl.load(lse + index, mask=index < limit, other=float("inf")) * LOG2_E


@triton.jit(do_not_specialize=["rows", "shift"])
def gradient_kernel(
    x, y, tx, ty, scale, center, lse, teacher_lse, column_lse, teacher_column_lse, shares, row_weight, out, rows,
    columns, shift, z_factor, t_factor, magnify, LABELS: tl.constexpr, WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TEACHER_BK: tl.constexpr,
):  # fmt: skip
    """out[m, n] = magnify * row_weight_m * ((hard + soft) p_mn - hard * (n == m + shift) - soft q_mn).

    p and q are the softmaxes of z and t; with column_lse, the sum of the softmaxes along rows and along columns (and
    the label counts twice). shares: hard and soft; None: 0 and 1. All pointers at the tile's first row or column.
    """
    first, start = tl.program_id(0) * BM, tl.program_id(1) * BN
    m, n = first + tl.arange(0, BM), start + tl.arange(0, BN)
    x += first.to(tl.int64) * WIDTH
    y += start.to(tl.int64) * WIDTH
    hard, soft = 0.0, 1.0
    if shares is not None:
        hard, soft = tl.load(shares), 0.0
        if tx is not None:
            soft = tl.load(shares + 1)
    if scale is not None:
        z_factor *= tl.load(scale)
    z_factor *= LOG2_E
    t_factor *= LOG2_E
    z = z_factor * inner_products(x, y, rows - first, columns - start, WIDTH, PRECISION, BM, BN, BK)
    d = tl.exp2(z - log2_sums(lse, m, rows)[:, None])
    if column_lse is not None:
        d += tl.exp2(z - log2_sums(column_lse, n, columns)[None, :])
    d *= hard + soft
    if LABELS:
        if column_lse is not None:
            hard *= 2
        d -= tl.where(n[None, :] == (m + shift)[:, None], hard, 0.0)
    if tx is not None:
        tx += first.to(tl.int64) * TEACHER_WIDTH
        ty += start.to(tl.int64) * TEACHER_WIDTH
        t = inner_products(tx, ty, rows - first, columns - start, TEACHER_WIDTH, PRECISION, BM, BN, TEACHER_BK)
        if center is not None:
            t -= tl.load(center + n, mask=n < columns, other=0.0)[None, :]
        t *= t_factor
        q = tl.exp2(t - log2_sums(teacher_lse, m, rows)[:, None])
        if column_lse is not None:
            q += tl.exp2(t - log2_sums(teacher_column_lse, n, columns)[None, :])
        d -= soft * q
    if row_weight is not None:
        d *= tl.load(row_weight + m, mask=m < rows, other=0.0)[:, None]
    place = out + m[:, None] * columns + n[None, :]
    d = (magnify * d).to(out.dtype.element_ty)
    tl.store(place, d, mask=(m < rows)[:, None] & (n < columns)[None, :])


COMBINED = 256
"""Rows of a program that joins splits."""


class Tiles(NamedTuple):
    """How a kernel is cut and launched: rows, columns and depth of a block, warps, stages of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def depth_for(self, width: int) -> int:
        """The depth of a block for vectors of this width; a tensor core needs 16."""
        return max(16, min(self.depth, triton.next_power_of_2(width)))


# By whether the vectors are fp32, and whether a teacher doubles what a thread must keep. None spills on sm_80, 90, 100,
# none needs more than 96 KiB of shared memory.
TILES = {
    (False, False): Tiles(128, 128, 64, 8, 3),
    (False, True): Tiles(128, 64, 64, 8, 3),
    (True, False): Tiles(128, 128, 16, 8, 3),
    (True, True): Tiles(128, 64, 16, 8, 3),
}


def tiles_for(x: Tensor, teacher: Tensor | None = None) -> Tiles:
    """The tiles for vectors like x and teachers like `teacher`."""
    full = torch.float32 in (x.dtype, None if teacher is None else teacher.dtype)
    return TILES[full, teacher is not None]


def precision() -> str:
    """How fp32 vectors are multiplied: as torch would."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def split(blocks: int, steps: int, x: Tensor) -> tuple[int, int]:
    """(splits, steps per split): `blocks` programs of `steps` each, split up so that the processors have work."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    per_split = math.ceil(steps / max(1, min(steps, 2 * processors // blocks)))
    return math.ceil(steps / per_split), per_split


_INTEGERS = ("rows", "columns", "steps", "offset", "shift", "splits")
_NUMBERS = ("z_factor", "t_factor", "magnify", "factor")
_VECTORS = ("x", "y", "x0", "x1", "y0", "y1", "out")
_TEACHERS = ("tx", "ty", "tx0", "tx1", "ty0", "ty1")
_TEACHER_STATISTICS = ("teacher_lse", "teacher_column_lse")


def aot_case(
    name: str, kernel: triton.JITFunction, dtype: str, width: int, *, teacher: str | None = None,
    labels: bool = True, absent: tuple[str, ...] = (), divisible: tuple[str, ...] = (),
) -> AotCase:  # fmt: skip
    """The compilation of a kernel whose arguments are named as here, for vectors of these dtypes ("bf16", "fp32").

    teacher: the teachers' dtype; None: there are none. absent: other arguments that are None in this use.
    divisible: integers that are multiples of 16, beside all pointers.
    """
    tiles = TILES["fp32" in (dtype, teacher), teacher is not None]
    depth = tiles.depth_for(width)
    constants = {
        "LABELS": labels, "WIDTH": width, "TEACHER_WIDTH": width, "PRECISION": "ieee", "BM": tiles.rows,
        "BN": tiles.columns, "BK": depth, "TEACHER_BK": depth, "BLOCK": COMBINED,
    }  # fmt: skip
    gone = absent if teacher else (*absent, *_TEACHERS, *_TEACHER_STATISTICS)
    signature = {}
    for argument in kernel.arg_names:
        if argument in _INTEGERS or argument in _NUMBERS:
            signature[argument] = "i32" if argument in _INTEGERS else "fp32"
        elif argument in _VECTORS or argument in _TEACHERS:
            signature[argument] = f"*{teacher if argument in _TEACHERS else dtype}"
        elif argument not in constants:
            signature[argument] = "*fp32"
    signature = {argument: kind for argument, kind in signature.items() if argument not in gone}
    others = {argument: constants.get(argument) for argument in kernel.arg_names if argument not in signature}
    pointers = tuple(argument for argument, kind in signature.items() if kind.startswith("*"))
    return AotCase(name, kernel, signature, others, (*pointers, *divisible), tiles.warps, tiles.stages)
