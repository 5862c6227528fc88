"""The multi-scale adapter: sizes, places, and gradients into the tower."""

import pytest
import torch
from harmony_fast.harmony.feature_pyramid import FeaturePyramid, as_maps
from harmony_fast.harmony.image_encoder import ImageConfig, ImageEncoder


@pytest.fixture
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ImageConfig(width=32, depth=4, heads=2, patch_size=8), 32, None, False)


@pytest.mark.parametrize(("channels", "expected"), [(12, [12] * 4), (None, [8, 16, 32, 32])])
def test_levels_have_their_strides_and_reach_the_tower(
    encoder: ImageEncoder, channels: int | None, expected: list[int]
) -> None:
    images = torch.randn(2, 3, 48, 48)
    pyramid = FeaturePyramid(32, channels)
    for count in (1, 4):  # ViTDet: the last block alone; UPerNet: a block for each level
        encoder.zero_grad()
        levels = pyramid(as_maps(encoder.last_blocks(images, count), images, 8))
        assert pyramid.channels == expected
        sizes = [(2, c, side, side) for c, side in zip(expected, (24, 12, 6, 3), strict=True)]
        assert [tuple(level.shape) for level in levels] == sizes
        sum(level.square().sum() for level in levels).backward()
        assert all(float(block.mlp.fc1.weight.grad.abs().sum()) > 0 for block in encoder.blocks)


def test_maps_keep_the_places_of_patches() -> None:
    tokens = torch.arange(7.0)[None, :, None].expand(1, 7, 2)  # a class token and 2 x 3 patches
    (found,) = as_maps([tokens], torch.empty(1, 3, 16, 24), 8)
    assert found[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_rescaling_happens_in_place() -> None:
    """A bright patch stays where it is at every scale."""
    torch.manual_seed(0)
    grid = torch.zeros(1, 8, 4, 6)
    grid[..., 1, 4] = 1
    pyramid = FeaturePyramid(8, None)
    for level, dark in zip(pyramid(grid), pyramid(grid * 0), strict=True):
        places = (level - dark).abs().sum(1)[0].nonzero().double() + 0.5
        centre = places.mean(0) / torch.tensor(level.shape[-2:]) * torch.tensor([4, 6])
        assert (centre - torch.tensor([1.5, 4.5])).abs().max() <= 0.5


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="scale 3 is none of"):
        FeaturePyramid(8, scales=(3,))
    with pytest.raises(ValueError, match="2 maps for 4 levels"):
        FeaturePyramid(8)([torch.zeros(1, 8, 4, 4)] * 2)
