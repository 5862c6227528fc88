"""Activation checkpointing (Chen et al. 2016): some blocks keep only their input and run again in the backward pass."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, index: int, every: int, x: Tensor, *arguments: object) -> Tensor:
    """block(x, *arguments); blocks 0, every, 2 every, ... are checkpointed (every = 0: none).

    Nothing in a block draws random numbers (stochastic depth comes in as an argument), so no generator is kept.
    """
    if every and index % every == 0 and x.requires_grad:
        return checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
    return block(x, *arguments)
