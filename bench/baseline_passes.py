"""The dense forward passes of the baseline (see `baseline`): towers and heads of a `Harmony` model, its own parameters,
computed as the authors' code computes them. Everything is padded to full length, every attention matrix is written out.

Letters in shapes: n sequences (crop-major: all samples' first crop, then their second), L tokens of a sequence,
P = S * S patches, D width, H heads, C context length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harmony.heads import PixelDecoder, ProjectionHead, Prototypes, WordDecoder
from ..harmony.image_encoder import Block, ImageEncoder
from ..harmony.text_encoder import TextBlock, TextEncoder, TextTransformer

Branches = Sequence[tuple[Tensor, Tensor]]
"""By block, what the two residual branches are multiplied with (stochastic depth): [n, 1, 1] each"""


def encode_images(
    tower: ImageEncoder, images: Tensor, mask: Tensor | None = None, kept: Tensor | None = None,
    branches: Branches | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass over crops of one size: features [n, L, D] after the final norm, and the class token's attention [n, P],
    averaged over blocks and heads, which nobody reads.

    images: [n, 3, side, side]. mask: bool [n, P], patches that the mask token replaces. kept: int64 [n, K], the patches
    that go in; None: all.
    """
    x = tower.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if mask is not None:
        assert tower.masked_embed is not None
        x = torch.where(mask[..., None], tower.masked_embed.to(x.dtype), x)
    position = _positions(tower.pos_embed, images.shape[-1] // tower.config.patch_size)
    x = x + position[:, 1:]
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    first = (tower.cls_token + position[:, :1]).expand(len(x), -1, -1)
    x, maps = torch.cat([first.to(x.dtype), x], 1), []
    for i, block in enumerate(cast(Iterable[Block], tower.blocks)):
        x, weights = image_block(block, x, branches[i] if branches else None)
        maps.append(weights)
    return tower.norm(x), torch.stack(maps).mean((0, 2))[:, 0, 1:]


def image_block(block: Block, x: Tensor, branch: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Pre-norm block with its attention written out: features [n, L, D], attention weights [n, H, L, L]."""
    attention = block.attn
    q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    mixed = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    x = x + (mixed if branch is None else mixed * branch[0])
    mixed = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return x + (mixed if branch is None else mixed * branch[1]), weights


def _positions(table: Tensor, side: int) -> Tensor:
    """[1, 1 + S * S, D] for a grid of side x side; resampled with DINO's scale factor (side + 0.1) / S."""
    trained = round((table.shape[1] - 1) ** 0.5)
    if side == trained:
        return table
    grid = table[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    factor = (side + 0.1) / trained
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", recompute_scale_factor=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def encode_captions(tower: TextEncoder, tokens: Tensor) -> Tensor:
    """All C places of every caption: int64 [B, C] -> [B, C, D], before the final norm."""
    return text_blocks(tower.transformer, tower.token_embedding(tokens) + tower.positional_embedding)


def text_blocks(transformer: TextTransformer, x: Tensor) -> Tensor:
    """Causal blocks on [B, C, D], as CLIP runs them: places first, samples second, a mask of minus infinities."""
    x = x.transpose(0, 1)
    causal = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    for block in cast(Iterable[TextBlock], transformer.resblocks):
        x = x + _text_attention(block, block.ln_1(x), causal)
        hidden = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
    return x.transpose(0, 1)


def _text_attention(block: TextBlock, x: Tensor, causal: Tensor) -> Tensor:
    """What torch.nn.MultiheadAttention computes with these parameters: [C, B, D] -> [C, B, D]."""
    attention = block.attn
    return F.multi_head_attention_forward(
        x, x, x, x.shape[-1], attention.heads, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        attention.out_proj.weight, attention.out_proj.bias, need_weights=False, attn_mask=causal.to(x.dtype),
    )[0]  # fmt: skip


def project(head: ProjectionHead, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Every token through the head: [n, L, D] -> logits of class tokens [n, K] and of patches [n, L - 1, K]."""
    u = F.normalize(head.mlp(tokens), dim=-1, eps=1e-12)
    of_patches = head.last_layer2 or head.last_layer
    return F.linear(u[:, 0], _directions(head.last_layer)), F.linear(u[:, 1:], _directions(of_patches))


def project_words(head: ProjectionHead, tokens: Tensor) -> Tensor:
    """Every place of every caption through the head: [B, C, D] -> [B, C, K]."""
    return F.linear(F.normalize(head.mlp(tokens), dim=-1, eps=1e-12), _directions(head.last_layer))


def _directions(layer: Prototypes) -> Tensor:
    """Weight normalisation with the gain at 1, made anew in every pass."""
    return F.normalize(layer.weight_v, dim=1, eps=0.0)


def decode_pixels(decoder: PixelDecoder, visible: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
    """MAE's decoder, all patches back in their places and all of them predicted: [n, P, 3 p p].

    visible: [n, 1 + K, D]; kept: int64 [n, K]; removed: int64 [n, P - K].
    """
    x = decoder.embed(visible)
    masks = decoder.mask_token.expand(len(x), removed.shape[1], -1).to(x.dtype)
    restore = torch.cat([kept, removed], 1).argsort(1)[..., None].expand(-1, -1, x.shape[-1])
    patches = torch.cat([x[:, 1:], masks], 1).gather(1, restore)
    x = torch.cat([x[:, :1], patches], 1) + decoder.pos_embed.to(x.dtype)
    for block in cast(Iterable[Block], decoder.blocks):
        x = image_block(block, x)[0]
    return decoder.pred(decoder.norm(x))[:, 1:]


def decode_words(decoder: WordDecoder, tokens: Tensor) -> Tensor:
    """Logits over the vocabulary at every place: [B, C, D] -> [B, C, V + 1]."""
    return decoder.head(decoder.ln_final(text_blocks(decoder.transformer, tokens)))
