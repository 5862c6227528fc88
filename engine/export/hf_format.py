"""Hugging Face's layout, for `transformers.AutoModel.from_pretrained`.

transformers' CLIP has a norm before the blocks of its vision tower and ours has none, so that model cannot hold ours.
`VisionTextDualEncoderModel` can, exactly: its vision tower is a `Dinov2Model` (ours with layer scales of one; it pools
the class token after the final norm), its text tower a `CLIPTextModel`. Without a joint space it is the `Dinov2Model`
alone. The names are those of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    from ..data.clip_tokenizer import SimpleTokenizer

VISION, TEXT = "vision_model.", "text_model."
WORDS = "token_embedding.weight"
"""Ours has a last row that theirs has not: the mask token's."""
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


def _image_names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """Our names of the image tower's weights and theirs: several where they keep apart what is one tensor here."""
    yield "cls_token", ["embeddings.cls_token"]
    yield "pos_embed", ["embeddings.position_embeddings"]
    for part in ("weight", "bias"):
        yield f"patch_embed.proj.{part}", [f"embeddings.patch_embeddings.projection.{part}"]
        yield f"norm.{part}", [f"layernorm.{part}"]
        for i in range(depth):
            block, layer = f"blocks.{i}.", f"encoder.layer.{i}."
            for name, theirs in IMAGE_PARTS.items():
                yield f"{block}{name}.{part}", [f"{layer}{theirs}.{part}"]
            yield f"{block}attn.qkv.{part}", [f"{layer}attention.{name}_proj.{part}" for name in "qkv"]


def _text_names(depth: int) -> Iterator[tuple[str, list[str]]]:
    """The same of the text tower."""
    yield WORDS, ["embeddings.token_embedding.weight"]
    yield "positional_embedding", ["embeddings.position_embedding.weight"]
    for part in ("weight", "bias"):
        yield f"ln_final.{part}", [f"final_layer_norm.{part}"]
        for i in range(depth):
            block, layer = f"transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for name, theirs in TEXT_PARTS.items():
                yield f"{block}{name}.{part}", [f"{layer}{theirs}.{part}"]
            yield f"{block}attn.in_proj_{part}", [f"{layer}self_attn.{name}_proj.{part}" for name in "qkv"]


def _theirs(ours: dict[str, Tensor], names: Iterator[tuple[str, list[str]]], prefix: str) -> dict[str, Tensor]:
    return {
        prefix + theirs: value
        for name, group in names
        for theirs, value in zip(group, ours[name].chunk(len(group)), strict=True)
    }


def _ours(theirs: dict[str, Tensor], names: Iterator[tuple[str, list[str]]], prefix: str) -> dict[str, Tensor]:
    return {name: torch.cat([theirs[prefix + other] for other in group]) for name, group in names}


def _image_weights(source: Source, prefix: str) -> dict[str, Tensor]:
    ours, depth = source.image.state_dict(), source.config.model.image.depth
    ones = torch.ones_like(ours["norm.weight"])
    scales = {f"{prefix}encoder.layer.{i}.layer_scale{n}.lambda1": ones for i in range(depth) for n in (1, 2)}
    return _theirs(ours, _image_names(depth), prefix) | scales


def _text_weights(tower: TextEncoder, config: RunConfig) -> dict[str, Tensor]:
    ours = tower.state_dict()
    ours[WORDS] = ours[WORDS][: config.model.text.vocabulary]
    return _theirs(ours, _text_names(config.model.text.depth), TEXT)


def restore(weights: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """transformers' names to ours; the mask token, which only training needs, becomes zero."""
    dual = "visual_projection.weight" in weights
    image = _ours(weights, _image_names(config.model.image.depth), VISION if dual else "")
    ours = {f"image.{name}": value for name, value in image.items()}
    if dual:
        text = _ours(weights, _text_names(config.model.text.depth), TEXT)
        text[WORDS] = torch.cat([text[WORDS], text[WORDS].new_zeros(1, text[WORDS].shape[1])])
        ours |= {f"text.{name}": value for name, value in text.items()}
        ours["image.contrastive_projection"] = weights["visual_projection.weight"].T
        ours["text.text_projection"] = weights["text_projection.weight"].T
    return ours


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
    from ..data.clip_tokenizer import SimpleTokenizer

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
