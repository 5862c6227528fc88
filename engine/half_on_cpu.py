"""Half precision on processors that cannot multiply in it: products run in fp32 and are rounded to half.

Without bf16 (fp16) instructions torch multiplies half-precision matrices element by element, hundreds of times slower
than in fp32. Parameters and activations stay half, so a run computes what hardware that accumulates in fp32 would.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..kernels.dispatch import half_products

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class ProductsInFloat(TorchDispatchMode):
    """Runs `PRODUCTS` of half-precision CPU tensors in fp32; forward and backward alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Raise the operands, run, round what comes out to the operands' precision."""
        kwargs = kwargs or {}
        half = next((a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype in HALF), None)
        if func not in PRODUCTS or half is None:
            return func(*args, **kwargs)
        raised = tree_map(lambda a: a.float() if isinstance(a, torch.Tensor) and a.dtype in HALF else a, (args, kwargs))
        out = func(*raised[0], **raised[1])
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            return out[0].to(half), out[1]  # the second output, log-sum-exp, is fp32 by contract
        return tree_map(lambda t: t.to(half), out)


def products_for(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """The mode to train in: `ProductsInFloat` where the processor needs it, nothing elsewhere."""
    if device.type != "cpu" or dtype not in HALF:
        return nullcontext()
    return nullcontext() if half_products(dtype) else ProductsInFloat()
