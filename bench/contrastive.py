"""The contrastive loss, forward and backward, against eager code, torch.compile and Inf-CL."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import contrastive_loss
from .comparison import OURS, Comparison, Result, gradients

WIDTH = 512
SCALE = 1 / 0.07
HARD_WEIGHT, SOFT_TEMPERATURE = 0.7, 0.1


def comparisons(device: torch.device) -> list[Comparison]:
    """The paper's global batch, a large one, and one that is no multiple of anything; hard and with soft targets."""
    if device.type != "cuda":
        return [_case(768, torch.float32, device, soft) for soft in (False, True)] + [
            _case(4096, torch.float32, device, False)
        ]
    sizes = [(768, True), (768, False), (5003, True), (32768, False), (32768, True)]
    return [_case(batch, torch.bfloat16, device, soft) for batch, soft in sizes]


def _case(batch: int, dtype: torch.dtype, device: torch.device, soft: bool) -> Comparison:
    def vectors() -> Tensor:
        return F.normalize(torch.randn(batch, WIDTH, device=device), dim=1).to(dtype)

    def inputs() -> tuple[Tensor, ...]:
        image = vectors()
        # Pairs that agree, as after some training: a loss of log(batch) everywhere would hide errors.
        text = F.normalize(image.float() + 2 * vectors().float(), dim=1).to(dtype)
        scale = torch.tensor(SCALE, device=device)
        student = [x.detach().requires_grad_() for x in (image, text, scale)]
        return *student, *((vectors(), vectors()) if soft else ())

    rivals: dict[str, Callable[..., Tensor]] = {OURS: _ours, "eager": _eager}
    missing = {}
    if device.type == "cuda":
        rivals["torch.compile"] = torch.compile(_eager, dynamic=False)
        if soft:
            missing["Inf-CL"] = "has no soft targets"
        elif importlib.util.find_spec("inf_cl"):
            rivals["Inf-CL"] = _inf_cl
        else:
            missing["Inf-CL"] = "not installed (pip install inf-cl)"
    return Comparison(
        "contrastive", f"batch {batch:,}, d {WIDTH}, {'hard and soft' if soft else 'hard'}", inputs,
        {n: functools.partial(_forward_backward, f) for n, f in rivals.items()}, _exact,
        tolerance=1e-4 if dtype == torch.float32 else 1.5e-2, unavailable=missing,
    )  # fmt: skip


def _forward_backward(loss: Callable[..., Tensor], *inputs: Tensor) -> Result:
    return gradients(loss(*inputs), *inputs[:3])


def _ours(image: Tensor, text: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
    if not teacher:
        return contrastive_loss(image, text, scale)
    return contrastive_loss(
        image, text, scale, teacher_image=teacher[0], teacher_text=teacher[1], hard_weight=HARD_WEIGHT,
        soft_temperature=SOFT_TEMPERATURE,
    )  # fmt: skip


def _eager(image: Tensor, text: Tensor, scale: Tensor, *teacher: Tensor) -> Tensor:
    """Logits of both directions as matrices, in fp32, and cross_entropy: how it is usually written."""
    with torch.autocast(image.device.type, enabled=False):
        per_image = scale * (image @ text.T).float()
        per_text = scale * (text @ image.T).float()
        labels = torch.arange(len(image), device=image.device)
        hard = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        if not teacher:
            return hard
        with torch.no_grad():
            to_text = ((teacher[0] @ teacher[1].T).float() / SOFT_TEMPERATURE).softmax(1)
            to_image = ((teacher[1] @ teacher[0].T).float() / SOFT_TEMPERATURE).softmax(1)
        soft = (F.cross_entropy(per_image, to_text) + F.cross_entropy(per_text, to_image)) / 2
        return HARD_WEIGHT * hard + (1 - HARD_WEIGHT) * soft


def _inf_cl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    from inf_cl import cal_flash_loss

    both = (cal_flash_loss(image, text, scale=scale), cal_flash_loss(text, image, scale=scale))
    return (both[0].mean() + both[1].mean()) / 2


def _exact(image: Tensor, text: Tensor, scale: Tensor, *teacher: Tensor) -> tuple[Tensor, ...]:
    """In fp64, a thousand rows at a time, gradients added up: autograd of plain softmax code on each part."""
    images, texts, scales = (x.detach().double().requires_grad_() for x in (image, text, scale))
    sides = [x.double() for x in teacher]
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    sums: list[Tensor] = []
    for start in range(0, len(image), 1024):
        part = slice(start, start + 1024)
        loss = _part_of_loss(images, texts, scales, part, *sides) + _part_of_loss(
            texts, images, scales, part, *sides[::-1]
        )
        value, *found = gradients(loss / 2 / len(image), images, texts, scales)
        total += value
        sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
    return total, *sums


def _part_of_loss(rows: Tensor, columns: Tensor, scale: Tensor, part: slice, *teacher: Tensor) -> Tensor:
    """The sum over some rows of one direction's terms."""
    logits = scale * rows[part] @ columns.T
    log_p = logits.log_softmax(1)
    hard = -log_p.diagonal(part.start).sum()
    if not teacher:
        return hard
    target = (teacher[0][part] @ teacher[1].T / SOFT_TEMPERATURE).softmax(1)
    return HARD_WEIGHT * hard - (1 - HARD_WEIGHT) * (target * log_p).sum()
