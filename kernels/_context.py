"""What autograd hands from the forward pass of one of our operators to its backward pass."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Context(Protocol):
    """The first argument of what is given to `register_autograd`, as far as it is used here."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    constants: tuple[Any, ...]
    """Ours: what the backward pass needs beside tensors"""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, inputs or outputs alone."""
