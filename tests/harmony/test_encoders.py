"""The towers against timm's and open_clip's, with the same weights; packing against padding."""

from dataclasses import replace

import open_clip.transformer
import pytest
import timm
import torch
from drawn import draw_views
from harmony_fast.harmony.image_encoder import ImageConfig, ImageEncoder, patchify, unpatchify
from harmony_fast.harmony.packing import lay_out_captions, pack_dense, unpack_dense
from harmony_fast.harmony.text_encoder import CaptionFeatures, TextConfig, TextEncoder
from harmony_fast.harmony.views import View, Views, ViewsConfig
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

IMAGE = ImageConfig(width=32, depth=2, heads=2, patch_size=8)
TEXT = TextConfig(width=32, depth=2, heads=2, context=12, vocabulary=50)
VIEWS = ViewsConfig(global_size=32, local_size=16, local_crops=3)


def captions(lengths: list[int]) -> Tensor:
    tokens = torch.zeros(len(lengths), TEXT.context, dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[0] = 48
        row[1 : length - 1] = torch.randint(1, 48, (length - 2,))
        row[length - 1] = 49
    return tokens


def some_views(batch: int = 4, seed: int = 0) -> Views:
    torch.manual_seed(seed)
    crops = torch.randn(2, batch, 3, 32, 32), torch.randn(3, batch, 3, 16, 16)
    lengths = [2 + (3 * i) % 11 for i in range(batch)]
    return draw_views(VIEWS, 8, *crops, captions(lengths), torch.arange(batch), seed, 0)


def cut(views: Views, keep: slice) -> Views:
    """The same views of some of the samples."""
    return draw_views(VIEWS, 8, views.global_crops[:, keep], views.local_crops[:, keep], views.tokens[keep],
                      torch.arange(len(views.tokens))[keep], 0, 0)  # fmt: skip


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(1)
    return ImageEncoder(IMAGE, 32, embed_dim=16, masked=True).double()


def test_image_encoder_is_timms(encoder: ImageEncoder) -> None:
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, global_pool=""
    ).double()
    own = {k: v for k, v in encoder.state_dict().items() if k not in ("masked_embed", "contrastive_projection")}
    theirs.load_state_dict(own)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(encoder.features(images), theirs(images), rtol=1e-9, atol=1e-10)


def test_text_encoder_is_open_clips() -> None:
    torch.manual_seed(1)
    ours = TextEncoder(TEXT, embed_dim=16).double()
    theirs = open_clip.transformer.TextTransformer(
        context_length=12, vocab_size=51, width=32, heads=2, layers=2, output_dim=16,
        act_layer=open_clip.transformer.QuickGELU,
    ).double()  # fmt: skip
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys
    tokens = captions([2, 12, 7, 5, 3])
    torch.testing.assert_close(ours.embed(tokens), theirs(tokens), rtol=1e-9, atol=1e-10)


def test_one_packed_pass_equals_one_pass_per_view(encoder: ImageEncoder) -> None:
    views = replace(some_views(), **{k: getattr(some_views(), k).double() for k in ("global_crops", "local_crops")})
    request = {View.GLOBAL_PLAIN: 1, View.GLOBAL_MASKED: 2, View.GLOBAL_VISIBLE: 2, View.LOCAL: 3}
    together = encoder(views, request)
    for view, count in request.items():
        alone = encoder(views, {view: count})[view]
        torch.testing.assert_close(together[view], alone, rtol=1e-9, atol=1e-10)
    unseen = replace(views, global_crops=torch.empty(0))  # local crops need no global ones
    torch.testing.assert_close(
        encoder(unseen, {View.LOCAL: 3})[View.LOCAL], together[View.LOCAL], rtol=1e-9, atol=1e-10
    )
    plain = encoder.features(views.global_crops[0])
    torch.testing.assert_close(together[View.GLOBAL_PLAIN][0], plain, rtol=1e-9, atol=1e-10)
    assert together[View.LOCAL].shape == (3, 4, 5, 32)
    assert together[View.GLOBAL_VISIBLE].shape == (2, 4, 1 + 4, 32)


def test_masked_view_hides_the_masked_pixels(encoder: ImageEncoder) -> None:
    torch.nn.init.normal_(encoder.masked_embed)
    views = some_views(8)
    request = {View.GLOBAL_MASKED: 2}
    before = encoder.float()(views, request)[View.GLOBAL_MASKED]
    noise = unpatchify(torch.randn(2, 8, 16, 192) * views.block_mask[..., None], 8)
    after = encoder(replace(views, global_crops=views.global_crops + noise), request)[View.GLOBAL_MASKED]
    assert views.block_mask.any()
    torch.testing.assert_close(before, after)


def test_stochastic_depth_belongs_to_the_sample() -> None:
    torch.manual_seed(0)
    config = IMAGE.model_copy(update={"drop_path": 0.5})
    encoder = ImageEncoder(config, 32, None, masked=True).train()
    request = {View.GLOBAL_MASKED: 2, View.LOCAL: 3}
    views = some_views(6)
    whole, part = encoder(views, request), encoder(cut(views, slice(2, 5)), request)
    for view in request:
        torch.testing.assert_close(whole[view][:, 2:5], part[view])
    steady = encoder.eval()(views, request)
    assert not torch.allclose(steady[View.LOCAL], whole[View.LOCAL])


@given(st.lists(st.integers(2, 12), min_size=1, max_size=9), st.booleans())
def test_packed_captions_equal_padded_ones(lengths: list[int], whole: bool) -> None:
    torch.manual_seed(0)
    text = TextEncoder(TEXT, None).double()
    tokens = captions(lengths)
    layout = lay_out_captions(torch.tensor(lengths), 12, whole)
    packed = text.encode(torch.stack([tokens, tokens]), layout)
    first_view, second_view = packed.chunk(2)
    padded = text.encode(tokens[None], lay_out_captions(torch.full((len(lengths),), 12), 12))
    padded = padded.view(len(lengths), 12, 32)
    for i, length in enumerate(lengths):
        first, last = int(layout.first[i]), int(layout.last[i])
        assert last - first == length - 1
        torch.testing.assert_close(first_view[first : last + 1], padded[i, :length], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first_view, second_view, rtol=1e-9, atol=1e-10)
    assert first_view.shape[0] == (12 * len(lengths) if whole else sum(lengths))


def test_places_of_padded_captions_are_found_in_the_pack() -> None:
    lengths = torch.tensor([3, 12, 2, 7])
    layout = lay_out_captions(lengths, 12)
    features = CaptionFeatures(layout.source[:, None], layout.layout, layout.first, layout.last)
    places = (torch.arange(12) < lengths[:, None]).flatten().nonzero()[:, 0]
    assert torch.equal(features.at(places, 12)[:, 0], places)
    assert torch.equal(layout.position, layout.source % 12)
    assert torch.equal(layout.source[layout.last], torch.arange(4) * 12 + lengths - 1)


def spread(parameter: Tensor, std: float) -> bool:
    """Whether the standard deviation is as expected, up to what chance allows at this number of values."""
    return abs(float(parameter.detach().std(correction=0)) / std - 1) < 4 * (2 * parameter.numel()) ** -0.5


def test_initial_weights_of_the_image_tower() -> None:
    torch.manual_seed(0)
    for init in ("normal", "xavier"):
        encoder = ImageEncoder(ImageConfig(width=64, depth=2, heads=2, patch_size=8, init=init), 32, 24, masked=True)
        for block in encoder.blocks:
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                xavier = (2 / (layer.in_features + layer.out_features)) ** 0.5
                assert spread(layer.weight, xavier if init == "xavier" else 0.02) and not layer.bias.any()
        assert spread(encoder.cls_token, 0.02) and spread(encoder.pos_embed, 0.02) and not encoder.masked_embed.any()
        assert spread(encoder.contrastive_projection, 64**-0.5)


def test_initial_weights_of_the_text_tower_are_clips() -> None:
    torch.manual_seed(0)
    text = TextEncoder(TextConfig(width=64, depth=8, heads=2, context=12, vocabulary=50), 24)
    assert spread(text.token_embedding.weight, 0.02) and spread(text.positional_embedding, 0.01)
    assert spread(text.text_projection, 64**-0.5)
    for block in text.transformer.resblocks:
        assert spread(block.attn.in_proj_weight, 64**-0.5) and spread(block.mlp.c_fc.weight, 128**-0.5)
        assert spread(block.attn.out_proj.weight, 1024**-0.5) and spread(block.mlp.c_proj.weight, 1024**-0.5)
        assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5))
def test_dense_groups_come_back(shapes: list[tuple[int, int]]) -> None:
    groups = [torch.randn(n, length, 3) for n, length in shapes]
    tokens, layout = pack_dense(groups)
    assert int(layout.offsets[-1]) == len(tokens) == sum(n * length for n, length in shapes)
    for group, back in zip(groups, unpack_dense(tokens, groups), strict=True):
        assert torch.equal(group, back)


def test_patches_come_back() -> None:
    images = torch.randn(2, 5, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)


@pytest.mark.parametrize(("name", "expected"), [
    ("ViT-Ti/16", (192, 12, 3, 16)), ("ViT-S/16", (384, 12, 6, 16)), ("ViT-B/32", (768, 12, 12, 32)),
    ("ViT-L/14", (1024, 24, 16, 14)),
])  # fmt: skip
def test_named_sizes(name: str, expected: tuple) -> None:
    config = ImageConfig(name=name)
    assert (config.width, config.depth, config.heads, config.patch_size) == expected
    assert ImageConfig(name=name, depth=3).depth == 3
