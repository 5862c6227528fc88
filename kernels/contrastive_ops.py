"""The contrastive losses as operators of torch, whose logits exist tile by tile; formulas in `contrastive.py`.

Two backends, "triton" and "torch", differ in who makes a row's statistics and a tile of logit gradients; the walk
over tiles and the products with the vectors are the same. Letters in shapes: B local rows, N columns, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._context import Context
from .products import TORCH_TILE, TRITON_TILE, inner_product, magnification, project, spans


class Direction(NamedTuple):
    """Rows [B, E] against columns [N, E], and their teachers [B, E'], [N, E']."""

    rows: Tensor
    columns: Tensor
    teacher_rows: Tensor | None
    teacher_columns: Tensor | None


class Pair(NamedTuple):
    """The vectors of both sides. None in all_*: the columns are the rows."""

    image: Tensor
    text: Tensor
    all_image: Tensor | None = None
    all_text: Tensor | None = None
    teacher_image: Tensor | None = None
    teacher_text: Tensor | None = None
    all_teacher_image: Tensor | None = None
    all_teacher_text: Tensor | None = None

    @property
    def shared(self) -> bool:
        """Whether the logits of text to image are those of image to text, transposed."""
        return self.all_image is None

    def directions(self) -> list[Direction]:
        """Image to text and text to image."""
        images, texts = self.all_image, self.all_text
        teacher_images, teacher_texts = self.all_teacher_image, self.all_teacher_text
        if images is None or texts is None:
            images, texts, teacher_images, teacher_texts = self.image, self.text, self.teacher_image, self.teacher_text
        return [
            Direction(self.image, texts, self.teacher_image, teacher_texts),
            Direction(self.text, images, self.teacher_text, teacher_images),
        ]

    def each(self, change: Callable[[Tensor], Tensor]) -> Pair:
        """All vectors changed in one way."""
        others = (None if x is None else change(x) for x in self[2:])
        return Pair(change(self.image), change(self.text), *others)

    def to(self, dtype: torch.dtype) -> Pair:
        """All vectors in one dtype."""
        return self.each(lambda x: x.to(dtype))


class LogitGradient(NamedTuple):
    """What a tile of the gradient with respect to logits is made of.

    lse, teacher_lse: [1, B], of the rows; if the logits are shared by both directions [2, B], then of the columns
    too. shares: [2], by how much hard and soft term weigh, the larger being 1 or -1. magnify: a power of two that
    keeps small gradients representable (fp16).
    """

    x: Direction
    scale: Tensor
    temperature: float
    offset: int
    lse: Tensor
    teacher_lse: Tensor
    shares: Tensor
    magnify: float


@torch.library.custom_op("harmony_fast::contrastive_terms", mutates_args=())
def softmax_terms(
    image: Tensor, text: Tensor, all_image: Tensor | None, all_text: Tensor | None, teacher_image: Tensor | None,
    teacher_text: Tensor | None, all_teacher_image: Tensor | None, all_teacher_text: Tensor | None,
    scale: Tensor, temperature: float, offset: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The terms, [1] (hard) or [2] (hard, soft), with logsumexp of the logits [2, B] and of the teacher's, or empty."""
    pair = Pair(image, text, all_image, all_text, teacher_image, teacher_text, all_teacher_image, all_teacher_text)
    if backend == "triton":
        from .contrastive_triton import statistics

        with torch.cuda.device_of(image):  # kernels start there (autograd sees to it in backward passes)
            return statistics(pair, scale, temperature, offset)
    return _statistics(pair.to(scale.dtype), scale, temperature, offset)


@softmax_terms.register_fake
def _(
    image: Tensor, text: Tensor, all_image: Tensor | None, all_text: Tensor | None, teacher_image: Tensor | None,
    teacher_text: Tensor | None, all_teacher_image: Tensor | None, all_teacher_text: Tensor | None,
    scale: Tensor, temperature: float, offset: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    soft, shape = teacher_image is not None, (2, len(image))
    return scale.new_empty(2 if soft else 1), scale.new_empty(shape), scale.new_empty(shape if soft else 0)


@torch.library.custom_op("harmony_fast::contrastive_gradients", mutates_args=())
def softmax_gradients(
    grad: Tensor, lse: Tensor, teacher_lse: Tensor, image: Tensor, text: Tensor, all_image: Tensor | None,
    all_text: Tensor | None, teacher_image: Tensor | None, teacher_text: Tensor | None,
    all_teacher_image: Tensor | None, all_teacher_text: Tensor | None, scale: Tensor, temperature: float, offset: int,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of image, text and scale, then, unless the columns are the rows, of all_image and all_text."""
    pair = Pair(image, text, all_image, all_text, teacher_image, teacher_text, all_teacher_image, all_teacher_text)
    tile_size, tile_of = _tiles(backend)
    pair = pair if backend == "triton" else pair.to(scale.dtype)
    # Tiles hold gradients with weights of at most 1, whatever the size of `grad`: fp16 could not hold others.
    largest, magnify = grad.abs().max(), magnification(pair.image.dtype)
    shares = grad / largest.clamp_min(torch.finfo(grad.dtype).tiny)
    weight = largest / (2 * len(image) * magnify)
    parts = []
    for i, direction in enumerate(pair.directions()[: 1 if pair.shared else 2]):
        which = slice(0, 2) if pair.shared else slice(i, i + 1)
        teacher = teacher_lse[which] if len(teacher_lse) else teacher_lse
        source = LogitGradient(direction, scale, temperature, offset, lse[which], teacher, shares, magnify)
        u, v = project(partial(tile_of, source), direction.rows, direction.columns, tile_size)
        parts += [u, v]
    rows = [(pair.image, parts[0])] + ([] if pair.shared else [(pair.text, parts[2])])
    d_scale = weight * sum(inner_product(x, u) for x, u in rows)
    order = parts if pair.shared else [parts[0], parts[2], parts[3], parts[1]]
    vectors = [u.mul_(weight * scale).to(image.dtype) for u in order]
    return [*vectors[:2], d_scale, *vectors[2:]]


@softmax_gradients.register_fake
def _(
    grad: Tensor, lse: Tensor, teacher_lse: Tensor, image: Tensor, text: Tensor, all_image: Tensor | None,
    all_text: Tensor | None, teacher_image: Tensor | None, teacher_text: Tensor | None,
    all_teacher_image: Tensor | None, all_teacher_text: Tensor | None, scale: Tensor, temperature: float, offset: int,
    backend: str,
) -> list[Tensor]:  # fmt: skip
    columns = [x for x in (all_image, all_text) if x is not None]
    return [x.new_empty(x.shape) for x in (image, text, scale, *columns)]


def _save_softmax(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:9])
    ctx.constants = inputs[9:]


def _softmax_backward(ctx: Context, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    image, text, scale, *columns = softmax_gradients(grad, *ctx.saved_tensors, *ctx.constants)
    return image, text, *(columns or (None, None)), None, None, None, None, scale, None, None, None


softmax_terms.register_autograd(_softmax_backward, setup_context=_save_softmax)


@torch.library.custom_op("harmony_fast::sigmoid_contrast", mutates_args=())
def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str) -> Tensor:
    """The sigmoid term: rows `image` [B, E], columns `text` [N, E]."""
    if backend == "triton":
        from .contrastive_triton import sigmoid_sum

        with torch.cuda.device_of(image):
            return sigmoid_sum(image, text, scale, bias, offset) / len(image)
    image, text = image.to(scale.dtype), text.to(scale.dtype)
    loss = torch.zeros_like(scale)
    for r in spans(len(image), TORCH_TILE[0]):
        for c in spans(len(text), TORCH_TILE[1]):
            z = torch.addmm(bias, image[r] * scale, text[c].T)
            diagonal(z, r, c, offset).neg_()
            loss += F.softplus(z).sum()
    return loss / len(image)


@sigmoid_loss.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str) -> Tensor:
    return torch.empty_like(scale)


@torch.library.custom_op("harmony_fast::sigmoid_gradients", mutates_args=())
def sigmoid_gradients(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, scale and bias."""
    dtype = image.dtype
    if backend == "triton":
        from .contrastive_triton import sigmoid_gradient
    else:
        sigmoid_gradient = _sigmoid_gradient
        image, text = image.to(scale.dtype), text.to(scale.dtype)
    magnify = magnification(image.dtype)
    weight = grad / (len(image) * magnify)
    total = torch.zeros_like(scale)

    def tile(r: slice, c: slice) -> Tensor:
        d = sigmoid_gradient(image, text, scale, bias, offset, magnify, r, c)
        total.add_(d.sum(dtype=scale.dtype))
        return d

    u, v = project(tile, image, text, TRITON_TILE if backend == "triton" else TORCH_TILE)
    d_scale = weight * inner_product(image, u)
    d_image, d_text = (x.mul_(weight * scale).to(dtype) for x in (u, v))
    return d_image, d_text, d_scale, weight * total


@sigmoid_gradients.register_fake
def _(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape), torch.empty_like(scale), torch.empty_like(bias)


def _save_sigmoid(ctx: Context, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _sigmoid_backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *sigmoid_gradients(grad, *ctx.saved_tensors, *ctx.constants), None, None


sigmoid_loss.register_autograd(_sigmoid_backward, setup_context=_save_sigmoid)


def diagonal(tile: Tensor, r: slice, c: slice, offset: int) -> Tensor:
    """The matching pairs' places in a tile, a view: column = row + offset."""
    shift = r.start + offset - c.start
    inside = -tile.shape[0] < shift < tile.shape[1]
    return tile.diagonal(shift) if inside else tile.new_empty(0)


def _statistics(pair: Pair, scale: Tensor, temperature: float, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """The torch backend of `softmax_terms`. Vectors in the dtype of scale."""
    batch, soft = len(pair.image), pair.teacher_image is not None
    lse = scale.new_full((2, batch), float("-inf"))
    teacher_lse = torch.full_like(lse, float("-inf")) if soft else scale.new_empty(0)
    expected, label = torch.zeros_like(lse), torch.empty_like(lse)

    def take_in(i: int, rows: slice, z: Tensor, t: Tensor | None) -> None:
        lse[i, rows] = torch.logaddexp(lse[i, rows], z.logsumexp(1))
        if t is not None:
            before, tile = teacher_lse[i, rows], t.logsumexp(1)
            after = torch.logaddexp(before, tile)
            mean = torch.linalg.vecdot((t - after[:, None]).exp_(), z)
            expected[i, rows] = expected[i, rows] * (before - after).exp() + mean
            teacher_lse[i, rows] = after

    for i, x in enumerate(pair.directions()):
        label[i] = scale * torch.linalg.vecdot(x.rows, x.columns[offset : offset + batch])
        if pair.shared and i == 1:
            break  # seen already, as columns of the first direction
        for r in spans(batch, TORCH_TILE[0]):
            for c in spans(len(x.columns), TORCH_TILE[1]):
                z, t = _logits(x, scale, temperature, r, c)
                take_in(i, r, z, t)
                if pair.shared:
                    take_in(1, c, z.T, None if t is None else t.T)
    terms = torch.stack([lse - label] + ([lse - expected] if soft else []))
    return terms.mean((1, 2)), lse, teacher_lse


def _logits(x: Direction, scale: Tensor, temperature: float, r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
    """A tile of the student's and the teacher's logits."""
    z = x.rows[r] * scale @ x.columns[c].T
    if x.teacher_rows is None or x.teacher_columns is None:
        return z, None
    return z, x.teacher_rows[r] / temperature @ x.teacher_columns[c].T


def _logit_gradient(g: LogitGradient, r: slice, c: slice) -> Tensor:
    """The torch backend's tile of logit gradients, without the factor that is common to all."""
    z, t = _logits(g.x, g.scale, g.temperature, r, c)

    def softmaxes(logits: Tensor, lse: Tensor) -> Tensor:
        by_row = (logits - lse[0, r, None]).exp_()
        return by_row if len(lse) == 1 else by_row.add_(logits.sub_(lse[1, c]).exp_())

    d = softmaxes(z, g.lse).mul_(g.shares.sum())
    diagonal(d, r, c, g.offset).sub_(g.shares[0] * len(g.lse))
    return d if t is None else d.sub_(softmaxes(t, g.teacher_lse).mul_(g.shares[1]))


def _sigmoid_gradient(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int, magnify: float, r: slice, c: slice
) -> Tensor:
    """The torch backend's tile of the gradient with respect to sigmoid logits."""
    z = torch.addmm(bias, image[r] * scale, text[c].T)
    diagonal(z, r, c, offset).neg_()
    d = z.sigmoid_()
    diagonal(d, r, c, offset).neg_()
    return d


def _tiles(backend: str) -> tuple[tuple[int, int], Callable[[LogitGradient, slice, slice], Tensor]]:
    """A backend's tile size and the maker of its tiles of logit gradients."""
    if backend == "torch":
        return TORCH_TILE, _logit_gradient
    from .contrastive_triton import logit_gradient

    return TRITON_TILE, logit_gradient
