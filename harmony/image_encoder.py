"""Vision transformer over packed views (Dosovitskiy et al. 2021), with timm's parameter names.

Letters in shapes: V crops, B samples, P patches, p patch side in pixels, L tokens of a sequence, T packed tokens,
D width.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ..kernels import masked_attention
from .config import Config
from .packing import Layout, pack_dense, unpack_dense
from .randomness import split
from .recompute import Linear, again, run_block
from .stochastic_depth import BranchesKept, Kept, add_branch, draw_kept
from .views import Reads, Request, View, Views

NAMED = {
    "ViT-Ti": {"width": 192, "depth": 12, "heads": 3},
    "ViT-S": {"width": 384, "depth": 12, "heads": 6},
    "ViT-B": {"width": 768, "depth": 12, "heads": 12},
    "ViT-L": {"width": 1024, "depth": 24, "heads": 16},
}


class ImageConfig(Config):
    """The vision transformer. A name sets width, depth, heads and patch size; keys beside it override."""

    name: str | None = None
    """ViT-Ti/16, ViT-S/16, ViT-B/16, ViT-L/16 (any patch size after the slash), or nothing for free sizes."""
    width: PositiveInt = 768
    """Width D of a token."""
    depth: PositiveInt = 12
    """Transformer blocks."""
    heads: PositiveInt = 12
    """Attention heads; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Width of the MLPs' hidden layer, in widths."""
    patch_size: PositiveInt = 16
    """Side of a patch, pixels."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial weights of the blocks: truncated normal 0.02, as the authors', or Xavier uniform, which starts narrow
    transformers (width below about 400) faster."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth of the student's last block, growing linearly from 0 at the first."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("name") is None:
            return given
        size, _, patch = str(given["name"]).partition("/")
        if size not in NAMED or not patch.isdigit():
            raise ValueError(f"'{given['name']}' is none of {', '.join(f'{n}/16' for n in NAMED)}")
        return {**NAMED[size], "patch_size": int(patch), **given}

    @model_validator(mode="after")
    def _heads_divide(self) -> ImageConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class Wanted(NamedTuple):
    """The tokens that are read after the last block."""

    places: Tensor
    """int64 [R]: their packed places"""
    scale: Tensor | None
    """[R, 1]: what the block's second branch is multiplied with (stochastic depth)"""


class Attention(nn.Module):
    """Multi-head self-attention inside each packed sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, norm: nn.LayerNorm, layout: Layout, index: Tensor | None = None) -> Tensor:
        """Of the normalised x: [T, D] -> [T, D], or [R, D] for the tokens at index."""
        q, k, v = self.qkv(norm(x), source=x, make=again(norm)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        mixed = masked_attention(q, k, v, layout.offsets, layout.max_length).flatten(1)
        return self.proj(mixed if index is None else mixed.index_select(0, index))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Of the normalised x: [T, D] -> [T, D]."""
        hidden = self.fc1(norm(x), source=x, make=again(norm))
        return self.fc2(F.gelu(hidden), source=hidden, make=F.gelu)


class Block(nn.Module):
    """Pre-norm transformer block.

    For the backward pass it keeps 10 D numbers of each token: its input D, q, k and v 3 D, what attention gives D, the
    stream after attention D, the MLP's hidden layer 4 D; and in fp32 the mean and deviation of either norm, and
    attention's log-sum-exp, one per head. What norms and the GELU give, 6 D, is computed again (`recompute`).
    Checkpointed, its input alone: D.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(
        self, x: Tensor, layout: Layout, kept: BranchesKept = (None, None), wanted: Wanted | None = None
    ) -> Tensor:
        """[T, D] -> [T, D], or [R, D] for wanted tokens alone. kept: the sequences that each residual branch is
        computed for (stochastic depth)."""
        if wanted is not None:
            return self._finish(x, layout, kept, wanted)
        x = add_branch(x, lambda part, of: self.attn(part, self.norm1, of), layout, kept[0])
        return add_branch(x, lambda part, _: self.mlp(part, self.norm2), layout, kept[1])

    def _finish(self, x: Tensor, layout: Layout, kept: BranchesKept, wanted: Wanted) -> Tensor:
        """The last block: every token is a key, and those that are wanted go on."""
        if kept[0] is None:
            x = x.index_select(0, wanted.places) + self.attn(x, self.norm1, layout, wanted.places)
        else:
            x = add_branch(x, lambda part, of: self.attn(part, self.norm1, of), layout, kept[0])
            x = x.index_select(0, wanted.places)
        branch = self.mlp(x, self.norm2)
        return x + (branch if wanted.scale is None else branch * wanted.scale)


def _scale_of(kept: Kept | None, tokens: Tensor, wanted: Tensor) -> Tensor | None:
    """What a branch is multiplied with at wanted places, 0 where stochastic depth drops it: [R, 1]."""
    if kept is None:
        return None
    scale = tokens.new_zeros(len(tokens), 1).index_fill_(0, kept.places, kept.scale)
    return scale.index_select(0, wanted)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. The convolution is computed as one matrix product."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[..., 3, H, W] -> [..., P, D]."""
        patches = patchify(images, self.proj.kernel_size[0]).to(self.proj.weight.dtype)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # the order of patchify: row, column, channel
        return F.linear(patches, weight, self.proj.bias)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[..., 3, H, W] -> [..., P, p * p * 3]: patches in row-major order, values in (row, column, channel) order."""
    rows, columns = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    x = images.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))  # [..., 3, rows, p, columns, p]
    return x.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images: [..., P, p * p * 3] -> [..., 3, H, W]."""
    side = round(patches.shape[-2] ** 0.5)
    x = patches.unflatten(-1, (patch_size, patch_size, 3)).unflatten(-4, (side, side))
    return x.movedim(-1, -5).transpose(-3, -2).flatten(-2).flatten(-3, -2)


class ImageEncoder(nn.Module):
    """ViT with a class token, learned positions, a final norm on all tokens, and one forward pass for all views."""

    def __init__(self, config: ImageConfig, image_size: int, embed_dim: int | None, masked: bool) -> None:
        """embed_dim: width of the joint space (None: no projection). masked: whether it has a mask token."""
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // config.patch_size) ** 2, width))
        self.masked_embed = nn.Parameter(torch.zeros(1, width)) if masked else None
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, eps=1e-6) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.checkpoint_every = 0
        """Every how many blocks activations are dropped and computed again in the backward pass; 0: never"""
        self.contrastive_projection = nn.Parameter(torch.empty(width, embed_dim)) if embed_dim else None
        self._initialise()

    def _initialise(self) -> None:
        """Blocks by `config.init`; tokens and positions truncated normal 0.02; the projection normal D^-1/2."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                if self.config.init == "xavier":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.contrastive_projection is not None:
            nn.init.normal_(self.contrastive_projection, std=self.config.width**-0.5)

    def forward(
        self, views: Views, request: Request, reads: dict[View, Reads] | None = None, plain: Tensor | None = None
    ) -> dict[View, Tensor]:
        """Encode the requested views in one pass. Returns [crops, B, L, D] for each, after the final norm.

        reads: which tokens of a view are read, all of one that is not named. The others are keys to the last, and
        come out as 0. plain: [crops, B, D], class tokens that another pass has made of the first plain crops, which
        serve masked crops of which nothing is masked.
        """
        reads = reads or {}
        names = [view for view in View if view.is_image and view in request]
        crops = max([request[v] for v in names if v is not View.LOCAL], default=0)
        embedded = self.embed(views.global_crops[:crops]) if crops else views.global_crops
        sequences = {view: self._sequence(view, request[view], embedded, views).flatten(0, 1) for view in names}
        apart = _apart(views, request, reads, plain)
        places = {view: own.to(embedded.device, non_blocking=True) for view, own in apart.items()}
        for view, own in places.items():
            sequences[view] = sequences[view].index_select(0, own)
        names.sort(key=lambda view: -sequences[view].shape[1])
        groups = [sequences[view] for view in names]
        packed, layout = pack_dense(groups)
        kept = self._stochastic_depth(views, names, request, layout, apart)
        wanted = self._wanted(views, names, groups, reads, places.get(View.GLOBAL_MASKED))
        tokens = self.encode(packed, layout, kept, wanted)
        if wanted is not None:
            tokens = tokens.new_zeros(packed.shape).index_copy(0, wanted, tokens)
        features = dict(zip(names, unpack_dense(tokens, groups), strict=True))
        for view, own in places.items():
            if view is View.GLOBAL_PLAIN:
                shared = features[View.GLOBAL_MASKED][: request[view] * views.batch_size]
            else:
                assert plain is not None  # see `_apart`
                shared = _beside(plain, features[view], request[view])
            features[view] = shared.index_copy(0, own, features[view])
        return {view: flat.unflatten(0, (request[view], -1)) for view, flat in features.items()}

    def encode(
        self, tokens: Tensor, layout: Layout, kept: list[BranchesKept] | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """All blocks and the final norm: [T, D] -> [T, D]. kept: by block, for stochastic depth. wanted: int64 [R], the
        packed places that are read: then [R, D], of those alone."""
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            arguments: list[Any] = [kept[i]] if kept else []
            if wanted is not None and i == last:
                scale = _scale_of(kept[i][1] if kept else None, tokens, wanted)
                arguments = [kept[i] if kept else (None, None), Wanted(wanted, scale)]
            tokens = run_block(block, i, self.checkpoint_every, tokens, layout, *arguments)
        return self.norm(tokens)

    def _wanted(
        self, views: Views, names: list[View], groups: list[Tensor], reads: dict[View, Reads], masked: Tensor | None
    ) -> Tensor | None:
        """Packed places of the tokens that are read: int64 [R]; None: all. groups: the views' sequences [n, L, D].
        masked: the masked crops that have a sequence, as places in the flattened [crops, B]; None: all."""
        read = [reads.get(view, Reads.ALL) for view in names]
        if all(r is Reads.ALL for r in read):
            return None
        device, places, start = groups[0].device, [], 0
        for group, r in zip(groups, read, strict=True):
            count, length = group.shape[:2]
            if r is Reads.ALL:
                places.append(start + torch.arange(count * length, device=device))
            else:
                places.append(start + length * torch.arange(count, device=device))
            if r is Reads.MASKED:
                # All crops are masked crops here: an objective that reads them asks for every global crop.
                patches = length - 1
                sequence = torch.div(views.block_index, patches, rounding_mode="floor")
                if masked is not None:
                    order = sequence.new_zeros(views.block_mask.shape[:2].numel())
                    sequence = order.index_copy(0, masked, torch.arange(count, device=device))[sequence]
                places.append(start + sequence * length + 1 + views.block_index % patches)
            start += count * length
        return torch.cat(places)

    def features(self, images: Tensor) -> Tensor:
        """Whole images of any side, for evaluation: [B, 3, H, W] -> [B, 1 + P, D], after the final norm."""
        return self.last_blocks(images, 1)[-1]

    def last_blocks(self, images: Tensor, count: int) -> list[Tensor]:
        """What the last `count` blocks make of whole square images, each after the final norm: [B, 1 + P, D] each."""
        tokens = self._with_class(self.embed(images) + self._positions(images.shape[-1] // self.config.patch_size))
        shape = tokens.shape[:2]
        x, layout = pack_dense([tokens])
        kept = []
        for i, block in enumerate(self.blocks):
            x = run_block(block, i, self.checkpoint_every, x, layout)
            if i >= len(self.blocks) - count:
                kept.append(self.norm(x).unflatten(0, shape))
        return kept

    def project(self, class_token: Tensor) -> Tensor:
        """To the joint space, not normalised: [..., D] -> [..., E]."""
        assert self.contrastive_projection is not None  # built with an embed_dim
        return class_token @ self.contrastive_projection

    def embed(self, images: Tensor) -> Tensor:
        """Patch embeddings without positions: [..., 3, H, W] -> [..., P, D]."""
        return self.patch_embed(images)

    def _sequence(self, view: View, count: int, embedded: Tensor, views: Views) -> Tensor:
        """The input tokens of one view: [count, B, L, D]. embedded: patch embeddings of the global crops."""
        if view is View.LOCAL:
            crops = views.local_crops[:count]
            return self._with_class(self.embed(crops) + self._positions(crops.shape[-1] // self.config.patch_size))
        tokens = embedded[:count]
        if view is View.GLOBAL_MASKED:
            assert self.masked_embed is not None  # built with masked=True
            mask = views.block_mask[:count, :, :, None]
            tokens = torch.where(mask, self.masked_embed.to(tokens.dtype), tokens)
        tokens = tokens + self._positions(views.global_crops.shape[-1] // self.config.patch_size)
        if view is View.GLOBAL_VISIBLE:
            kept = views.kept[:count, :, :, None].expand(-1, -1, -1, tokens.shape[-1])
            tokens = tokens.gather(2, kept)
        return self._with_class(tokens)

    def _with_class(self, tokens: Tensor) -> Tensor:
        """Put the class token in front: [..., P, D] -> [..., 1 + P, D]."""
        first = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype)
        return torch.cat([first.expand(*tokens.shape[:-2], 1, -1), tokens], -2)

    def _positions(self, side: int) -> Tensor:
        """Positions of a side x side grid [P, D], resampled bicubically where the side is not the trained one.

        The scale factor is (side + 0.1) / trained side, as DINO and the authors' code have it: published weights were
        trained with it, and resizing to the exact size gives other numbers.
        """
        table = self.pos_embed[0, 1:]
        trained = round(table.shape[0] ** 0.5)
        if side == trained:
            return table
        grid = table.unflatten(0, (trained, trained)).permute(2, 0, 1)[None]
        if grid.dtype in (torch.bfloat16, torch.float16):
            grid = grid.float()
        factor = (side + 0.1) / trained
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", recompute_scale_factor=False)
        return grid[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)

    def _stochastic_depth(
        self, views: Views, names: list[View], request: Request, layout: Layout, apart: dict[View, Tensor]
    ) -> list[BranchesKept] | None:
        """What each block computes of the packed views `names`; None: everything. apart: see `_apart`.

        A draw belongs to (sample, view, crop, block): it does not depend on how samples are spread over ranks. A masked
        view that hides nothing is the plain view, and has its draw.
        """
        if not (self.training and self.config.drop_path):
            return None
        by_view = dict(zip(View, split(views.drop_keys, len(View)).unbind(-1), strict=True))
        keys = {view: split(by_view[view], request[view]).T.flatten() for view in names}
        if View.GLOBAL_MASKED in keys:
            masked, plain = keys[View.GLOBAL_MASKED], split(by_view[View.GLOBAL_PLAIN], request[View.GLOBAL_MASKED])
            hidden = views.hidden_crops[views.hidden_crops < len(masked)]
            keys[View.GLOBAL_MASKED] = plain.T.flatten().index_copy(0, hidden, masked[hidden])
        for view, own in apart.items():
            keys[view] = keys[view][own]
        device = self.cls_token.device
        return draw_kept(torch.cat(list(keys.values())), layout, self.config.drop_path, len(self.blocks), device)


def _apart(views: Views, request: Request, reads: dict[View, Reads], plain: Tensor | None) -> dict[View, Tensor]:
    """The one view of which some crops come from elsewhere, with those that need a sequence of their own, as places in
    the flattened [crops, B]: int64, on the host; empty where all need one.

    A masked crop of which nothing is masked is its plain crop. If both are asked for, the plain view is taken from the
    masked one; if another pass has made the plain one (plain: see `forward`), the masked view is taken from that.
    """
    hidden, samples, masked = views.hidden_crops, views.batch_size, request.get(View.GLOBAL_MASKED, 0)
    read_plain, read_masked = (reads.get(view, Reads.ALL) for view in (View.GLOBAL_PLAIN, View.GLOBAL_MASKED))
    if View.GLOBAL_PLAIN in request:
        count = request[View.GLOBAL_PLAIN]
        shares = count <= masked and read_plain <= read_masked and read_plain is not Reads.MASKED
        return {View.GLOBAL_PLAIN: hidden[hidden < count * samples]} if shares else {}
    if plain is None or len(plain) > masked or read_masked is Reads.ALL:
        return {}
    needed = torch.arange(masked * samples) >= len(plain) * samples
    needed[hidden[hidden < len(needed)]] = True
    needed[0] |= not needed.any()  # a pack has a sequence
    return {View.GLOBAL_MASKED: needed.nonzero().squeeze(1)}


def _beside(plain: Tensor, own: Tensor, crops: int) -> Tensor:
    """Features [crops B, L, D] like `own` [n, L, D], all 0 but for the class tokens `plain` of the first crops."""
    features = own.new_zeros(crops * plain.shape[1], *own.shape[1:])
    features[: plain.shape[:2].numel(), 0] = plain.flatten(0, 1)
    return features
