"""What a configuration makes: the model as it is trained, and how many micro-batches make a step."""

from __future__ import annotations

from ..harmony.heads import PixelDecoder
from ..harmony.image_encoder import ImageEncoder
from ..harmony.model import Harmony
from ..harmony.objectives import Collectives
from ..harmony.text_encoder import TextTransformer
from .compiled import compile_blocks
from .config import RunConfig
from .errors import UserError


def build_model(config: RunConfig) -> Harmony:
    """The model with the run's activation checkpointing and compilation."""
    model = Harmony(config)
    for module in model.modules():
        if isinstance(module, ImageEncoder | PixelDecoder):
            module.checkpoint_every = config.activation_checkpointing.image
        elif isinstance(module, TextTransformer):
            module.checkpoint_every = config.activation_checkpointing.text
    if config.compile:
        compile_blocks(model)
    return model


def count_micro_batches(config: RunConfig, ranks: Collectives) -> int:
    """How many micro-batches make a rank's step. Raises UserError if samples would be left over."""
    own = config.data.samples_per_rank(ranks.world_size)
    size = config.data.micro_batch_size or own
    if own % size:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is {own} samples a rank, which data.micro_batch_size {size} "
            "does not divide"
        )
    return own // size
