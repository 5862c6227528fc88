"""The prototype cross-entropy, forward and backward, against eager code, torch.compile and Liger."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import prototype_cross_entropy
from .comparison import OURS, Comparison, Result, gradients

WIDTH = 256
LIGER = "Liger fused linear JSD, beta 0"
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


def comparisons(device: torch.device) -> list[Comparison]:
    """Rows x prototypes: masked patches of a batch, one that fits no block, and DINO's 65,536 prototypes."""
    if device.type != "cuda":
        return [_case(2000, 8192, torch.float32, device)]
    return [_case(r, k, torch.bfloat16, device) for r, k in ((20_000, 8192), (3001, 8192), (4096, 65_536))]


def _case(rows: int, prototypes: int, dtype: torch.dtype, device: torch.device) -> Comparison:
    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=device), dim=1)

    def inputs() -> tuple[Tensor, ...]:
        teacher, weight = unit(rows, WIDTH), unit(prototypes, WIDTH)
        student = F.normalize(teacher + 0.5 * unit(rows, WIDTH), dim=1)
        center = 0.05 * torch.randn(prototypes, device=device)
        tensors = (student, F.normalize(weight + 0.1 * unit(prototypes, WIDTH), dim=1), teacher, weight)
        student, student_weight, teacher, weight = (x.to(dtype) for x in tensors)
        return student.requires_grad_(), student_weight.requires_grad_(), teacher, weight, center

    losses: dict[str, Callable[..., Tensor]] = {OURS: _ours, "eager": _eager}
    if device.type == "cuda":
        losses["torch.compile"] = torch.compile(_eager, dynamic=False)
    rivals: dict[str, Callable[..., Result]] = {
        name: functools.partial(_forward_backward, loss) for name, loss in losses.items()
    }
    missing = {}
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        rivals[LIGER] = _liger
    elif device.type == "cuda":
        missing[LIGER] = "not installed (pip install liger-kernel)"
    return Comparison(
        "prototype_ce", f"{rows:,} rows x {prototypes:,} prototypes", inputs,
        rivals, _exact, tolerance=1e-4 if dtype == torch.float32 else 1.5e-2, unavailable=missing,
    )  # fmt: skip


def _forward_backward(loss: Callable[..., Tensor], *inputs: Tensor) -> Result:
    return gradients(loss(*inputs), *inputs[:2])


def _ours(*inputs: Tensor) -> Tensor:
    return prototype_cross_entropy(
        *inputs, student_temperature=STUDENT_TEMPERATURE, teacher_temperature=TEACHER_TEMPERATURE
    )


def _eager(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor) -> Tensor:
    """Logits stored, softmax in fp32: how DINO's and iBOT's losses are usually written."""
    logits = (student @ student_weight.T).float() / STUDENT_TEMPERATURE
    with torch.no_grad():
        target = (((teacher @ teacher_weight.T).float() - center) / TEACHER_TEMPERATURE).softmax(1)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def _liger(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor) -> Result:
    """KL(teacher, student): another value (less the entropy of the targets), the same gradients.

    The ratio of the temperatures goes into the teacher's features, the center into one more of them.
    """
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    ratio = STUDENT_TEMPERATURE / TEACHER_TEMPERATURE
    features = torch.cat([teacher * ratio, teacher.new_full((len(teacher), 1), -ratio)], 1)
    weight = torch.cat([teacher_weight, center[:, None].to(teacher_weight.dtype)], 1)
    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=STUDENT_TEMPERATURE)
    return None, *gradients(loss(student, student_weight, features, weight, None), student, student_weight)[1:]


def _exact(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, center: Tensor
) -> tuple[Tensor, ...]:
    """In fp64, some rows at a time, gradients added up."""
    rows = max(1, 2**26 // len(student_weight))
    features, weight = (x.detach().double().requires_grad_() for x in (student, student_weight))
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    sums: list[Tensor] = []
    for start in range(0, len(student), rows):
        part = slice(start, start + rows)
        logits = features[part] @ weight.T / STUDENT_TEMPERATURE
        target = ((teacher[part].double() @ teacher_weight.double().T - center) / TEACHER_TEMPERATURE).softmax(1)
        loss = -(target * logits.log_softmax(1)).sum() / len(student)
        value, *found = gradients(loss, features, weight)
        total += value
        sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
    return total, *sums
