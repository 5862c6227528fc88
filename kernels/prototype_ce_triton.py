"""The prototype loss' Triton backend: the shared kernels with prototypes as columns and the center."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .aot import AotCase
from .products import TRITON_TILE, magnification, project
from .products_triton import (
    COMBINED,
    aot_case,
    combine_kernel,
    gradient_kernel,
    precision,
    split,
    statistics_kernel,
    tiles_for,
)


def loss_and_gradients(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and its gradients to student and student_weight, in fp32; without `gradients` two empty tensors."""
    student, student_weight = student.contiguous(), student_weight.contiguous()
    teacher, teacher_weight = teacher.contiguous(), teacher_weight.contiguous()
    center = center.float().contiguous()
    factors = (1 / student_temperature, 1 / teacher_temperature)
    loss, lse, teacher_lse = _statistics(student, student_weight, teacher, teacher_weight, center, *factors, row_weight)
    if not gradients:
        return loss, row_weight.new_empty(0), row_weight.new_empty(0)
    magnify = magnification(student.dtype)
    largest = row_weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    share = row_weight / largest

    def tile(r: slice, c: slice) -> Tensor:
        x, y, tx, ty = student[r], student_weight[c], teacher[r], teacher_weight[c]
        rows, columns, tiles = len(x), len(y), tiles_for(x, tx)
        out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
        gradient_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(columns, tiles.columns))](
            x, y, tx, ty, None, center[c], lse[r], teacher_lse[r], None, None, None, share[r], out, rows, columns, 0,
            *factors, magnify, False, x.shape[1], tx.shape[1], precision(), tiles.rows, tiles.columns,
            tiles.depth_for(x.shape[1]), tiles.depth_for(tx.shape[1]), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return out

    u, v = project(tile, student, student_weight, TRITON_TILE)
    factor = largest * (factors[0] / magnify)
    return loss, u.mul_(factor), v.mul_(factor)


def _statistics(
    x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, center: Tensor, z_factor: float, t_factor: float, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and logsumexp [R] of the student's and of the teacher's logits."""
    (rows, width), columns, teacher_width = x.shape, len(y), tx.shape[1]
    tiles = tiles_for(x, tx)
    blocks = triton.cdiv(rows, tiles.rows)
    splits, steps = split(blocks, triton.cdiv(columns, tiles.columns), x)
    partial = row_weight.new_empty(splits, 4, rows)
    statistics_kernel[(blocks, splits, 1)](
        x, x, y, y, tx, tx, ty, ty, None, center, partial, rows, columns, steps, 0, z_factor, t_factor, False, width,
        teacher_width, precision(), tiles.rows, tiles.columns, tiles.depth_for(width), tiles.depth_for(teacher_width),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    lse, teacher_lse, losses = row_weight.new_empty(3, rows).unbind()
    combine_kernel[(triton.cdiv(rows, COMBINED), 1)](
        partial, lse, teacher_lse, losses, row_weight, rows, splits, 1.0, False, COMBINED, num_warps=tiles.warps
    )
    return losses.sum(), lse, teacher_lse


def aot_cases() -> list[AotCase]:
    """The compilations that training uses, at the head's bottleneck of 256."""
    unused = ("scale", "shares", "column_lse", "teacher_column_lse")
    cases = [aot_case("prototype_ce.combine", combine_kernel, "fp32", 256, teacher="fp32", labels=False)]
    for dtype in ("bf16", "fp16", "fp32"):
        for use, kernel, divisible in (
            ("statistics", statistics_kernel, ()),
            ("gradient", gradient_kernel, ("columns",)),
        ):
            name = f"prototype_ce.{use}.{dtype}"
            cases.append(
                aot_case(name, kernel, dtype, 256, teacher=dtype, labels=False, absent=unused, divisible=divisible)
            )
    return cases
