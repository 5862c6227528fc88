"""What a rank holds and sends, by ZeRO stage: formulas, held against counted bytes in tests/engine/test_zero.py.

Letters: P trained parameters, T those of them with a twin in the teacher, N ranks, e bytes of an element of the compute
copy (2 for bf16 and fp16, 4 for fp32), m = 8 bytes of AdamW's two fp32 moments (2 with 8-bit states).
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """Numbers of parameters."""

    trained: int
    """P"""
    twins: int
    """T"""


def held_bytes(sizes: Sizes, stage: int, ranks: int, element: int = 2, moments: int = 8) -> dict[str, float]:
    """Bytes that a rank keeps for the whole run, by part; activations and buckets come on top.

    parameters: e (P + T), student and teacher; in stage 3 / N.
    gradients: e P; from stage 2 on / N.
    masters: the fp32 weights that AdamW moves, 4 P, none where the parameters are fp32 in stage 0; from stage 1 on / N.
    moments: m P; from stage 1 on / N. ema: the teacher in fp32, 4 T; from stage 1 on / N.
    """
    p, t = sizes
    optimizer, gradients, parameters = (ranks if stage >= first else 1 for first in (1, 2, 3))
    return {
        "parameters": element * (p + t) / parameters,
        "gradients": element * p / gradients,
        "masters": 0.0 if element == 4 and stage == 0 else 4 * p / optimizer,
        "moments": moments * p / optimizer,
        "ema": 4 * t / optimizer,
    }


def messages(sizes: Sizes, stage: int, element: int = 2) -> dict[str, int]:
    """Bytes of the collectives' tensors in one step, by kind; embeddings and centers are below a thousandth of it.

    Stages 0 to 2 all-reduce the gradients once, e P (DeepSpeed's stages 1 and 2 reduce buckets whole). Stages 1 and 2
    then gather what changed: student e P and teacher e T. Stage 3 reduces gradients to their owners, e P, and gathers
    each parameter where it is used: in the forward and in the backward pass, and once in the teacher's, e (2 P + T) at
    least; parts that two passes use, such as the text tower with plain and masked captions, may be gathered again.
    """
    p, t = sizes
    if stage == 3:
        return {"reduce_scatter": element * p, "all_gather": element * (2 * p + t)}
    return {"all_reduce": element * p, "all_gather": element * (p + t) if stage else 0}


def sent_bytes(sizes: Sizes, stage: int, ranks: int, element: int = 2) -> float:
    """Bytes that a rank sends in one step with ring algorithms (NCCL's for large messages).

    Of a message of n bytes an all-gather or a reduce-scatter sends n (N - 1) / N, an all-reduce twice that.
    """
    share = (ranks - 1) / ranks
    return sum((2 if kind == "all_reduce" else 1) * share * n for kind, n in messages(sizes, stage, element).items())
