"""Matrices of inner products that are never stored whole: walks over their tiles, shared by the losses.

Letters in shapes: R rows, C columns, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ONE_PIECE = 4 * 2**20
"""Up to this many inner products the torch backend stores the matrix: 16 MiB in fp32, faster than walking."""
TORCH_TILE = (2048, 4096)
"""Rows and columns of a tile of the torch backend: 32 MiB in fp32."""
TRITON_TILE = (4096, 8192)
"""Rows and columns of a tile of logit gradients of the Triton backend: 64 MiB in bf16. Its two products with the
vectors read and write (4096 + 8192) x E sums, little beside 4096 x 8192 x E multiplications."""


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_matrix(name: str, x: object, rows: int | None = None, width: int | None = None) -> None:
    """Raise ValueError naming `name` unless x is a float matrix of so many rows and columns (None: any)."""
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ValueError(f"{name} must be a matrix, not {[*x.shape] if isinstance(x, Tensor) else type(x).__name__}")
    if (rows is not None and x.shape[0] != rows) or (width is not None and x.shape[1] != width):
        wanted = ", ".join("any" if n is None else str(n) for n in (rows, width))
        raise ValueError(f"{name} must be [{wanted}], not {[*x.shape]}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, not {str(x.dtype)[6:]}")


def check_vector(name: str, x: object, length: int) -> None:
    """Raise ValueError naming `name` unless x is a float vector of this length."""
    if not isinstance(x, Tensor) or x.dim() != 1 or x.shape[0] != length or not x.is_floating_point():
        found = f"{[*x.shape]}, {str(x.dtype)[6:]}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a vector of {length} floats, not {found}")


def check_like(name: str, x: Tensor, partner_name: str, partner: Tensor, dtype: bool = True) -> None:
    """Raise ValueError naming `name` unless x has the device and, if `dtype`, the dtype of its partner."""
    if dtype and x.dtype != partner.dtype:
        raise ValueError(f"{name} must be {str(partner.dtype)[6:]} like {partner_name}, not {str(x.dtype)[6:]}")
    if x.device != partner.device:
        raise ValueError(f"{name} must be on {partner.device} like {partner_name}, not on {x.device}")


def full_precision(x: Tensor) -> AbstractContextManager:
    """A region in which autocast does not lower the precision of products."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # meta knows no autocast


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of logits and sums: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def spans(total: int, size: int) -> list[slice]:
    """Neighbouring slices of at most `size` that cover range(total)."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def magnification(dtype: torch.dtype) -> float:
    """A power of two that brings gradients of logits, a few ones in size, into the middle of fp16's range."""
    return 1024.0 if dtype == torch.float16 else 1.0


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out <- out + a @ b, summed in the dtype of `out`; a and b may be half precision."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
    else:  # torch has no product of half-precision matrices with fp32 result on the CPU
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def project(
    tile: Callable[[slice, slice], Tensor], rows: Tensor, columns: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """D @ columns [R, E] and D^T @ rows [C, E], in fp32 (fp64), for a matrix D [R, C] that exists tile by tile.

    tile(r, c): D[r, c], in the dtype of rows and columns. These two products turn the gradient of logits,
    rows @ columns^T, into gradients of the vectors. The order of sums is fixed: the result is reproducible.
    """
    dtype = wide(rows)
    u, v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (rows, columns))
    with full_precision(rows):
        for r in spans(rows.shape[0], size[0]):
            for c in spans(columns.shape[0], size[1]):
                d = tile(r, c)
                add_product_(u[r], d, columns[c])
                add_product_(v[c], d.T, rows[r])
    return u, v


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """sum(a * b) in the dtype of b, some rows at a time."""
    return sum(((a[r] * b[r]).sum() for r in spans(len(a), TRITON_TILE[0])), b.new_zeros(()))
