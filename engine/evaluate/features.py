"""From pictures to the features that the tasks share: batched, decoded ahead by threads, on one rank or several.

Letters in shapes: n samples, b blocks, D width of the image encoder, E width of the joint space, P patches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from ...harmony.image_encoder import ImageEncoder
from ...harmony.text_encoder import TextEncoder
from ..config import RunConfig
from ..data.labelled import LabelledSample
from ..data.pictures import LeftOut, Picture, PictureSet, Reading, decoded
from ..data.tokens import tokenizer_options
from ..errors import DataError, UserError
from .share import Share

if TYPE_CHECKING:
    from ..data.clip_tokenizer import SimpleTokenizer


class Towers(Protocol):
    """What is evaluated: a branch of a model, or what was exported of one."""

    image: ImageEncoder | None
    text: TextEncoder | None


def image_tower(towers: Towers) -> ImageEncoder:
    """The image tower; nobody chooses towers without one to be evaluated (see `choose_branch`)."""
    assert towers.image is not None
    return towers.image


@dataclass(frozen=True)
class Features:
    """A set as the image encoder sees it, with what is known of each sample; on the host, fp32."""

    tokens: Tensor
    """[n, b, D]: class tokens of the last b blocks, each after the final norm; the last block's at the end"""
    patches: Tensor
    """[n, D]: mean of the last block's patch tokens"""
    names: list[str]
    captions: list[tuple[str, ...]]
    labels: list[dict[str, Any]]
    own_captions: bool
    """See `PictureSet`"""

    @property
    def named_labels(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and labels of each sample."""
        return list(zip(self.names, self.labels, strict=True))

    @property
    def last(self) -> Tensor:
        """Class tokens of the last block: [n, D]."""
        return self.tokens[:, -1]


def how_to_read(config: RunConfig) -> Reading:
    """What the configuration says of the sets that are evaluated on."""
    e = config.evaluate
    return Reading((e.class_key, e.group_key), e.images, e.split, config.data.tokenizer)


def resized(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size` pixels (bicubic); the longer one is rounded down, as torchvision does."""
    short = min(image.size)
    sides = [size if side == short else int(size * side / short) for side in image.size]
    return image.resize(sides, Image.Resampling.BICUBIC)


def normalised(image: Image.Image, config: RunConfig) -> Tensor:
    """float32 [3, H, W], with the run's mean and deviation."""
    augment = config.data.augment
    return TF.normalize(
        TF.to_dtype(TF.to_image(image), torch.float32, scale=True), list(augment.mean), list(augment.std)
    )


def pixels(image: Image.Image, config: RunConfig) -> Tensor:
    """Shorter side resized to the global crop, centre crop, normalised: [3, H, W]. timm and open_clip do the same."""
    size = config.views.global_size
    return normalised(TF.center_crop(resized(image, size), [size, size]), config)


def extract(towers: Towers, pictures: PictureSet, config: RunConfig, blocks: int, share: Share) -> Features:
    """The features of a set, of so many last blocks; on several ranks each encodes its share, and all get everything.

    What cannot be decoded is left out, with a line that names it. Raises UserError for more blocks than there are, or
    features that are not finite; DataError where the set cannot be read, or nothing of it.
    """
    encoder = image_tower(towers)
    if blocks > len(encoder.blocks):
        raise UserError(
            f"features of {blocks} blocks asked for, the image tower has {len(encoder.blocks)} (evaluate.linear.blocks)"
        )
    left_out = LeftOut()
    stream = decoded(share.of(pictures.read()), partial(pixels, config=config), config.evaluate.workers, left_out)
    total = None if pictures.count is None else share.count(pictures.count)
    batches = in_batches(share.shown(stream, f"reading {pictures.name}", total), config.evaluate.batch_size)
    encoded = list(_encoded(encoder, batches, blocks))
    width = config.model.image.width
    tokens = torch.cat([torch.empty(0, blocks, width), *(e.tokens for e in encoded)])
    patches = torch.cat([torch.empty(0, width), *(e.patches for e in encoded)])
    for line in left_out.lines():
        print(line, file=sys.stderr)
    known = share.merged([known for e in encoded for known in e.known])
    if not known:
        reasons = f" ({left_out.names[0]})" if left_out.names else ""
        raise DataError(f"{pictures.name}: no picture in it is usable{reasons}")
    names, captions, labels = (list(column) for column in zip(*known, strict=True))
    tokens, patches = finite(share.gathered(tokens), "image features"), share.gathered(patches)
    return Features(tokens, patches, names, captions, labels, pictures.own_captions)


class _Encoded(NamedTuple):
    """A batch that went through the tower. Its pictures are let go: they may hold their files in memory."""

    known: list[tuple[str, tuple[str, ...], dict[str, Any]]]
    """Name, captions and labels of each picture"""
    tokens: Tensor
    """[B, b, D], on the host"""
    patches: Tensor
    """[B, D], on the host"""


@torch.inference_mode()
def _encoded(encoder: ImageEncoder, batches: Iterable[list[tuple[Picture, Tensor]]], blocks: int) -> Iterator[_Encoded]:
    for batch in batches:
        images = torch.stack([image for _, image in batch]).to(encoder.cls_token, non_blocking=True)
        last = encoder.last_blocks(images, blocks)
        tokens = torch.stack([features[:, 0] for features in last], 1).float().cpu()
        known = [(picture.name, picture.captions, dict(picture.labels)) for picture, _ in batch]
        yield _Encoded(known, tokens, last[-1][:, 1:].mean(1).float().cpu())


def in_batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def class_tokens(towers: Towers, samples: list[LabelledSample], config: RunConfig) -> Tensor:
    """The image encoder's class tokens of samples in memory, after the final norm: [n, D] on the host."""
    encoder, parts = image_tower(towers), []
    for chunk in in_batches(samples, config.evaluate.batch_size):
        images = torch.stack([pixels(sample.image, config) for sample in chunk]).to(encoder.cls_token.device)
        parts.append(encoder.features(images)[:, 0].float().cpu())
    return finite(torch.cat(parts), "image features")


@torch.inference_mode()
def image_embeddings(towers: Towers, tokens: Tensor) -> Tensor:
    """Class tokens [n, D] to unit vectors of the joint space [n, E]."""
    encoder = image_tower(towers)
    return F.normalize(encoder.project(tokens.to(encoder.cls_token)).float(), dim=-1).cpu()


@torch.inference_mode()
def text_embeddings(towers: Towers, texts: list[str], config: RunConfig) -> Tensor:
    """Texts to unit vectors of the joint space, which needs both towers: [n, E] on the host."""
    assert towers.text is not None
    device = towers.text.positional_embedding.device
    encode = _tokenizer(config.model.text.context, config.data.tokenizer)
    parts = []
    for chunk in in_batches(texts, config.evaluate.batch_size):
        tokens = encode(chunk)
        if int(tokens.max()) >= config.model.text.vocabulary:
            raise UserError(
                f"the tokenizer '{config.data.tokenizer}' gives the id {int(tokens.max())}, the text tower knows "
                f"{config.model.text.vocabulary}: set data.tokenizer to the one that the captions were prepared with"
            )
        parts.append(F.normalize(towers.text.embed(tokens.to(device)).float(), dim=-1).cpu())
    return finite(torch.cat(parts), "text embeddings")


@lru_cache(maxsize=2)
def _tokenizer(context: int, name: str) -> SimpleTokenizer:
    from ..data.clip_tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context, **tokenizer_options(name))


def finite(features: Tensor, what: str) -> Tensor:
    """The same features. Raises UserError where they are not finite: comparisons with NaN are all false, which would
    rank every answer first."""
    if not features.isfinite().all():
        raise UserError(f"the {what} of this checkpoint are not finite")
    return features
