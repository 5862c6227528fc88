"""Counting the bytes of tensors that are alive, on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..kernels import flops as _flops  # noqa: F401 - registers our operators
from . import meta_outputs

GRADIENTS = "gradients"


class LiveBytes(TorchDispatchMode):
    """While it is active: the bytes of the storages that operators make, by the label under which they were made.

    What an operator of our own uses inside and frees again is not seen. Gradients that a backward pass leaves in the
    parameters given to `watch` are labelled as such.
    """

    def __init__(self, device: torch.device | str, gradient_share: float = 1.0) -> None:
        """device: its tensors count. gradient_share: how much of a gradient counts once it is complete."""
        super().__init__()
        self._device, self._share, self._label = torch.device(device).type, gradient_share, "other"
        self._alive: dict[int, tuple[weakref.ref, str, float]] = {}
        self.now: Counter[str] = Counter()
        """Bytes alive, by label"""
        self.peak, self.at_peak = 0.0, Counter[str]()
        """The most bytes alive at a time, and what they were"""
        self.most: Counter[str] = Counter()
        """The most that was alive under each label"""
        self.written, self.calls, self.flops = 0.0, 0, 0
        """Bytes of all new storages so far; calls of operators; operations of those that torch's counter knows"""

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """What is made inside goes under this name."""
        self._label, before = name, self._label
        try:
            yield
        finally:
            self._label = before

    def label_calls(self, module: nn.Module, name: str) -> None:
        """What the module's forward pass makes goes under this name."""
        before: list[str] = []

        def enter(*_: object) -> None:
            before.append(self._label)
            self._label = name

        def leave(*_: object) -> None:
            self._label = before.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def watch(self, module: nn.Module) -> None:
        """Count what ends up in the parameters' `grad` as gradients, and what is there already as nothing."""
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._add(storage, "model", 0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run, and take note of what comes out."""
        out = meta_outputs.call(func, args, kwargs or {})
        self.calls += 1
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._add(storage, self._label, storage.nbytes())

    def _add(self, storage: torch.UntypedStorage, label: str, size: float) -> None:
        key = storage._cdata
        self._alive[key] = weakref.ref(storage, lambda _: self._freed(key)), label, size
        self.now[label] += size  # type: ignore[assignment]  # Counter takes any number, its stubs only whole ones
        self.written += size
        self.most[label] = max(self.most[label], self.now[label])
        if (total := self.now.total()) > self.peak:
            self.peak, self.at_peak = total, self.now.copy()

    def _freed(self, key: int) -> None:
        _, label, size = self._alive.pop(key)
        self.now[label] -= size  # type: ignore[assignment]  # as in _add

    def _accumulated(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        known = self._alive.get(storage._cdata)
        if known is None or known[1] != GRADIENTS:
            if known is not None:
                self._freed(storage._cdata)
            self._add(storage, GRADIENTS, self._share * storage.nbytes())
