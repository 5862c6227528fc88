"""Activations that are computed again in the backward pass instead of being kept.

Always: what is cheap to compute, inputs of linear layers that come from a norm or an activation function (`Linear`).
Where asked for: whole blocks, which keep their input alone (activation checkpointing, Chen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Make = Callable[[Tensor], Tensor]
"""A function of a tensor that is cheap to compute; what else it needs, it holds without a graph"""
_CHECKPOINTED = ContextVar("_CHECKPOINTED", default=False)
"""Whether the block that runs is computed again as a whole: then nothing in it is to be made a third time"""


class Linear(nn.Linear):
    """A linear layer that need not keep its input: see `linear_of`."""

    def forward(self, made: Tensor, *, source: Tensor | None = None, make: Make | None = None) -> Tensor:
        """[T, D] -> [T, D']. With source and make, made = make(source) is made again in the backward pass.

        They are keywords because ZeRO stage 3 keeps a weight gathered until gradients of all positional inputs have
        passed, and the source gets none from here.
        """
        return linear_of(made, source, make, self.weight, self.bias)


def linear_of(made: Tensor, source: Tensor | None, make: Make | None, weight: Tensor, bias: Tensor) -> Tensor:
    """made W^T + b, where made = make(source) [T, D] is not kept for the backward pass but made again there.

    Whatever makes it keeps its source [T, D] in any case, so that only made is saved: D numbers a token behind a norm,
    4 D behind an MLP's activation function. Under `torch.compile` nothing is done: its partitioner decides. Nor in a
    checkpointed block, whose recomputation ends with the last input that is kept: without this layer's product. Nor
    under autocast, whose casts a backward pass would not know of.
    """
    as_it_is = torch.compiler.is_compiling() or _CHECKPOINTED.get() or not torch.is_grad_enabled()
    as_it_is = as_it_is or (not made.is_meta and torch.is_autocast_enabled(made.device.type))  # meta knows no autocast
    if as_it_is or source is None or make is None:
        return F.linear(made, weight, bias)
    return _LinearOf.apply(made, source.detach(), make, weight, bias)


def again(norm: nn.LayerNorm) -> Make | None:
    """The norm as a function without a graph; None where its parameters are sharded and not here any more."""
    if norm.weight.shape != norm.normalized_shape:
        return None
    shape, weight, bias, eps = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)


class _LinearOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, source: Tensor, make: Make, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.make = make
        return F.linear(made, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None]:
        source, weight = ctx.saved_tensors
        to_made, _, _, to_weight, to_bias = ctx.needs_input_grad
        # In this order: what is made again is gone before the gradient with respect to it takes its place.
        of_weight = gradient.T @ ctx.make(source) if to_weight else None
        of_made = gradient @ weight if to_made else None
        return of_made, None, None, of_weight, gradient.sum(0) if to_bias else None


def run_block(block: nn.Module, index: int, every: int, x: Tensor, *arguments: object) -> Tensor:
    """block(x, *arguments); blocks 0, every, 2 every, ... are checkpointed (every = 0: none).

    Nothing in a block draws random numbers (stochastic depth comes in as an argument), so no generator is kept.
    """
    if every and index % every == 0 and x.requires_grad:
        return checkpoint(_checkpointed, block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(x, *arguments)


def _checkpointed(block: nn.Module, x: Tensor, *arguments: object) -> Tensor:
    before = _CHECKPOINTED.set(True)
    try:
        return block(x, *arguments)
    finally:
        _CHECKPOINTED.reset(before)
