"""Which backend computes an operation, and why.

The order of say: the environment variable HARMONY_FAST_KERNELS, then `prefer` (the configuration's `kernels:`), then
the first backend of `OPERATIONS` that can take the tensor.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .interpreter import install, interpreting

VARIABLE = "HARMONY_FAST_KERNELS"

OPERATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("triton", "torch", "xformers"),
    "contrastive": ("triton", "torch"),
    "prototype_ce": ("triton", "torch"),
    "ema": ("triton", "torch"),
}
"""The backends of each operation, best first. `torch` takes everything; `xformers` must be asked for."""

_preferred: dict[str, str] = {}


class Choice(NamedTuple):
    """A backend and the reason for it, in words."""

    backend: str
    reason: str


def prefer(backends: dict[str, str]) -> None:
    """Ask for backends by operation ("auto": choose). Raises ValueError for an unknown operation or backend."""
    for operation, backend in backends.items():
        if operation not in OPERATIONS:
            raise ValueError(f"kernels: unknown operation '{operation}'; known: {', '.join(OPERATIONS)}")
        if backend != "auto" and backend not in OPERATIONS[operation]:
            raise ValueError(f"kernels.{operation}: '{backend}' is none of auto, {', '.join(OPERATIONS[operation])}")
    _preferred.update(backends)


@contextmanager
def preferring(backend: str | dict[str, str]) -> Iterator[None]:
    """`prefer` backends by operation, or one for every operation that has it, for a while."""
    before = dict(_preferred)
    if isinstance(backend, str):
        backend = {o: backend for o, backends in OPERATIONS.items() if backend in ("auto", *backends)}
    try:
        prefer(backend)
        yield
    finally:
        _preferred.clear()
        _preferred.update(before)


def choose(operation: str, x: Tensor, unsupported: dict[str, str] | None = None) -> Choice:
    """The backend for an operation on tensors like `x`.

    unsupported: backends that cannot take these arguments, with the reason; known to the operation alone.
    Raises ValueError if a backend that was asked for cannot do it.
    """
    choice = _decide(operation, x, unsupported or {})
    if choice.backend == "triton" and interpreting():
        install()
    return choice


def _decide(operation: str, x: Tensor, unsupported: dict[str, str]) -> Choice:
    wanted, origin = _wanted(operation)
    if wanted == "xformers" and x.device.type == "meta":
        return Choice("triton", "on tensors without contents it stands for xformers, which keeps as much")
    obstacles = {"triton": triton_obstacle(x), "xformers": xformers_obstacle(x), **unsupported}
    if wanted != "auto":
        if obstacle := obstacles.get(wanted):
            raise ValueError(f"{operation}: {origin} asks for {wanted}, but {obstacle}")
        return Choice(wanted, f"{origin} asks for it")
    if obstacles["triton"] is None:
        return Choice("triton", "TRITON_INTERPRET is set" if interpreting() else "CUDA tensors")
    return Choice("torch", obstacles["triton"])


def triton_obstacle(x: Tensor) -> str | None:
    """Why Triton cannot take a tensor like `x`; None if it can."""
    if not _has("triton"):
        return "Triton is not installed"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels take float32, float16 and bfloat16, not {str(x.dtype)[6:]}"
    imagined = x.device.type == "meta"  # tensors without contents stand for those of a GPU: of this machine's, if any
    if interpreting() or (imagined and not torch.cuda.is_available()):
        return None
    if not (x.is_cuda or imagined):
        return f"the tensors are on the {x.device.type.upper()}"
    capability = _capability(torch.device("cuda", 0) if imagined else x.device)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 or higher"
    return None


def xformers_obstacle(x: Tensor) -> str | None:
    """Why xformers cannot take a tensor like `x`; None if it can."""
    if not _has("xformers"):
        return "xformers is not installed (pip install xformers)"
    return None if x.is_cuda else "xformers has no operator for the CPU"


def _wanted(operation: str) -> tuple[str, str]:
    """The backend asked for, and where."""
    backend = os.environ.get(VARIABLE)
    if backend not in (None, "auto", "triton", "torch", "xformers"):
        raise ValueError(f"{VARIABLE}: '{backend}' is none of auto, triton, torch, xformers")
    if backend is not None and backend in ("auto", *OPERATIONS[operation]):
        return backend, VARIABLE
    return _preferred.get(operation, "auto"), f"kernels.{operation}"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def half_products(dtype: torch.dtype) -> bool:
    """Whether this processor (not a GPU) multiplies matrices in a half precision, by oneDNN; False for other dtypes."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in native and native[dtype]()
