"""The formats; what a weights file says about itself, and how it becomes towers again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...harmony.image_encoder import ImageEncoder
from ...harmony.text_encoder import TextEncoder
from ..config import RunConfig, dump_config, parse_config
from ..errors import UserError
from . import hf_format, open_clip_format, plain_format, timm_format
from .source import Exported, Source


class Format(Protocol):
    """What the module of a format has."""

    def build(self, source: Source) -> Exported:
        """What it makes of a run. Raises UserError where the run cannot be expressed in it."""

    def restore(self, weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
        """Weights by its library's names -> by ours, `image.` and `text.`."""


FORMATS: dict[str, Format] = {
    "timm": timm_format,
    "open_clip": open_clip_format,
    "safetensors": plain_format,
    "hf": hf_format,
}
KEY = "harmony_fast"
"""Of the safetensors metadata."""


@dataclass
class LoadedTowers:
    """The towers of an exported file."""

    image: ImageEncoder | None
    text: TextEncoder | None


def describe(source: Source, form: str) -> str:
    """JSON: the format, the branch, and the configuration without the places of files."""
    config = dump_config(source.shareable())
    return json.dumps({"format": form, "branch": source.branch, "step": source.step, "config": config})


def exported_file(path: Path) -> Path | None:
    """The weights file that `export` wrote: `path` itself, or the one in the folder `path`; None if there is none.

    Raises UserError where `path` is a file of another kind.
    """
    if path.is_dir():
        return next((file for file in sorted(path.glob("*.safetensors")) if _metadata(file) is not None), None)
    if path.is_file() and _metadata(path) is None:
        raise UserError(f"{path}: not a weights file of `harmony-fast export`; name a run folder or an export")
    return path if path.is_file() else None


def _metadata(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as content:
            return (content.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):
        return None


def exported_format(file: Path) -> str | None:
    """The format of a weights file that `export` wrote; None of any other file."""
    try:
        return json.loads(_metadata(file) or "{}").get("format")
    except ValueError:
        return None


def load_exported(file: Path, device: torch.device | str = "cpu") -> tuple[RunConfig, LoadedTowers]:
    """Configuration and towers of a file that `exported_file` found. Raises UserError where it is damaged."""
    try:
        described = json.loads(_metadata(file) or "")
        config = parse_config(yaml.safe_load(described["config"]), str(file))
        config.evaluate.branch = described["branch"]
        weights = FORMATS[described["format"]].restore(load_file(file), config)
    except (OSError, SafetensorError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    image, text = (_below(weights, tower) for tower in ("image.", "text."))
    try:
        towers = LoadedTowers(_image_tower(config, image), _text_tower(config, text) if text else None)
    except RuntimeError as error:
        raise UserError(f"{file}: does not fit its configuration: {' '.join(str(error).split())[:300]}") from None
    for tower in (towers.image, towers.text):
        if tower is not None:
            tower.to(device).eval().requires_grad_(False)
    return config, towers


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _image_tower(config: RunConfig, weights: dict[str, Tensor]) -> ImageEncoder:
    projection = weights.get("contrastive_projection")
    embed_dim = None if projection is None else projection.shape[1]
    tower = ImageEncoder(config.model.image, config.views.global_size, embed_dim, "masked_embed" in weights)
    tower.load_state_dict(weights)
    return tower


def _text_tower(config: RunConfig, weights: dict[str, Tensor]) -> TextEncoder:
    projection = weights.get("text_projection")
    tower = TextEncoder(config.model.text, None if projection is None else projection.shape[1])
    tower.load_state_dict(weights)
    return tower
