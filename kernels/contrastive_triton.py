"""The contrastive losses' Triton backend: softmax terms by the shared kernels, and the sigmoid form's own."""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .contrastive_ops import LogitGradient, Pair
from .products_triton import (
    COMBINED,
    aot_case,
    combine_kernel,
    gradient_kernel,
    inner_products,
    precision,
    split,
    statistics_kernel,
    tiles_for,
)


def statistics(pair: Pair, scale: Tensor, temperature: float, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """The terms [1] or [2], logsumexp [2, B] of the logits and [2, B] of the teacher's or [0], in fp32."""
    pair = pair.each(Tensor.contiguous)
    one, two = pair.directions()
    (batch, width), columns = one.rows.shape, len(one.columns)
    soft = one.teacher_rows is not None
    teacher_width = width if one.teacher_rows is None else one.teacher_rows.shape[1]
    tiles = tiles_for(one.rows, one.teacher_rows)
    blocks = triton.cdiv(batch, tiles.rows)
    splits, steps = split(2 * blocks, triton.cdiv(columns, tiles.columns), pair.image)
    partial = scale.new_empty(2, splits, 4, batch)
    statistics_kernel[(blocks, splits, 2)](
        one.rows, two.rows, one.columns, two.columns, one.teacher_rows, two.teacher_rows, one.teacher_columns,
        two.teacher_columns, scale, None, partial, batch, columns, steps, offset, 1.0, 1 / temperature,
        True, width, teacher_width, precision(), tiles.rows, tiles.columns, tiles.depth_for(width),
        tiles.depth_for(teacher_width), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    lse = scale.new_empty(2, batch)
    teacher_lse = torch.empty_like(lse) if soft else None
    losses = scale.new_empty(1 + soft, 2, batch)
    combine_kernel[(triton.cdiv(batch, COMBINED), 2)](
        partial, lse, teacher_lse, losses, None, batch, splits, 0.5 / batch, True, COMBINED, num_warps=tiles.warps
    )
    return losses.sum((1, 2)), lse, scale.new_empty(0) if teacher_lse is None else teacher_lse


def logit_gradient(g: LogitGradient, r: slice, c: slice) -> Tensor:
    """A tile of the gradient of logits in the dtype of the vectors, times g.magnify."""
    x, y = g.x.rows[r].contiguous(), g.x.columns[c].contiguous()
    teachers = (g.x.teacher_rows, r), (g.x.teacher_columns, c)
    tx, ty = (None if v is None else v[s].contiguous() for v, s in teachers)
    (rows, width), columns = x.shape, len(y)
    teacher_width = width if tx is None else tx.shape[1]
    tiles = tiles_for(x, tx)
    shared, soft = len(g.lse) == 2, tx is not None
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    gradient_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(columns, tiles.columns))](
        x, y, tx, ty, g.scale, None, g.lse[0, r], g.teacher_lse[0, r] if soft else None,
        g.lse[1, c] if shared else None, g.teacher_lse[1, c] if shared and soft else None, g.shares, None, out,
        rows, columns, r.start + g.offset - c.start, 1.0, 1 / g.temperature, g.magnify, True, width, teacher_width,
        precision(), tiles.rows, tiles.columns, tiles.depth_for(width), tiles.depth_for(teacher_width),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


@triton.jit
def softplus(x):
    """log(1 + exp(x)), without losing small values to the 1."""
    e = tl.exp(-tl.abs(x))
    series = e * (1 - e * (0.5 - e * (0.33333333 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, tl.log(1 + e))


@triton.jit(do_not_specialize=["rows", "columns", "steps", "offset"])
def sigmoid_kernel(
    x, y, scale, bias, partial, rows, columns, steps, offset, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, split of the columns) -> partial[block, split]: its sum of -log sigmoid(y_mn z_mn)."""
    first = tl.program_id(0) * BM
    split_index = tl.program_id(1)
    m = first + tl.arange(0, BM)
    x += first.to(tl.int64) * WIDTH
    s, b = tl.load(scale), tl.load(bias)
    total = tl.zeros([BM], tl.float32)
    stop = tl.minimum((split_index + 1) * steps * BN, columns)
    for start in range(split_index * steps * BN, stop, BN):
        n = start + tl.arange(0, BN)
        y_tile = y + tl.cast(start, tl.int64) * WIDTH
        z = s * inner_products(x, y_tile, rows - first, columns - start, WIDTH, PRECISION, BM, BN, BK) + b
        z = tl.where(n[None, :] == (m + offset)[:, None], -z, z)
        total += tl.sum(tl.where((n < columns)[None, :], softplus(z), 0.0), 1)
    total = tl.sum(tl.where(m < rows, total, 0.0), 0)
    tl.store(partial + tl.program_id(0) * tl.num_programs(1) + split_index, total)


@triton.jit(do_not_specialize=["rows", "shift"])
def sigmoid_gradient_kernel(
    x, y, scale, bias, out, rows, columns, shift, magnify, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[m, n] = magnify * (sigmoid(z_mn) - (n == m + shift))."""
    first, start = tl.program_id(0) * BM, tl.program_id(1) * BN
    m, n = first + tl.arange(0, BM), start + tl.arange(0, BN)
    x += first.to(tl.int64) * WIDTH
    y += start.to(tl.int64) * WIDTH
    z = inner_products(x, y, rows - first, columns - start, WIDTH, PRECISION, BM, BN, BK)
    z = tl.load(scale) * z + tl.load(bias)
    match = n[None, :] == (m + shift)[:, None]
    p = tl.sigmoid(tl.where(match, -z, z))
    d = (magnify * tl.where(match, -p, p)).to(out.dtype.element_ty)
    place = out + m[:, None] * columns + n[None, :]
    tl.store(place, d, mask=(m < rows)[:, None] & (n < columns)[None, :])


def sigmoid_sum(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """The sum of -log sigmoid(y_ij z_ij), a scalar in fp32."""
    image, text = image.contiguous(), text.contiguous()
    (rows, width), columns, tiles = image.shape, len(text), tiles_for(image)
    blocks = triton.cdiv(rows, tiles.rows)
    splits, steps = split(blocks, triton.cdiv(columns, tiles.columns), image)
    partial = scale.new_empty(blocks, splits)
    sigmoid_kernel[(blocks, splits)](
        image, text, scale, bias, partial, rows, columns, steps, offset, width, precision(), tiles.rows,
        tiles.columns, tiles.depth_for(width), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return partial.sum()


def sigmoid_gradient(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, magnify: float, r: slice, c: slice
) -> Tensor:
    """A tile of the gradient of sigmoid logits in the dtype of the vectors, times magnify."""
    x, y = image[r].contiguous(), text[c].contiguous()
    (rows, width), columns, tiles = x.shape, len(y), tiles_for(x)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    sigmoid_gradient_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(columns, tiles.columns))](
        x, y, scale, bias, out, rows, columns, r.start + offset - c.start, magnify, width, precision(), tiles.rows,
        tiles.columns, tiles.depth_for(width), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """The compilations that training uses: CLIP's width, hard targets alone and with soft ones, and the sigmoid."""
    cases = [aot_case("contrastive.combine.soft", combine_kernel, "fp32", 512, teacher="fp32", absent=("row_weight",))]
    one_way = ("center", "row_weight", "column_lse", "teacher_column_lse")
    uses = (
        ("statistics", statistics_kernel, one_way[:1], ()),
        ("gradient.both_ways", gradient_kernel, one_way[:2], ("columns",)),
        ("gradient.one_way", gradient_kernel, one_way, ("columns",)),
    )
    for dtype in ("bf16", "fp16", "fp32"):
        for teacher, (use, kernel, absent, divisible) in product((None, dtype), uses):
            name = f"contrastive.{use}.{dtype}.{'soft' if teacher else 'hard'}"
            options = {"teacher": teacher, "absent": absent, "divisible": divisible}
            cases.append(aot_case(name, kernel, dtype, 512, **options))
        name = f"contrastive.sigmoid.{dtype}"
        cases.append(aot_case(name, sigmoid_kernel, dtype, 512))
        cases.append(aot_case(f"{name}.gradient", sigmoid_gradient_kernel, dtype, 512, divisible=("columns",)))
    return cases
