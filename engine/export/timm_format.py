"""The image tower as a `VisionTransformer` of timm: our parameters have timm's names, so they stay what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..config import RunConfig
from .source import Exported, Source

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ARCHITECTURES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
"""(width, depth, heads) -> timm's name of the size."""
NOT_TIMM = ("masked_embed", "contrastive_projection")
"""What timm's model has no place for."""


def build(source: Source) -> Exported:
    """Weights, and timm's `config.json` for `local-dir:` and the Hugging Face hub."""
    name, arguments = architecture(source.config)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    overlay = "".join(f", {key}={value!r}" for key, value in preprocessing(source.config).items())
    usage = f"""
import timm

model = timm.create_model("{name}", pretrained=True, num_classes=0{words},
                          pretrained_cfg_overlay=dict(file="FILE"{overlay}))
# the same where `config.json` lies in the folder: timm.create_model("local-dir:FOLDER", pretrained=True)
features = model(images)                   # [B, width], the class token
tokens = model.forward_features(images)    # [B, 1 + patches, width]
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
"""
    files = {"config.json": timm_config(source.config)}
    return Exported(backbone(source.image), "model.safetensors", files, "timm", usage)


def backbone(image: nn.Module) -> dict[str, Tensor]:
    """The image tower's weights as timm has them."""
    return {name: value for name, value in image.state_dict().items() if name not in NOT_TIMM}


def restore(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """timm's names to ours."""
    return {f"image.{name}": value for name, value in weights.items()}


def architecture(config: RunConfig) -> tuple[str, dict[str, Any]]:
    """timm's name of the nearest model, and the arguments in which ours differs from it."""
    import timm

    image, size = config.model.image, config.views.global_size
    known = ARCHITECTURES.get((image.width, image.depth, image.heads))
    name = f"vit_{known}_patch{image.patch_size}_224"
    arguments: dict[str, Any] = {}
    if known is None or not timm.is_model(name):
        name = f"vit_{known or 'base'}_patch16_224"
        arguments["patch_size"] = image.patch_size
    if known is None:
        arguments |= {"embed_dim": image.width, "depth": image.depth, "num_heads": image.heads}
    if image.mlp_ratio != 4:
        arguments["mlp_ratio"] = image.mlp_ratio
    if size != 224:
        arguments["img_size"] = size
    return name, arguments


def timm_config(config: RunConfig) -> dict[str, Any]:
    """timm's description of the model and its preprocessing."""
    name, arguments = architecture(config)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": config.model.image.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "harmony", "custom_load": False, "fixed_input_size": True, **preprocessing(config), "num_classes": 0,
            "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def preprocessing(config: RunConfig) -> dict[str, Any]:
    """How images become what the model was trained on, in timm's words."""
    size, augment = config.views.global_size, config.data.augment
    return {
        "input_size": [3, size, size], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
        "mean": list(augment.mean), "std": list(augment.std),
    }  # fmt: skip


def timm_model(image: nn.Module, config: RunConfig, **arguments: Any) -> VisionTransformer:
    """timm's model with the image tower's weights. arguments: of `timm.create_model`, e.g. num_classes."""
    import timm

    name, own = architecture(config)
    model = cast("VisionTransformer", timm.create_model(name, **{"num_classes": 0, **own, **arguments}))
    with torch.no_grad():
        model.load_state_dict({**model.state_dict(), **backbone(image)})
    return model
