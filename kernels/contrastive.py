"""Contrastive losses over a global batch: CLIP with hard and soft targets, and SigLIP's sigmoid form.

With unit vectors a_i (images), b_j (texts), their teachers a'_i, b'_j and the multiplier s (Radford et al. 2021,
figure 3; soft targets: Harmony, section 3.2):

    z_ij = s <a_i, b_j>                         w_ij = s <b_i, a_j>                    rows local, columns global
    q_ij = softmax_j(<a'_i, b'_j> / tau)        r_ij = softmax_j(<b'_i, a'_j> / tau)
    hard = mean_i (CE(z_i, i + offset) + CE(w_i, i + offset)) / 2
    soft = mean_i (H(q_i, softmax z_i) + H(r_i, softmax w_i)) / 2
    loss = hard_weight hard + (1 - hard_weight) soft

What a row needs are four numbers: logsumexp z, the label's z, logsumexp of the teacher's logits, and sum_j q_ij z_ij.
One walk over tiles of columns gives them; the backward pass makes each tile of logits again. Memory is O(rows +
columns) besides one tile of constant size.

What this is for: large accumulated or gathered batches. At a batch of 32,768 one B x B matrix takes 4.3 GB in fp32,
and the usual code stores several. At a global batch of 768, that of the paper, it takes 2.4 MB: there is nothing to
save there but launches.

Letters in shapes: B local rows, N columns of all ranks, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrastive_ops import Pair, sigmoid_loss, softmax_terms
from .dispatch import choose
from .products import ONE_PIECE, check_like, check_matrix, full_precision, wide


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, all_image: Tensor | None = None,
    all_text: Tensor | None = None, teacher_image: Tensor | None = None, teacher_text: Tensor | None = None,
    all_teacher_image: Tensor | None = None, all_teacher_text: Tensor | None = None, hard_weight: float = 1.0,
    soft_temperature: float = 0.1, row_offset: int = 0, kind: str = "softmax", logit_bias: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """hard_weight hard + (1 - hard_weight) soft, a scalar: `contrastive_terms`, weighted.

    hard_weight: 0 to 1; below 1 it needs teachers, at 1 they are not looked at. Other arguments and errors as there.
    """
    if not 0 <= hard_weight <= 1:
        raise ValueError(f"hard_weight must lie between 0 and 1, not {hard_weight}")
    if hard_weight < 1 and teacher_image is None and kind == "softmax":
        raise ValueError(f"teacher_image is missing: hard_weight {hard_weight} leaves the rest to soft targets")
    if hard_weight < 1 and kind == "sigmoid":
        raise ValueError(f"hard_weight must be 1 with kind 'sigmoid', not {hard_weight}: it has no soft targets")
    pair = _pair(
        image, text, all_image, all_text, teacher_image, teacher_text, all_teacher_image, all_teacher_text, kind
    )  # fmt: skip
    if hard_weight == 1 and kind == "softmax":
        pair = pair._replace(teacher_image=None, teacher_text=None, all_teacher_image=None, all_teacher_text=None)
    hard, soft = _terms(pair, logit_scale, soft_temperature, row_offset, kind, logit_bias)
    return hard if soft is None else hard_weight * hard + (1 - hard_weight) * soft


def contrastive_terms(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, all_image: Tensor | None = None,
    all_text: Tensor | None = None, teacher_image: Tensor | None = None, teacher_text: Tensor | None = None,
    all_teacher_image: Tensor | None = None, all_teacher_text: Tensor | None = None,
    soft_temperature: float = 0.1, row_offset: int = 0, kind: str = "softmax", logit_bias: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(hard, soft), means over the local rows, scalars in fp32 (fp64 for fp64); soft is None without teachers.

    image, text: [B, E], L2-normalised, fp16, bf16, fp32 or fp64, of one dtype. logit_scale: the multiplier (no
    logarithm), a number or a tensor of one element. all_image, all_text: [N, E], what all ranks have, this rank's
    rows at row_offset; default: the local ones (leave them out on one rank: then both directions share their tiles).
    teacher_image, teacher_text: [B, E'], all_teacher_image, all_teacher_text: [N, E'], L2-normalised; they get no
    gradient. soft_temperature: tau above. Everything is computed in fp32, but the tensor cores multiply fp16 and
    bf16 as they come, and so are the gradients of logits rounded before their products with the vectors.

    kind "sigmoid" (Zhai et al. 2023, equation 1): hard = -(1/B) sum_ij log sigmoid(y_ij (s <a_i, b_j> + logit_bias)),
    y = 1 at j = i + row_offset, else -1. Its rows are the local images, its columns all_text, so `text` (if all_text
    is given) and `all_image` get no gradient from it. The mean of this term over ranks is the loss of the global batch;
    so are its gradients averaged over ranks, if the gather's backward adds up what the ranks found for its columns.

    Differentiable in image, text, all_image, all_text, logit_scale and logit_bias.
    Raises ValueError naming the argument for a wrong shape, dtype, device, temperature, offset or kind, an empty
    batch, one teacher without the other, soft targets with "sigmoid", or logit_bias with "softmax".
    """
    pair = _pair(
        image, text, all_image, all_text, teacher_image, teacher_text, all_teacher_image, all_teacher_text, kind
    )  # fmt: skip
    return _terms(pair, logit_scale, soft_temperature, row_offset, kind, logit_bias)


def reference(pair: Pair, scale: Tensor, temperature: float, offset: int) -> Tensor:
    """The readable form, logits stored: the terms, [1] or [2]. Also what the torch backend does when they are few."""
    dtype = wide(*pair)
    terms = []
    z = t = None
    for x in pair.directions():
        rows, columns = x.rows.to(dtype), x.columns.to(dtype)
        z = z.T if pair.shared and z is not None else scale * rows @ columns.T
        lse = z.logsumexp(1)
        terms.append(lse - z.diagonal(offset))
        if x.teacher_rows is not None and x.teacher_columns is not None:
            with torch.no_grad():
                t = t.T if t is not None and pair.shared else x.teacher_rows.to(dtype) @ x.teacher_columns.to(dtype).T
                q = (t / temperature).softmax(1)
            terms.append(lse - (q * z).sum(1))
    halves = torch.stack(terms).mean(1)
    return halves.unflatten(0, (2, -1)).mean(0)


def sigmoid_reference(image: Tensor, all_text: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    """The readable form of the sigmoid term, logits stored."""
    dtype = wide(image)
    z = scale * image.to(dtype) @ all_text.to(dtype).T + bias
    agreement = -torch.ones_like(z)
    agreement.diagonal(offset)[:] = 1
    return -F.logsigmoid(agreement * z).sum() / len(image)


def _pair(
    image: Tensor, text: Tensor, all_image: Tensor | None, all_text: Tensor | None, teacher_image: Tensor | None,
    teacher_text: Tensor | None, all_teacher_image: Tensor | None, all_teacher_text: Tensor | None, kind: str,
) -> Pair:  # fmt: skip
    """The vectors, checked; all_* filled in, or None if every side's columns are its rows."""
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind must be softmax or sigmoid, not {kind!r}")
    if kind == "sigmoid":
        all_image = all_text  # which the sigmoid form does not look at
    if (teacher_image is None) != (teacher_text is None):
        missing = "teacher_image" if teacher_image is None else "teacher_text"
        raise ValueError(f"{missing} is missing: soft targets need the teacher of both sides")
    for name, x in (("all_teacher_image", all_teacher_image), ("all_teacher_text", all_teacher_text)):
        if x is not None and teacher_image is None:
            raise ValueError(f"teacher_image is missing, but {name} is given")
    local = (image, text, teacher_image, teacher_text)
    everyone: tuple[Tensor | None, ...] = (all_image, all_text, all_teacher_image, all_teacher_text)
    if all(x is None or x is y for x, y in zip(everyone, local, strict=True)):
        everyone = (None,) * 4
    else:
        everyone = tuple(y if x is None else x for x, y in zip(everyone, local, strict=True))
    all_image, all_text, all_teacher_image, all_teacher_text = everyone
    pair = Pair(image, text, all_image, all_text, teacher_image, teacher_text, all_teacher_image, all_teacher_text)
    _check_pair(pair)
    return pair


def _check_pair(pair: Pair) -> None:
    """Shapes, dtypes and devices."""
    check_matrix("image", pair.image)
    batch, width = pair.image.shape
    if batch == 0 or width == 0:
        raise ValueError(f"image: the batch is empty, {[*pair.image.shape]}")
    check_matrix("text", pair.text, batch, width)
    columns = batch
    if pair.all_text is not None:
        check_matrix("all_text", pair.all_text, width=width)
        columns = pair.all_text.shape[0]
        check_matrix("all_image", pair.all_image, columns, width)
    if pair.teacher_image is not None:
        check_matrix("teacher_image", pair.teacher_image, batch)
        width = pair.teacher_image.shape[1]
        check_matrix("teacher_text", pair.teacher_text, batch, width)
        if pair.all_teacher_image is not None:
            check_matrix("all_teacher_image", pair.all_teacher_image, columns, width)
            check_matrix("all_teacher_text", pair.all_teacher_text, columns, width)
    for name, x in pair._asdict().items():
        if x is not None:
            partner = "teacher_image" if "teacher" in name else "image"
            check_like(name, x, partner, getattr(pair, partner))
            check_like(name, x, "image", pair.image, dtype=False)


def _number(name: str, x: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, or a tensor of one element, as a scalar tensor of this dtype."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=dtype, device=like.device)
    if x.numel() != 1 or not x.is_floating_point():
        raise ValueError(f"{name} must be a number or a float tensor of one element, not {[*x.shape]}, {x.dtype}")
    check_like(name, x, "image", like, dtype=False)
    return x.reshape(()).to(dtype)


def _terms(
    pair: Pair, logit_scale: Tensor | float, temperature: float, offset: int, kind: str,
    logit_bias: Tensor | float | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(hard, soft) by the backend that the dispatcher names."""
    image, columns = pair.image, pair.image.shape[0] if pair.all_image is None else pair.all_image.shape[0]
    if kind == "sigmoid" and pair.teacher_image is not None:
        raise ValueError("teacher_image: kind 'sigmoid' has no soft targets")
    if kind == "softmax" and logit_bias is not None:
        raise ValueError("logit_bias: a softmax does not see it; it is for kind 'sigmoid'")
    if not temperature > 0:
        raise ValueError(f"soft_temperature must be above 0, not {temperature}")
    if not 0 <= offset <= columns - image.shape[0]:
        raise ValueError(f"row_offset must lie between 0 and {columns - image.shape[0]}, not {offset}")
    scale = _number("logit_scale", logit_scale, image, wide(*pair))
    doubles = any(x is not None and x.dtype == torch.float64 for x in pair)
    backend = choose("contrastive", image, {"triton": "a tensor is float64"} if doubles else {}).backend
    few = backend == "torch" and image.shape[0] * columns <= ONE_PIECE
    with full_precision(image):
        if kind == "sigmoid":
            bias = _number("logit_bias", 0.0 if logit_bias is None else logit_bias, image, scale.dtype)
            texts = pair.text if pair.all_text is None else pair.all_text
            arguments = (image, texts, scale, bias, offset)
            return sigmoid_reference(*arguments) if few else sigmoid_loss(*arguments, backend), None
        if few:
            terms = reference(pair, scale, temperature, offset)
        else:
            terms, *_ = softmax_terms(*pair, scale, temperature, offset, backend)
    return terms[0], terms[1] if len(terms) == 2 else None
