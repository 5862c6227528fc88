"""Cross-entropy between two softmaxes over prototypes: last linear layer, centering, sharpening and loss in one.

The loss of DINO (Caron et al. 2021, equations 1 to 4) and iBOT (Zhou et al. 2022, equation 2) on paired rows:

    q_r = softmax((teacher_weight t_r - center) / teacher_temperature)
    z_r = student_weight s_r / student_temperature
    loss = sum_r row_weight_r H(q_r, softmax(z_r)) = sum_r row_weight_r (log sum_k exp z_rk - sum_k q_rk z_rk)

Its gradient with respect to z_rk is row_weight_r (softmax(z_r)_k - q_rk). Since that depends on nothing that comes
after the loss but a factor, the gradients of the student are made with the loss, tile by tile, and the logits
[R, K] are never stored: at 20,000 rows and 8,192 prototypes each of the two would take 655 MB in fp32.

Letters in shapes: R rows (masked patches, class tokens), d width of the bottleneck, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._context import Context
from .dispatch import choose
from .products import ONE_PIECE, check_like, check_matrix, check_vector, full_precision, spans, wide


def prototype_cross_entropy(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor, *,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """sum_r row_weight_r H(q_r, z_r), a scalar in fp32 (fp64 for fp64), differentiable in student and student_weight.

    student, teacher: [R, d], paired row by row. student_weight, teacher_weight: [K, d]. A pair of features and weight
    shares its width and dtype, fp16, bf16, fp32 or fp64; the teacher's may differ from the student's.
    center: [K], any float dtype. row_weight: [R], any float dtype; default 1/R. Logits, softmax and sums are fp32.

    Backends: `triton` keeps a tile of logit gradients of at most 4,096 x 8,192; `torch` the logits of a few rows;
    both make the gradients together with the loss, and only where gradients are asked for.
    Raises ValueError naming the argument for a wrong shape, dtype, device or temperature, or an empty batch.
    """
    _validate(student, student_weight, teacher, teacher_weight, center, row_weight)
    for name, tau in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        if not tau > 0:
            raise ValueError(f"{name} must be above 0, not {tau}")
    arguments = (student, student_weight, teacher, teacher_weight, center)
    temperatures = (float(student_temperature), float(teacher_temperature))
    rows, prototypes = student.shape[0], student_weight.shape[0]
    obstacle = {"triton": "the teacher is float64"} if teacher.dtype == torch.float64 else {}
    backend = choose("prototype_ce", student, obstacle).backend
    with full_precision(student):
        if backend == "torch" and rows * prototypes <= ONE_PIECE:
            return reference(*arguments, *temperatures, row_weight)
        gradients = torch.is_grad_enabled() and (student.requires_grad or student_weight.requires_grad)
        return prototype_loss(*arguments, *temperatures, row_weight, gradients, backend)[0]


def prototype_sums(teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """The sum over rows of the teacher's logits, [K] in fp32 (fp64 for fp64), without gradient: moves the center.

    teacher: [R, d], teacher_weight: [K, d]. The sum of logits is the logit of the sum: no logit is made.
    Raises ValueError for a wrong shape, dtype or device.
    """
    check_matrix("teacher", teacher)
    check_matrix("teacher_weight", teacher_weight, width=teacher.shape[1])
    check_like("teacher_weight", teacher_weight, "teacher", teacher)
    with torch.no_grad(), full_precision(teacher):
        dtype = wide(teacher)
        return teacher_weight.to(dtype) @ teacher.sum(0, dtype=dtype)


def reference(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The readable form, logits stored; also what the torch backend computes when they are few."""
    dtype = wide(student, teacher)
    z = student.to(dtype) @ student_weight.to(dtype).T / student_temperature
    with torch.no_grad():
        t = teacher.to(dtype) @ teacher_weight.to(dtype).T
        q = ((t - center.to(dtype)) / teacher_temperature).softmax(1)
    rows = z.logsumexp(1) - (q * z).sum(1)
    return (rows * _row_weight(row_weight, student, dtype)).sum()


@torch.library.custom_op("harmony_fast::prototype_loss", mutates_args=())
def prototype_loss(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None, gradients: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and, if `gradients`, its gradients to student and student_weight, in fp32; else two empty tensors."""
    with full_precision(student), torch.cuda.device_of(student):  # where kernels start
        weights = _row_weight(row_weight, student, wide(student, teacher))
        arguments = (student, student_weight, teacher, teacher_weight, center)
        if backend == "triton":
            from .prototype_ce_triton import loss_and_gradients
        else:
            loss_and_gradients = _loss_and_gradients
        return loss_and_gradients(*arguments, student_temperature, teacher_temperature, weights, gradients)


@prototype_loss.register_fake
def _(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor | None, gradients: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = wide(student, teacher)
    shapes = (student.shape, student_weight.shape) if gradients else ((0,), (0,))
    d_student, d_weight = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    return student.new_empty((), dtype=dtype), d_student, d_weight


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.constants = (inputs[0].dtype,)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (dtype,) = ctx.constants
    # The gradients stay in fp32 until here: 1/R of them would vanish in fp16 without the loss scale in `grad`.
    both = tuple(
        (grad * g).to(dtype) if needed else None
        for needed, g in zip(ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True)
    )
    return *both, *(None,) * 8


prototype_loss.register_autograd(_backward, setup_context=_save)


def _loss_and_gradients(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: float, row_weight: Tensor, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The torch backend: whole rows, as many at a time as make ONE_PIECE logits."""
    dtype = row_weight.dtype
    student, student_weight, teacher, teacher_weight = (
        x.detach().to(dtype) for x in (student, student_weight, teacher, teacher_weight)
    )
    loss = student.new_zeros(())
    shapes = (student.shape, student_weight.shape) if gradients else ((0,), (0,))
    d_student, d_weight = (student.new_zeros(shape) for shape in shapes)
    shift = center.to(dtype) / -teacher_temperature
    for r in spans(len(student), max(1, ONE_PIECE // len(student_weight))):
        z = (student[r] / student_temperature) @ student_weight.T
        q = torch.addmm(shift, teacher[r], teacher_weight.T, alpha=1 / teacher_temperature).softmax(1)
        lse = z.logsumexp(1)
        loss += (row_weight[r] * (lse - torch.linalg.vecdot(q, z))).sum()
        if gradients:
            d = z.sub_(lse[:, None]).exp_().sub_(q).mul_(row_weight[r, None] / student_temperature)
            torch.mm(d, student_weight, out=d_student[r])
            d_weight.addmm_(d.T, student[r])
    return loss, d_student, d_weight


def _row_weight(row_weight: Tensor | None, student: Tensor, dtype: torch.dtype) -> Tensor:
    if row_weight is not None:
        return row_weight.detach().to(dtype)
    return torch.full((len(student),), 1 / len(student), dtype=dtype, device=student.device)


def _validate(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor,
    row_weight: Tensor | None,
) -> None:  # fmt: skip
    check_matrix("student", student)
    rows, width = student.shape
    if rows == 0:
        raise ValueError(f"student: the batch is empty, {[*student.shape]}")
    check_matrix("student_weight", student_weight, width=width)
    prototypes = student_weight.shape[0]
    if prototypes == 0 or width == 0:
        raise ValueError(f"student_weight has no prototypes: {[*student_weight.shape]}")
    check_matrix("teacher", teacher, rows)
    check_matrix("teacher_weight", teacher_weight, prototypes, teacher.shape[1])
    check_vector("center", center, prototypes)
    check_like("student_weight", student_weight, "student", student)
    check_like("teacher_weight", teacher_weight, "teacher", teacher)
    check_like("teacher", teacher, "student", student, dtype=False)
    check_like("center", center, "student", student, dtype=False)
    if row_weight is not None:
        check_vector("row_weight", row_weight, rows)
        check_like("row_weight", row_weight, "student", student, dtype=False)
