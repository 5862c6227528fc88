"""Both towers under our own names in one file, mask tokens included: nothing is lost, no library is needed."""

from __future__ import annotations

from torch import Tensor

from ..config import RunConfig
from .source import Exported, Source

USAGE = """
from pathlib import Path

from harmony_fast.engine.export.metadata import load_exported

config, towers = load_exported(Path("FILE"))
tokens = towers.image.features(images)          # [B, 1 + patches, width], class token first
embeddings = towers.image.project(tokens[:, 0])  # where the run has a joint space
"""


def build(source: Source) -> Exported:
    """See the head of this file."""
    weights = {f"image.{name}": value for name, value in source.image.state_dict().items()}
    if source.text is not None:
        weights |= {f"text.{name}": value for name, value in source.text.state_dict().items()}
    for name, value in (("logit_scale", source.logit_scale), ("logit_bias", source.logit_bias)):
        if value is not None:
            weights[name] = value
    return Exported(weights, "model.safetensors", {}, "harmony-fast", USAGE)


def restore(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Our names already."""
    return weights
