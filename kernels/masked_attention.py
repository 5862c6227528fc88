"""Attention over packed sequences: block-diagonal, optionally causal. Nothing is padded, and no N x N matrix is stored,
but for a few sequences at a time where PyTorch's operators do not serve (`_dense_backward`).

Letters in shapes: T tokens of all sequences laid end to end, S sequences, H heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_layout import Layout, layout_of
from ._context import Context
from .dispatch import choose, half_products

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_WIDEST = 128
"""The largest head dimension of the Triton kernels."""
_WRITTEN, _WRITTEN_ON_CPU = 2**25, 2**19
"""Attention weights that exist at once where they are written out: 128 MiB in fp32; on a CPU what its caches hold"""
_LONGEST_WRITTEN = 512
"""Tokens of the longest sequence whose weights a CPU writes out by choice: 16 MiB in fp32 for 16 heads"""
_FEW_WEIGHTS = 2**16
"""Attention weights of a run, on average, below which a CPU does not write them out: that takes more operators, and
starting them takes longer than what they do"""


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, *, causal: bool = False,
    key_mask: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale Q K^T) V inside each sequence (Vaswani et al. 2017, section 3.2.1).

    q, k, v: [T, H, D], fp16, bf16, fp32 or fp64, any strides; not copied if the last dimension is contiguous.
    offsets: int32 [S + 1] from 0 to T, on the host or beside q; sequence s owns tokens offsets[s] to offsets[s + 1],
    none if they are equal. max_length: tokens of the longest sequence. causal: a query sees no key after its own
    position. key_mask: bool [T], beside q, true = may be attended to; a query that may attend to nothing gives zeros
    and passes no gradient. scale: default D^-1/2. Returns [T, H, D]. Raises ValueError naming the wrong argument.

    Backends (`dispatch`): triton for fp16, bf16, fp32 and D up to 128, with sums and softmax in fp32 and gradients
    that are the same bits in every run; torch for everything; xformers on CUDA, without key_mask and fp64.
    What the offsets say is remembered with the tensor, so pass the same tensor to all layers. The torch backend makes
    one call for neighbouring sequences of equal length, so pack sequences sorted by length.
    Under torch.compile the call is one operator, harmony_fast::masked_attention, on every backend; without it, on
    triton alone, and elsewhere PyTorch's or xformers' operators are called.
    """
    _check(q, k, v, offsets, max_length, key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if not torch.compiler.is_compiling() and (backend := _backend(q, key_mask)) != "triton":
        layout = layout_of(offsets, q.shape[0], max_length)
        return _composed(backend, q, k, v, layout, key_mask, causal, scale)
    return torch.ops.harmony_fast.masked_attention(q, k, v, offsets, key_mask, max_length, causal, scale)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, key_mask: Tensor | None) -> None:
    """Raise ValueError for what shapes, dtypes and devices tell; `layout_of` reads the offsets' values."""
    if q.shape != k.shape or q.shape != v.shape or q.dim() != 3:
        raise ValueError(f"q, k, v must be [T, H, D] of one shape, not {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    if 0 in q.shape:
        raise ValueError(f"q, k, v hold no numbers: {[*q.shape]}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, not {str(q.dtype)[6:]}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, not {x.dtype} on {x.device}")
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [S + 1] of S >= 1 sequences, not {offsets.dtype} {[*offsets.shape]}")
    if offsets.device.type != "cpu" and offsets.device != q.device:
        raise ValueError(f"offsets must be on the host or on {q.device} with q, not on {offsets.device}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, not {max_length}")
    if key_mask is not None and (key_mask.shape != q.shape[:1] or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool [{q.shape[0]}], not {key_mask.dtype} {[*key_mask.shape]}")
    if key_mask is not None and key_mask.device != q.device:
        raise ValueError(f"key_mask must be on {q.device} with q, not on {key_mask.device}")


def _backend(q: Tensor, key_mask: Tensor | None) -> str:
    """triton, torch or xformers."""
    unsupported = {}
    if key_mask is not None:
        unsupported["xformers"] = "xformers' block-diagonal masks take no key_mask"
    elif q.dtype == torch.float64:
        unsupported["xformers"] = "xformers takes no float64"
    if q.shape[-1] > TRITON_WIDEST:
        unsupported["triton"] = f"the Triton kernels take heads of up to {TRITON_WIDEST}, not {q.shape[-1]}"
    return choose("attention", q, unsupported).backend


@torch.library.custom_op(
    "harmony_fast::masked_attention", mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? key_mask, SymInt max_length, bool causal, "
    "float scale) -> (Tensor, Tensor)",
)  # fmt: skip
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, key_mask: Tensor | None, max_length: int, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, H, D] and lse fp32 [H, T], the base-2 log-sum-exp (zeros where the backend is not Triton)."""
    layout = layout_of(offsets, q.shape[0], max_length)
    backend = _backend(q, key_mask)
    if backend == "triton":
        return _triton().forward(*map(_rows_contiguous, (q, k, v)), layout, key_mask, causal, scale)
    out = _composed(backend, q, k, v, layout, key_mask, causal, scale)
    return out.contiguous(), q.new_zeros((q.shape[1], q.shape[0]), dtype=torch.float32)


@_forward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op(
    "harmony_fast::masked_attention_backward", mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor offsets, Tensor? key_mask, "
    "SymInt max_length, bool causal, float scale) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor,
    key_mask: Tensor | None, max_length: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv [T, H, D]."""
    layout = layout_of(offsets, q.shape[0], max_length)
    if _backend(q, key_mask) == "triton":
        dout, q, k, v = map(_rows_contiguous, (dout, q, k, v))
        return _triton().backward(dout, q, k, v, out, lse, layout, key_mask, causal, scale)
    return _dense_backward(dout, q, k, v, layout, key_mask, causal, scale)


@_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets, key_mask, *constants = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, key_mask)
    ctx.constants = tuple(constants)


def _differentiate(ctx: Context, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.harmony_fast.masked_attention_backward(dout, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save)


def _rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous: views into a fused projection are not copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _triton() -> ModuleType:
    """The Triton kernels, imported when they are first used: Triton exists on Linux alone."""
    from . import masked_attention_triton

    return masked_attention_triton


def _composed(
    backend: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, key_mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Attention by the operators of PyTorch or xformers."""
    if backend == "xformers":
        return _xformers(q, k, v, layout, causal, scale)
    if q.device.type in ("cpu", "meta"):
        return _OnCpu.apply(*map(_rows_contiguous, (q, k, v)), layout, key_mask, causal, scale)
    parts, blocks = [], list(_blocks(layout))
    # Cut by `split`: its gradient is one concatenation, that of a slice a whole tensor of zeros.
    cut = zip(*(x.split([count * length for _, (count, length) in blocks]) for x in (q, k, v)), strict=True)
    for (block, shape), piece in zip(blocks, cut, strict=True):
        qs, ks, vs = (x.unflatten(0, shape).transpose(1, 2) for x in piece)
        allowed, idle = _allowed(key_mask, block, shape, causal)
        out = F.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=allowed, is_causal=causal and allowed is None, scale=scale
        )
        if idle is not None:
            out = out.masked_fill(idle, 0)
        parts.append(_tokens_first(out))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _OnCpu(torch.autograd.Function):
    """PyTorch's attention for CPUs, one call for each run of equal lengths.

    Differentiated here so that what it gives is kept once: autograd would keep it run by run, and whatever comes next
    the whole. On the meta device PyTorch would compose attention of products; the operator is named for that as well.
    """

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, layout: Layout, key_mask: Tensor | None, causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """[T, H, D] each -> [T, H, D]."""
        parts, sums, masks = [], [], []
        for block, shape in _blocks(layout):
            allowed, idle = _allowed(key_mask, block, shape, causal)
            options: dict[str, Any] = {"is_causal": causal and allowed is None, "scale": scale}
            if allowed is not None:
                options["attn_mask"] = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -math.inf)
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_heads_first(x, block, shape) for x in (q, k, v)), **options
            )
            parts.append(_tokens_first(out if idle is None else out.masked_fill(idle, 0)))
            sums.append(lse)
            masks.append((idle, options))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        ctx.save_for_backward(q, k, v, whole, *sums)
        ctx.constants = layout, masks, key_mask, causal, scale
        return whole

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k, v."""
        q, k, v, whole, *sums = ctx.saved_tensors
        layout, masks, *constants = ctx.constants
        given = [gradients[0], q, k, v, whole]
        if q.device.type == "cpu" and _multiplies_in_bf16(q):
            # PyTorch's operator is slow in bf16, most of all for short sequences: it is taken in fp32 for few weights,
            # and products in bf16 otherwise.
            if layout.weights * q.shape[1] < _FEW_WEIGHTS * len(layout.runs):
                given = [x.float() for x in given]
            elif layout.longest <= _LONGEST_WRITTEN:
                return *_dense_backward(gradients[0], q, k, v, layout, *constants), None, None, None, None
        parts = []
        for (block, shape), lse, (idle, options) in zip(_blocks(layout), sums, masks, strict=True):
            dout, *inputs = (_heads_first(x, block, shape) for x in given)
            if "attn_mask" in options:
                options = options | {"attn_mask": options["attn_mask"].to(dout.dtype)}
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout if idle is None else dout.masked_fill(idle, 0), *inputs, lse, 0.0, **options
            )
            parts.append([_tokens_first(x) for x in found])
        packed = parts[0] if len(parts) == 1 else [torch.cat(x) for x in zip(*parts, strict=True)]
        return *(x.to(q.dtype) for x in packed), None, None, None, None


def _heads_first(x: Tensor, block: slice, shape: tuple[int, int]) -> Tensor:
    """A run of sequences of [T, H, D]: [count, H, length, D]."""
    return x[block].unflatten(0, shape).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    """[count, H, length, D] -> [count * length, H, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _blocks(layout: Layout) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Tokens of neighbouring sequences of equal length, and their shape: (sequences, length)."""
    for start, count, length in layout.runs:
        yield slice(start, start + count * length), (count, length)


def _allowed(
    key_mask: Tensor | None, block: slice, shape: tuple[int, int], causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each query may see, bool [count, 1, length or 1, length], and which queries see none, with last 1.

    None if the mask hides nothing; on the CPU alone, since elsewhere looking would mean waiting. A query without keys
    is let see all of them, so that its softmax exists; its output is set to zero.
    """
    if key_mask is None or (not key_mask.is_cuda and bool(key_mask[block].all())):
        return None, None
    allowed = key_mask[block].view(shape)[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(shape[1], shape[1], dtype=torch.bool, device=key_mask.device).tril()
    idle = ~allowed.any(-1, keepdim=True)
    return allowed | idle, idle


def _pieces(layout: Layout, q: Tensor) -> Iterator[tuple[slice, tuple[int, int]]]:
    """`_blocks`, cut into as many sequences as may have their attention weights written out at once, at least one."""
    for block, (count, length) in _blocks(layout):
        most = _WRITTEN_ON_CPU if q.device.type == "cpu" else _WRITTEN
        step = max(1, most // (q.shape[1] * length**2))
        for first in range(0, count, step):
            shape = min(step, count - first), length
            start = block.start + first * length
            yield slice(start, start + shape[0] * length), shape


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout, key_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv with the attention weights written out for a few sequences at a time.

    On a CPU that multiplies in bf16, and for the operator under `torch.compile` on the torch backend, inside which
    there is no autograd to ask.
    """
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    for piece, shape in _pieces(layout, q):
        do, qs, ks, vs = (_heads_first(x, piece, shape) for x in (dout, q, k, v))
        allowed, idle = _allowed(key_mask, piece, shape, causal)
        results = _dense_gradients(do, qs, ks, vs, allowed, idle, causal, scale)
        for gradient, result in zip(gradients, results, strict=True):
            gradient[piece] = _tokens_first(result)
    return gradients


def _multiplies_in_bf16(q: Tensor) -> bool:
    """Whether these are bf16 numbers on a device that has products of them."""
    return q.dtype == torch.bfloat16 and (q.device.type != "cpu" or half_products(q.dtype))


def _dense_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, idle: Tensor | None, causal: bool,
    scale: float,
) -> list[Tensor]:  # fmt: skip
    """dq, dk, dv [count, H, length, D] of tensors of that shape, by the formulas of `_attention_kernels`. At least in
    fp32, but for products in bf16 where there are such; fp16 would not hold what passes through them."""
    work = torch.promote_types(q.dtype, torch.float32)
    in_bf16 = _multiplies_in_bf16(q)
    dout, q, k, v = ((x if in_bf16 else x.to(work)).contiguous() for x in (dout, q, k, v))
    scores = (q.to(work) * scale) @ k.to(work).transpose(-1, -2)
    if causal and allowed is None:
        allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if allowed is not None:
        scores.masked_fill_(~allowed, -math.inf)
    p = scores.softmax(-1).to(q.dtype)
    if idle is not None:
        p.masked_fill_(idle, 0)
    ds = torch.ops.aten._softmax_backward_data(dout @ v.transpose(-1, -2), p, -1, p.dtype)
    ds, p, dout, *qk = (x.flatten(0, 1) for x in (ds, p, dout, q, k))
    none = q.new_empty(())  # alpha scales in the products, which spares a pass over ds
    dk, dq = (torch.baddbmm(none, a, b, beta=0, alpha=scale) for a, b in zip((ds.transpose(1, 2), ds), qk, strict=True))
    return [x.unflatten(0, q.shape[:2]) for x in (dq, dk, p.transpose(1, 2) @ dout)]


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, scale: float) -> Tensor:
    """xformers' memory-efficient attention with a block-diagonal mask; CUDA alone."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, BlockDiagonalMask

    kind = BlockDiagonalCausalMask if causal else BlockDiagonalMask
    lengths = layout.lengths[layout.lengths > 0]
    bias = layout.once(("xformers", kind, q.device), lambda: kind.from_seqlens(lengths.tolist(), device=q.device))
    q, k, v = (_rows_contiguous(x)[None] for x in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)[0]


def reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The readable form: one sequence at a time, the attention matrix written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[start:stop], k[start:stop]) * scale
        allowed = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device)
        if causal:
            allowed = allowed.tril()
        if key_mask is not None:
            allowed = allowed & key_mask[start:stop]
        idle = ~allowed.any(-1, keepdim=True)
        weights = scores.masked_fill(~(allowed | idle), -math.inf).softmax(-1).masked_fill(idle, 0)
        out[start:stop] = torch.einsum("hij,jhd->ihd", weights, v[start:stop])
    return out
