"""From labelled samples to the features that the tasks share.

Letters in shapes: n samples, D width of the image encoder, E width of the joint space, C context length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ...harmony.model import Branch
from ..config import RunConfig
from ..data.labelled import LabelledSample
from ..errors import UserError

BATCH = 256


def pixels(image: Image.Image, config: RunConfig) -> Tensor:
    """Shorter side resized to the global crop (bicubic, antialiased), centre crop, normalised: [3, H, W]."""
    size, augment = config.views.global_size, config.data.augment
    scale = size / min(image.size)
    resized = image.resize([max(round(s * scale), size) for s in image.size], Image.Resampling.BICUBIC)
    cropped = TF.center_crop(TF.to_dtype(TF.to_image(resized), torch.float32, scale=True), [size, size])
    return TF.normalize(cropped, list(augment.mean), list(augment.std))


@torch.inference_mode()
def class_tokens(branch: Branch, samples: list[LabelledSample], config: RunConfig) -> Tensor:
    """The image encoder's class tokens, after the final norm: [n, D] on the host."""
    device = branch.image.cls_token.device
    parts = []
    for chunk in _chunks(samples):
        images = torch.stack([pixels(sample.image, config) for sample in chunk]).to(device)
        parts.append(branch.image.features(images)[:, 0].float().cpu())
    return _finite(torch.cat(parts), "image features")


@torch.inference_mode()
def image_embeddings(branch: Branch, tokens: Tensor) -> Tensor:
    """Class tokens [n, D] to unit vectors of the joint space [n, E]."""
    device = branch.image.cls_token.device
    return F.normalize(branch.image.project(tokens.to(device)).float(), dim=-1).cpu()


@torch.inference_mode()
def text_embeddings(branch: Branch, texts: list[str], config: RunConfig) -> Tensor:
    """Texts to unit vectors of the joint space: [n, E] on the host."""
    device = branch.text.positional_embedding.device
    parts = []
    for chunk in _chunks(texts):
        tokens = _tokenizer(config.model.text.context)(list(chunk)).to(device)
        parts.append(F.normalize(branch.text.embed(tokens).float(), dim=-1).cpu())
    return _finite(torch.cat(parts), "text embeddings")


@lru_cache(maxsize=2)
def _tokenizer(context: int):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context)


def _chunks(items: list) -> Iterator[list]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _finite(features: Tensor, what: str) -> Tensor:
    """Comparisons with NaN are all false, which would rank every answer first."""
    if not features.isfinite().all():
        raise UserError(f"the {what} of this checkpoint are not finite")
    return features
