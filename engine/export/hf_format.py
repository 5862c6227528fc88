"""Hugging Face's layout, for `transformers.AutoModel.from_pretrained`.

transformers' CLIP has a norm before the blocks of its vision tower and ours has none, so that model cannot hold ours.
`VisionTextDualEncoderModel` can, exactly: its vision tower is a `Dinov2Model` (ours with layer scales of one; it pools
the class token after the final norm), its text tower a `CLIPTextModel`. Without a joint space it is the `Dinov2Model`
alone. The names are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...harmony.text_encoder import TextEncoder
from ..config import RunConfig
from ..data.tokens import tokenizer_options
from ..errors import UserError
from .source import Exported, JointSpace, Source

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

VISION, TEXT = "vision_model.", "text_model."
IMAGE_PARTS = {
    "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
TEXT_PARTS = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
BOTH = """
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
processor, tokenizer = AutoImageProcessor.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
images = processor(pictures, return_tensors="pt")
texts = tokenizer(["a photo of a cat"], padding=True, truncation=True, return_tensors="pt")
similarity = model(**images, **texts).logits_per_image
"""
ALONE = """
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER")
features = model(**processor(pictures, return_tensors="pt")).pooler_output
"""


def build(source: Source) -> Exported:
    """Weights, `config.json`, preprocessing and tokenizer. Raises UserError for a fractional MLP ratio."""
    ratio = source.config.model.image.mlp_ratio
    if ratio % 1:
        raise UserError(f"transformers' Dinov2Model takes a whole mlp_ratio, not {ratio}; export to timm instead")
    files: dict[str, Any] = {"preprocessor_config.json": _preprocessing(source.config)}
    joint = source.joint
    if joint is None:
        weights = _image_weights(source, "")
        files["config.json"] = {"architectures": ["Dinov2Model"], **_vision_config(source.config)}
        return Exported(weights, "model.safetensors", files, "transformers", ALONE)
    weights = _image_weights(source, VISION) | _text_weights(joint.text, source.config)
    weights["visual_projection.weight"] = joint.image_projection.T
    weights["text_projection.weight"] = joint.text_projection.T
    weights["logit_scale"] = joint.logit_scale
    files["config.json"] = _dual_config(joint, source.config)
    files |= _tokenizer(source.config)
    notes = []
    if source.logit_bias is not None:
        bias = float(source.logit_bias)
        notes.append(f"Trained with the sigmoid loss, whose bias has no place here: add {bias:.6g} to the logits.")
    return Exported(weights, "model.safetensors", files, "transformers", BOTH, notes)


def _image_weights(source: Source, prefix: str) -> dict[str, Tensor]:
    ours = source.image.state_dict()
    weights = {
        "embeddings.cls_token": ours["cls_token"], "embeddings.position_embeddings": ours["pos_embed"],
        **{f"embeddings.patch_embeddings.projection.{p}": ours[f"patch_embed.proj.{p}"] for p in ("weight", "bias")},
        **{f"layernorm.{p}": ours[f"norm.{p}"] for p in ("weight", "bias")},
    }  # fmt: skip
    for i in range(source.config.model.image.depth):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        for part in ("weight", "bias"):
            for name, theirs in IMAGE_PARTS.items():
                weights[f"{layer}{theirs}.{part}"] = ours[f"{block}{name}.{part}"]
            for name, value in zip("qkv", ours[f"{block}attn.qkv.{part}"].chunk(3), strict=True):
                weights[f"{layer}attention.{name}_proj.{part}"] = value
        for scale in ("layer_scale1", "layer_scale2"):
            weights[f"{layer}{scale}.lambda1"] = torch.ones_like(ours["norm.weight"])
    return {prefix + name: value for name, value in weights.items()}


def _text_weights(tower: TextEncoder, config: RunConfig) -> dict[str, Tensor]:
    ours = tower.state_dict()
    weights = {
        "embeddings.token_embedding.weight": ours["token_embedding.weight"][: config.model.text.vocabulary],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
        **{f"final_layer_norm.{p}": ours[f"ln_final.{p}"] for p in ("weight", "bias")},
    }
    for i in range(config.model.text.depth):
        block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for part in ("weight", "bias"):
            for name, theirs in TEXT_PARTS.items():
                weights[f"{layer}{theirs}.{part}"] = ours[f"{block}{name}.{part}"]
            for name, value in zip("qkv", ours[f"{block}attn.in_proj_{part}"].chunk(3), strict=True):
                weights[f"{layer}self_attn.{name}_proj.{part}"] = value
    return {TEXT + name: value for name, value in weights.items()}


def restore(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """transformers' names to ours; the mask token, which only training needs, becomes zero."""
    dual = "visual_projection.weight" in weights
    ours = _restore_image(lambda name: weights[(VISION if dual else "") + name], config.model.image.depth)
    if dual:
        ours["image.contrastive_projection"] = weights["visual_projection.weight"].T
        ours |= _restore_text(lambda name: weights[TEXT + name], config.model.text.depth)
        ours["text.text_projection"] = weights["text_projection.weight"].T
    return ours


def _restore_image(theirs: Callable[[str], Tensor], depth: int) -> dict[str, Tensor]:
    ours = {
        "cls_token": theirs("embeddings.cls_token"), "pos_embed": theirs("embeddings.position_embeddings"),
        **{f"patch_embed.proj.{p}": theirs(f"embeddings.patch_embeddings.projection.{p}") for p in ("weight", "bias")},
        **{f"norm.{p}": theirs(f"layernorm.{p}") for p in ("weight", "bias")},
    }  # fmt: skip
    for i in range(depth):
        block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
        for part in ("weight", "bias"):
            for name, other in IMAGE_PARTS.items():
                ours[f"{block}{name}.{part}"] = theirs(f"{layer}{other}.{part}")
            parts = [theirs(f"{layer}attention.{name}_proj.{part}") for name in "qkv"]
            ours[f"{block}attn.qkv.{part}"] = torch.cat(parts)
    return {f"image.{name}": value for name, value in ours.items()}


def _restore_text(theirs: Callable[[str], Tensor], depth: int) -> dict[str, Tensor]:
    words = theirs("embeddings.token_embedding.weight")
    ours = {
        "token_embedding.weight": torch.cat([words, words.new_zeros(1, words.shape[1])]),
        "positional_embedding": theirs("embeddings.position_embedding.weight"),
        **{f"ln_final.{p}": theirs(f"final_layer_norm.{p}") for p in ("weight", "bias")},
    }
    for i in range(depth):
        block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
        for part in ("weight", "bias"):
            for name, other in TEXT_PARTS.items():
                ours[f"{block}{name}.{part}"] = theirs(f"{layer}{other}.{part}")
            parts = [theirs(f"{layer}self_attn.{name}_proj.{part}") for name in "qkv"]
            ours[f"{block}attn.in_proj_{part}"] = torch.cat(parts)
    return {f"text.{name}": value for name, value in ours.items()}


def _dual_config(joint: JointSpace, config: RunConfig) -> dict[str, Any]:
    text = config.model.text
    start, end = _encoder(config.data.tokenizer).all_special_ids[:2]
    return {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": joint.image_projection.shape[1],
        "logit_scale_init_value": float(joint.logit_scale),
        "vision_config": _vision_config(config),
        "text_config": {
            "model_type": "clip_text_model", "vocab_size": text.vocabulary, "hidden_size": text.width,
            "intermediate_size": 4 * text.width, "num_hidden_layers": text.depth, "num_attention_heads": text.heads,
            "max_position_embeddings": text.context, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
            "bos_token_id": start, "eos_token_id": end, "pad_token_id": end,
        },
    }  # fmt: skip


def _vision_config(config: RunConfig) -> dict[str, Any]:
    image = config.model.image
    return {
        "model_type": "dinov2", "hidden_size": image.width, "num_hidden_layers": image.depth,
        "num_attention_heads": image.heads, "mlp_ratio": int(image.mlp_ratio), "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "image_size": config.views.global_size, "patch_size": image.patch_size,
        "qkv_bias": True, "use_mask_token": False,
    }  # fmt: skip


def _preprocessing(config: RunConfig) -> dict[str, Any]:
    size, augment = config.views.global_size, config.data.augment
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": size}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(augment.mean), "image_std": list(augment.std),
    }  # fmt: skip


@lru_cache(maxsize=1)
def _encoder(tokenizer: str) -> SimpleTokenizer:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**tokenizer_options(tokenizer))


def _tokenizer(config: RunConfig) -> dict[str, Any]:
    """The byte-pair vocabulary and merges in the form of transformers' `CLIPTokenizer`."""
    encoder = _encoder(config.data.tokenizer)
    start, end = (encoder.decoder[i] for i in encoder.all_special_ids[:2])
    merges = sorted(encoder.bpe_ranks, key=encoder.bpe_ranks.__getitem__)
    return {
        "vocab.json": encoder.encoder,
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": config.model.text.context, "bos_token": start,
            "eos_token": end, "unk_token": end, "pad_token": end,
        },
    }  # fmt: skip
