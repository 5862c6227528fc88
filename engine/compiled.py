"""torch.compile for the transformer blocks."""

from __future__ import annotations

import torch

from ..harmony.image_encoder import Block, ImageEncoder
from ..harmony.model import Harmony
from ..harmony.text_encoder import TextBlock

RECOMPILE_LIMIT = 32
"""Blocks of all widths share the code of one class, and each needs programs of its own (torch's default is 8)"""


def compile_blocks(model: Harmony) -> None:
    """Compile every transformer block, in place, each as one graph; parameters keep their names.

    Blocks of one shape share one program. An image pack has the same number of tokens in every step, and its programs
    are made for that number. With stochastic depth, and for captions, the number differs from step to step: it is a
    symbol in the program, so that nothing is padded to a bucket and nothing is compiled again. So is the number of
    masked patches, which the last block of an image tower goes on with.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    varies = bool(model.config.model.image.drop_path)
    last = {id(module.blocks[-1]) for module in model.modules() if isinstance(module, ImageEncoder)}
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=varies or id(module) in last)
        elif isinstance(module, TextBlock):
            module.compile(dynamic=True)
