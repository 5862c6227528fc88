"""Heads on top of the towers: the projection head with its prototypes, the pixel decoder, the masked-word decoder.

Letters in shapes: B samples, P patches, L = 1 + P, K prototypes, D width of the encoder, M width of the decoder.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_encoder import Block, Wanted
from .packing import Layout, pack_dense
from .recompute import run_block
from .text_encoder import TextTransformer


class Prototypes(nn.Module):
    """K learned directions: DINO's weight-normalised output layer with its gain fixed at 1."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self) -> Tensor:
        """The directions v_k / ||v_k||: [K, d]. The logits of unit vectors u [..., d] are u @ directions.T."""
        return self.weight_v / self.weight_v.norm(dim=1, keepdim=True)


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, prototypes (DINO, Caron et al. 2021, section 3.1; iBOT shares it for patches)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        layers: int,
        patch_prototypes: int | None = None,
    ) -> None:
        """patch_prototypes: a second output layer (`last_layer2`) for patch tokens; None: they share the first."""
        super().__init__()
        sizes = [width] + [hidden] * (layers - 1) + [bottleneck]
        modules: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            linear = nn.Linear(fan_in, fan_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules += [nn.GELU(), linear] if i else [linear]
        self.mlp = nn.Sequential(*modules)
        self.last_layer = Prototypes(bottleneck, prototypes)
        self.last_layer2 = Prototypes(bottleneck, patch_prototypes) if patch_prototypes else None

    def bottleneck(self, x: Tensor) -> Tensor:
        """Features [..., D] -> unit vectors [..., d]."""
        return F.normalize(self.mlp(x), dim=-1, eps=1e-12)

    def directions(self) -> tuple[Tensor, Tensor]:
        """The prototypes of class tokens and those of patch tokens, [K, d] each."""
        first = self.last_layer()
        return first, first if self.last_layer2 is None else self.last_layer2()

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., D] -> logits [..., K], before any temperature."""
        return F.linear(self.bottleneck(x), self.last_layer())


class PixelDecoder(nn.Module):
    """The light transformer of MAE (He et al. 2022): visible tokens and mask tokens in, normalised pixels out."""

    pos_embed: Tensor

    def __init__(self, encoder_width: int, patches: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(patches, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, eps=1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, 3 * patch_size**2)
        self.checkpoint_every = 0
        """Every how many blocks activations are dropped and computed again in the backward pass; 0: never"""

    def forward(self, visible: Tensor, kept: Tensor, removed: Tensor) -> Tensor:
        """Predict the removed patches.

        visible: [n, 1 + kept, D], class token first; kept, removed: int64 [n, .], patch indices.
        Returns [n, removed, 3 p p] in (row, column, channel) order.
        """
        x = self.embed(visible)
        width = x.shape[-1]
        # Order does not matter to attention: visible tokens first, then mask tokens, each with its own position.
        position = self.pos_embed[0].to(x.dtype)
        masks = self.mask_token + position[1 + removed]
        seen = x[:, 1:] + position[1 + kept]
        tokens = torch.cat([x[:, :1] + position[0], seen, masks.to(x.dtype)], 1)
        packed, layout = pack_dense([tokens])
        read = torch.arange(len(packed), device=x.device).view(tokens.shape[:2])[:, 1 + kept.shape[1] :].flatten()
        for i, block in enumerate(self.blocks):
            last = [(None, None), Wanted(read, None)] if i == len(self.blocks) - 1 else []
            packed = run_block(block, i, self.checkpoint_every, packed, layout, *last)
        hidden = packed.view(*removed.shape, width)
        return self.pred(self.norm(hidden))


def sincos_positions(patches: int, width: int) -> Tensor:
    """Fixed 2-D sine/cosine positions, a zero row for the class token: [1, 1 + P, width] (MAE, appendix A.1)."""
    side = round(patches**0.5)
    if width % 4:
        raise ValueError(f"the decoder's width {width} is not divisible by 4")
    rate = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, width / 2]
    columns, rows = wave[None].expand(side, -1, -1), wave[:, None].expand(-1, side, -1)
    table = torch.cat([columns, rows], -1).flatten(0, 1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


class WordDecoder(nn.Module):
    """Causal transformer from text features to word logits."""

    def __init__(self, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.transformer = TextTransformer(width, depth, heads)
        self.ln_final = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, layout: Layout, places: Tensor) -> Tensor:
        """Features [T, D] -> logits [W, classes] at `places` (int64 [W], packed): only masked words need them."""
        return self.head(self.ln_final(self.transformer(x, layout)[places]))
