"""The compiled crop operation against its PyTorch reference and against PIL."""

import numpy as np
import pytest
import torch
from harmony_fast.engine.data import crops
from harmony_fast.harmony import randomness
from harmony_fast.harmony.randomness import Purpose, sample_keys
from harmony_fast.harmony.views import crop_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SEED = st.integers(-(2**70), 2**70)
SIDE = st.integers(1, 3000)
SCALE = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple)
ASPECT = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).map(tuple)


def unsigned(key: torch.Tensor) -> np.uint64:
    return np.uint64(int(key) & (2**64 - 1))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@given(SEED, st.integers(0, 2**62), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_keys_are_those_of_the_reference(seed: int, epoch: int, index: int) -> None:
    expected = sample_keys(seed, epoch, torch.tensor([index]), Purpose.CROP)[0]
    epoch_key = crops.epoch_key(seed, epoch)
    inner = np.uint64(crops.mix(np.uint64((int(epoch_key) + index) & (2**64 - 1))))
    key = np.uint64(crops.mix(np.uint64((int(inner) + int(Purpose.CROP)) & (2**64 - 1))))
    assert key == unsigned(expected)
    assert crops.uniform(key, 7) == randomness.uniform(expected[None], 8)[0, 7].item()


@given(st.integers(-(2**63), 2**63 - 1), SIDE, SIDE, SCALE, ASPECT)
@settings(max_examples=300, deadline=None)
def test_boxes_are_those_of_the_reference(
    key: int, height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> None:
    keys = torch.tensor([key])
    expected = crop_boxes(keys, torch.tensor([height]), torch.tensor([width]), 3, scale, aspect)[0].tolist()
    for c, box in enumerate(expected):
        top, left, h, w = crops.crop_box(np.uint64(crops.child(unsigned(keys[0]), c)), height, width, scale, aspect)
        assert [top, left, h, w] == box
        assert 0 <= top <= height - h and 0 <= left <= width - w


def test_a_box_that_never_fits_is_the_largest_centred_one() -> None:
    assert crops.crop_box(np.uint64(5), 10, 1000, (0.9, 1.0), (0.75, 4 / 3)) == (0, 493, 10, 13)
    assert crops.crop_box(np.uint64(5), 1000, 10, (0.9, 1.0), (0.75, 4 / 3)) == (493, 0, 13, 10)


@pytest.mark.parametrize(
    ("box", "size", "filter_", "tolerance"),
    [
        ((5, 9, 40, 50), 64, Image.Resampling.BILINEAR, 1),  # enlarged
        ((0, 0, 1, 1), 16, Image.Resampling.BILINEAR, 0),  # a single pixel
        ((3, 4, 60, 96), 64, Image.Resampling.BILINEAR, 16),  # one side enlarged: PIL smooths the other a little more
        ((10, 2, 64, 64), 32, Image.Resampling.BOX, 1),  # shrunk to the half
        ((7, 8, 64, 64), 64, Image.Resampling.BOX, 0),  # copied
    ],
)
def test_crops_look_like_those_of_pil(
    box: tuple[int, int, int, int], size: int, filter_: Image.Resampling, tolerance: int
) -> None:
    image = picture(100, 120)
    top, left, h, w = box
    expected = Image.fromarray(image).crop((left, top, left + w, top + h)).resize((size, size), filter_)
    out = np.empty((size, size, 3), np.uint8)
    crops.cut(image, box, out)
    difference = np.abs(out.astype(int) - np.asarray(expected, int))
    assert difference.max() <= tolerance
    assert difference.mean() <= 2


def test_shrinking_averages_the_area_a_pixel_covers() -> None:
    image = picture(100, 120)
    out = np.empty((32, 32, 3), np.uint8)
    crops.cut(image, (10, 0, 80, 72), out)  # 2.5 x 2.25 source pixels make one: 10 x 9 quarters of a pixel
    quarters = image[10:90, :72].repeat(4, 0).repeat(4, 1)
    expected = quarters.reshape(32, 10, 32, 9, 3).mean((1, 3))
    assert np.abs(out - expected).max() <= 1


def test_edges_do_not_leak_from_outside_the_box() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[10:30, 10:30] = 200
    for size in (8, 20, 64):
        out = np.empty((size, size, 3), np.uint8)
        crops.cut(image, (10, 10, 20, 20), out)
        assert (out == 200).all()
