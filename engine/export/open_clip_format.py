"""Both towers as open_clip's `CLIP`: timm's ViT as the vision tower, open_clip's own text tower.

Our text tower has CLIP's QuickGELU, our image tower the exact GELU and no norm before its blocks. open_clip has one
`quick_gelu` switch for both of its own towers; with timm's ViT on the vision side it concerns the text alone, which is
our model exactly. open_clip makes timm's model from its name, without further arguments: sizes that have no name in
timm are named by the folder of a timm configuration, so such an export knows the place where it lies.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..data.tokens import CLIP, tokenizer_options
from ..errors import UserError
from .source import Exported, JointSpace, Source
from .timm_format import architecture, backbone, timm_config

TRUNK, PROJECTION = "visual.trunk.", "visual.head.proj.weight"
TOWER = "image_tower"
"""Subfolder of the timm configuration."""
USAGE = """
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
image_embeddings = model.encode_image(images, normalize=True)
text_embeddings = model.encode_text(tokenizer(["a photo of a cat"]), normalize=True)
"""


def build(source: Source) -> Exported:
    """Weights and `open_clip_config.json`. Raises UserError without a joint space."""
    joint = source.joint
    if joint is None:
        raise UserError("open_clip needs both towers and their joint space, which the contrastive objective trains")
    name, arguments = architecture(source.config)
    files: dict[str, Any] = {}
    notes = []
    if arguments:
        tower = (source.folder / TOWER).resolve()
        name = f"local-dir:{tower}"
        files[f"{TOWER}/config.json"] = timm_config(source.config)
        notes.append(
            f"timm has no name for an image tower of this size, so `open_clip_config.json` names the folder `{TOWER}` "
            "by its full path (`timm_model_name`): correct that line when the folder is moved."
        )
    if source.logit_bias is not None:
        notes.append("Trained with the sigmoid loss: `model.logit_bias` belongs to the logits.")
    files["open_clip_config.json"] = open_clip_config(source, joint, name)
    return Exported(open_clip_weights(source, joint), "open_clip_model.safetensors", files, "open_clip", USAGE, notes)


def open_clip_weights(source: Source, joint: JointSpace) -> dict[str, Tensor]:
    """Our weights under open_clip's names, without the mask tokens."""
    weights = {TRUNK + name: value for name, value in backbone(source.image).items()}
    weights[PROJECTION] = joint.image_projection.T
    weights |= joint.text.state_dict()
    weights["token_embedding.weight"] = weights["token_embedding.weight"][: source.config.model.text.vocabulary]
    weights["logit_scale"] = joint.logit_scale
    if source.logit_bias is not None:
        weights["logit_bias"] = source.logit_bias
    return weights


def restore(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """open_clip's names to ours; the mask token, which only training needs, becomes zero."""
    ours = {}
    for name, value in weights.items():
        if name.startswith(TRUNK):
            ours["image." + name.removeprefix(TRUNK)] = value
        elif name == PROJECTION:
            ours["image.contrastive_projection"] = value.T
        elif not name.startswith("logit_"):
            ours["text." + name] = value
    words = ours["text.token_embedding.weight"]
    ours["text.token_embedding.weight"] = torch.cat([words, words.new_zeros(1, words.shape[1])])
    return ours


def open_clip_config(source: Source, joint: JointSpace, timm_name: str) -> dict[str, Any]:
    """open_clip's description of the model and its preprocessing."""
    text, augment = source.config.model.text, source.config.data.augment
    tokenizer = source.config.data.tokenizer
    options = {} if tokenizer == CLIP else tokenizer_options(tokenizer)
    if "bpe_path" in options:
        options["bpe_path"] = str(Path(options["bpe_path"]).resolve())
    model: dict[str, Any] = {
        "embed_dim": joint.image_projection.shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "timm_model_name": timm_name, "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear",
            "timm_proj_bias": False, "image_size": source.config.views.global_size,
        },
        "text_cfg": {
            "context_length": text.context, "vocab_size": text.vocabulary, "width": text.width, "heads": text.heads,
            "layers": text.depth, **({"tokenizer_kwargs": options} if options else {}),
        },
    }  # fmt: skip
    if source.logit_bias is not None:
        model["init_logit_bias"] = float(source.logit_bias)
    preprocessing = {
        "mean": list(augment.mean), "std": list(augment.std), "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    return {"model_cfg": model, "preprocess_cfg": preprocessing}
