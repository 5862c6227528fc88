"""The arithmetic of this package's operators, for torch's counters (`FlopCounterMode`): importing this registers it.

Apart from the operators, because torch's registry imports Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import masked_attention as _attention  # noqa: F401 - defines the operators
from . import prototype_cross_entropy as _prototypes  # noqa: F401


@register_flop_formula(torch.ops.harmony_fast.masked_attention, get_raw=True)
def attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *rest: object, **_: object) -> int:
    """Two products over all pairs of a query and a key it may see."""
    return 2 * 2 * q.shape[1] * q.shape[2] * _pairs(offsets, causal=bool(rest[2]))


@register_flop_formula(torch.ops.harmony_fast.masked_attention_backward, get_raw=True)
def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets: Tensor, *rest: object, **_: object
) -> int:
    """Five products: the scores again, and the gradients of scores, q, k and v."""
    return 5 * 2 * q.shape[1] * q.shape[2] * _pairs(offsets, causal=bool(rest[2]))


def _pairs(offsets: Tensor, causal: bool) -> int:
    lengths = offsets.diff().long()
    return int((lengths * (lengths + 1) // 2 if causal else lengths * lengths).sum())


@register_flop_formula(torch.ops.harmony_fast.prototype_loss)
def prototype_loss(student: torch.Size, student_weight: torch.Size, *_: object, **__: object) -> int:
    """The products that must be: both sides' logits, and two for the gradients."""
    return 4 * 2 * student[0] * student_weight[0] * student_weight[1]
