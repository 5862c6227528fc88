"""torch.compile for the transformer blocks."""

from __future__ import annotations

import torch

from ..harmony.heads import PixelDecoder
from ..harmony.image_encoder import Block, ImageEncoder
from ..harmony.model import Harmony
from ..harmony.text_encoder import TextBlock
from ..harmony.views import View

RECOMPILE_LIMIT = 32
"""Blocks of all widths share the code of one class, and each needs programs of its own (torch's default is 8)"""


def compile_blocks(model: Harmony) -> None:
    """Compile every transformer block, in place, each as one graph; parameters keep their names.

    Blocks of one shape share one program, made for a number of tokens where that is the same in every step. Where it
    differs from step to step, it is a symbol in the program, so that nothing is padded to a bucket and nothing is
    compiled again: for captions; for the student's images as `tokens_differ` says; for the last block of an image
    tower or pixel decoder, which goes on with the masked or removed patches.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    symbolic = {id(m.blocks[-1]) for m in model.modules() if isinstance(m, ImageEncoder | PixelDecoder)}
    if model.student.image is not None and tokens_differ(model):
        symbolic |= {id(block) for block in model.student.image.blocks}
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=id(module) in symbolic)
        elif isinstance(module, TextBlock):
            module.compile(dynamic=True)


def tokens_differ(model: Harmony) -> bool:
    """Whether the number of the student's image tokens differs from step to step: with stochastic depth, where plain
    crops are taken from masked ones that hide nothing, and while the share of removed patches changes."""
    config = model.config
    shared = {View.GLOBAL_PLAIN, View.GLOBAL_MASKED} <= model.student_views.keys()
    return bool(config.model.image.drop_path) or shared or config.views.pixel_mask_ratio_end is not None
