"""Causal text transformer over packed captions (Radford et al. 2021), with open_clip's parameter names.

Letters in shapes: B samples, C context length, T packed tokens, D width, E width of the joint space, v vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from ..kernels import masked_attention
from .config import Config
from .packing import CaptionLayout, Layout, lay_out_captions, repeated
from .recompute import Linear, again, linear_of, run_block
from .views import Request, View, Views


class TextConfig(Config):
    """The text transformer. The defaults are CLIP's."""

    width: PositiveInt = 512
    """Width D of a token."""
    depth: PositiveInt = 12
    """Transformer blocks."""
    heads: PositiveInt = 8
    """Attention heads; must divide the width."""
    context: PositiveInt = 77
    """Longest caption, tokens, start and end ids included."""
    vocabulary: PositiveInt = 49408
    """Token ids of the tokenizer; one more id, the largest, is the mask."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class CausalAttention(nn.Module):
    """Multi-head causal self-attention inside each packed caption; parameters as torch.nn.MultiheadAttention's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, layout: Layout) -> Tensor:
        """Of the normalised x: [T, D] -> [T, D]."""
        qkv = linear_of(norm(x), x, again(norm), self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.out_proj(masked_attention(q, k, v, layout.offsets, layout.max_length, causal=True).flatten(1))


class TextMlp(nn.Module):
    """Two linear layers around CLIP's approximate GELU, x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = Linear(width, hidden)
        self.c_proj = Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Of the normalised x: [T, D] -> [T, D]."""
        hidden = 1.702 * self.c_fc(norm(x), source=x, make=again(norm))
        return self.c_proj(_scaled_silu(hidden), source=hidden, make=_scaled_silu)


def _scaled_silu(x: Tensor) -> Tensor:
    return F.silu(x).div_(1.702)


class TextBlock(nn.Module):
    """Pre-norm causal transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = TextMlp(width, 4 * width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] -> [T, D]."""
        x = x + self.attn(x, self.ln_1, layout)
        return x + self.mlp(x, self.ln_2)


class TextTransformer(nn.Module):
    """A stack of causal blocks."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.checkpoint_every = 0
        """Every how many blocks activations are dropped and computed again in the backward pass; 0: never"""

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, D] -> [T, D]."""
        for i, block in enumerate(self.resblocks):
            x = run_block(block, i, self.checkpoint_every, x, layout)
        return x


class CaptionFeatures(NamedTuple):
    """The features of one caption view, before the text encoder's final norm."""

    tokens: Tensor
    """[T, D], packed"""
    layout: Layout
    first: Tensor
    """int64 [B]: packed place of each caption's first token"""
    last: Tensor
    """int64 [B]: packed place of each caption's end id"""

    def at(self, index: Tensor, context: int) -> Tensor:
        """Features at places of the padded captions: index int64 [W] into [B * C] -> [W, D]."""
        return self.tokens[self.places(index, context)]

    def places(self, index: Tensor, context: int) -> Tensor:
        """Packed places of places in the padded captions: int64 [W] into [B * C] -> int64 [W]."""
        return self.first[index // context] + index % context


class TextEncoder(nn.Module):
    """Token and position embeddings, causal blocks, final norm, projection of the end token to the joint space."""

    def __init__(self, config: TextConfig, embed_dim: int | None) -> None:
        """embed_dim: width of the joint space (None: no projection)."""
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary + 1, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.transformer = TextTransformer(config.width, config.depth, config.heads)
        # The other objectives read the features before the final norm, as the authors' code does.
        self.ln_final = nn.LayerNorm(config.width) if embed_dim else None
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim)) if embed_dim else None
        self._initialise()

    def _initialise(self) -> None:
        """As CLIP."""
        width, depth = self.config.width, self.config.depth
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for module in self.transformer.modules():
            if isinstance(module, TextBlock):
                nn.init.normal_(module.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(module.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
                nn.init.normal_(module.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, views: Views, request: Request, whole_context: bool = False) -> dict[View, CaptionFeatures]:
        """Encode the requested caption views in one pass. whole_context: padding goes through as well."""
        names = [view for view in View if not view.is_image and view in request]
        stacked = torch.stack([self._ids(view, views) for view in names])
        captions = lay_out_captions(views.lengths, stacked.shape[-1], whole_context)
        parts = self.encode(stacked, captions).chunk(len(names))
        first, last = (place.to(stacked.device, non_blocking=True) for place in (captions.first, captions.last))
        return {v: CaptionFeatures(x, captions.layout, first, last) for v, x in zip(names, parts, strict=True)}

    def encode(self, tokens: Tensor, captions: CaptionLayout) -> Tensor:
        """tokens: int64 [views, B, C] -> packed features before the final norm, one view behind the other."""
        ids = tokens.flatten(1)[:, captions.source.to(tokens.device, non_blocking=True)]
        position = captions.position.to(tokens.device, non_blocking=True)
        x = self.token_embedding(ids) + self.positional_embedding[position]
        return self.transformer(x.flatten(0, 1), repeated(captions.layout, len(tokens)))

    def project(self, features: Tensor) -> Tensor:
        """Features at the end ids to the joint space, not normalised: [..., D] -> [..., E]."""
        assert self.ln_final is not None and self.text_projection is not None  # built with an embed_dim
        return self.ln_final(features) @ self.text_projection

    def embed(self, tokens: Tensor) -> Tensor:
        """Whole captions, for evaluation: int64 [B, C] -> [B, E], not normalised."""
        lengths = tokens.argmax(-1).cpu() + 1
        captions = lay_out_captions(lengths, tokens.shape[1])
        return self.project(self.encode(tokens[None], captions)[captions.last.to(tokens.device)])

    def _ids(self, view: View, views: Views) -> Tensor:
        if view is View.CAPTION:
            return views.tokens
        return views.tokens.masked_fill(views.caption_mask, self.config.vocabulary)
