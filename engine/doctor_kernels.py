"""A small check of every kernel on this machine: the chosen backend against the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import contrastive_loss, ema_update_, masked_attention, prototype_cross_entropy
from ..kernels.ema import ema_reference
from ..kernels.masked_attention import reference as attention_reference
from ..kernels.prototype_ce import reference as prototype_reference
from .backends import choices

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Relative error in the 2-norm."""


class Check(NamedTuple):
    """A kernel on a device: its backend, why, and how it did. error: relative; None if it failed, see `problem`."""

    device: str
    operation: str
    dtype: str
    backend: str
    reason: str
    error: float | None
    problem: str | None


def check_kernels() -> Iterator[Check]:
    """All kernels on the CPU in fp32 and on each GPU that can be used in bf16."""
    yield from _check_device(torch.device("cpu"), torch.float32)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if _answers(device := torch.device("cuda", index)):
            yield from _check_device(device, torch.bfloat16)


def _answers(device: torch.device) -> bool:
    """A driver may list GPUs that torch cannot use; with DeepSpeed imported torch asks the driver alone."""
    try:
        torch.empty(1, device=device)
    except RuntimeError:
        return False
    return True


def _check_device(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    for operation, choice in choices(device, dtype).items():
        error, problem = _errors(CHECKS[operation], device, dtype)
        yield Check(str(device), operation, str(dtype)[6:], *choice, error, problem)


def _errors(check: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> tuple[float | None, str | None]:
    """The largest relative error of outputs and gradients, and what is wrong, or None."""
    generator = torch.Generator().manual_seed(0)
    try:
        pairs = check(lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype))
        error = max(float((x.double() - e).norm() / e.norm()) for x, e in pairs)
    except Exception as failure:  # a broken driver or compiler raises anything; the doctor reports it
        return None, f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    tolerable = error <= TOLERANCE[dtype]
    return (error, None) if tolerable else (None, f"relative error {error:.1e} is above {TOLERANCE[dtype]:.0e}")


def _differentiate(
    kernel: Callable[..., Tensor], definition: Callable[..., Tensor], *inputs: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of both, paired."""
    found = []
    for function, tensors in ((kernel, inputs), (definition, [x.double() for x in inputs])):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = function(*leaves)
        weights = torch.linspace(-1, 2, output.numel(), device=output.device).view(output.shape).to(output.dtype)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, weights)])
    return list(zip(*found, strict=True))


def _attention(draw: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    offsets = torch.tensor([0, 197, 234, 284, 285, 585], dtype=torch.int32)
    inputs = draw(3, 585, 2, 64)
    return _differentiate(
        lambda q, k, v: masked_attention(q, k, v, offsets, 300, causal=True),
        lambda q, k, v: attention_reference(q, k, v, offsets, causal=True), *inputs,
    )  # fmt: skip


def _contrastive(draw: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    image, text, *teacher = (F.normalize(x, dim=1) for x in draw(4, 70, 64))

    def definition(a: Tensor, b: Tensor) -> Tensor:
        targets = 0.6 * torch.eye(70, dtype=a.dtype, device=a.device)

        def half(x: Tensor, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
            soft = (t.double() @ u.double().T / 0.1).softmax(1)
            return -((targets + 0.4 * soft) * (10 * x @ y.T).log_softmax(1)).sum(1).mean() / 2

        return half(a, b, *teacher) + half(b, a, *teacher[::-1])

    return _differentiate(
        lambda a, b: contrastive_loss(a, b, 10.0, teacher_image=teacher[0], teacher_text=teacher[1], hard_weight=0.6),
        definition, image, text,
    )  # fmt: skip


def _prototype_ce(draw: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    student, teacher = (F.normalize(x, dim=1) for x in draw(2, 90, 64))
    weight, teacher_weight = (F.normalize(x, dim=1) for x in draw(2, 600, 64))
    center = 0.1 * draw(600).float()

    def kernel(s: Tensor, w: Tensor) -> Tensor:
        return prototype_cross_entropy(
            s, w, teacher, teacher_weight, center, student_temperature=0.1, teacher_temperature=0.05
        )

    def definition(s: Tensor, w: Tensor) -> Tensor:
        return prototype_reference(s, w, teacher.double(), teacher_weight.double(), center.double(), 0.1, 0.05)

    return _differentiate(kernel, definition, student, weight)


def _ema(draw: Callable[..., Tensor]) -> list[tuple[Tensor, Tensor]]:
    ema, source = draw(10_007).float(), draw(10_007)
    copy = torch.full_like(ema, float("nan"), dtype=torch.bfloat16)
    expected = ema_reference(ema, source, 0.99)
    ema_update_(ema, source, 0.99, copy)
    return [(ema, expected), (copy, ema.bfloat16().double())]


CHECKS = {"attention": _attention, "contrastive": _contrastive, "prototype_ce": _prototype_ce, "ema": _ema}
