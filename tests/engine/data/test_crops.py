"""The compiled crop operation against its PyTorch reference and against PIL."""

import io

import numpy as np
import pytest
import torch
from harmony_fast.engine.data import crops, portable_crops
from harmony_fast.harmony import randomness
from harmony_fast.harmony.randomness import Purpose, sample_keys
from harmony_fast.harmony.views import ViewsConfig, crop_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

SEED = st.integers(-(2**70), 2**70)
SIDE = st.integers(1, 3000)
SCALE = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple)
ASPECT = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted).map(tuple)


def unsigned(key: torch.Tensor) -> np.uint64:
    return np.uint64(int(key) & (2**64 - 1))


def picture(height: int, width: int, seed: int = 0, grain: int = 8) -> np.ndarray:
    """Smooth random colours that change every `grain` pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // grain + 2, width // grain + 2, 3), dtype=np.uint8)
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


@given(st.integers(1, 300), st.integers(0, 3000))
@settings(max_examples=300, deadline=None)
def test_every_output_pixel_is_a_mean_of_source_pixels(size: int, more: int) -> None:
    first, count, share = crops._covered(size + more, size)
    assert (first >= 0).all() and (count >= 1).all() and (first + count <= size + more).all()
    assert (count <= share.shape[1]).all() and (share >= 0).all()
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-4)


def test_edges_do_not_leak_from_outside_the_box() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    image[10:30, 10:30] = 200
    for size in (8, 20, 64):
        out = np.empty((size, size, 3), np.uint8)
        crops.cut(image, (10, 10, 20, 20), out)
        assert (out == 200).all()


def jpeg_of(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return np.frombuffer(file.getvalue(), np.uint8)


def crops_of(jpegs: list[np.ndarray], sizes: list[tuple[int, int]], views: ViewsConfig, most: int) -> list[np.ndarray]:
    """Global and local crops of some JPEGs, of height and width `sizes`."""
    count = len(jpegs)
    large = np.empty((count, views.global_crops, views.global_size, views.global_size, 3), np.uint8)
    small = np.empty((count, views.local_crops, views.local_size, views.local_size, 3), np.uint8)
    status = np.empty(count, np.int32)
    height, width = np.array(sizes).T
    crops.cut_batch(
        np.arange(count), np.zeros(count, np.int64), height, width, np.array([j.ctypes.data for j in jpegs]),
        np.array([j.size for j in jpegs]), crops.epoch_key(3, 0), crops.geometry(views), most, large, small, status,
    )  # fmt: skip
    assert not status.any()
    return [large, small]


def test_large_images_are_decoded_smaller_and_look_the_same() -> None:
    views = ViewsConfig(global_size=96, local_size=40, local_crops=3)
    sizes = [(1000, 1203), (701, 1501), (515, 517), (96, 2000)]
    jpegs = [jpeg_of(picture(*size, seed=i, grain=60)) for i, size in enumerate(sizes)]
    whole, reduced = crops_of(jpegs, sizes, views, 1), crops_of(jpegs, sizes, views, 8)
    different = [[not np.array_equal(a[i], b[i]) for a, b in zip(whole, reduced, strict=True)] for i in range(4)]
    assert different == [[True, True], [True, True], [True, True], [False, False]]
    for a, b in zip(whole, reduced, strict=True):
        assert np.abs(a.astype(int) - b).mean() < 2 and np.quantile(np.abs(a.astype(int) - b), 0.999) < 24


@given(st.integers(-(2**63), 2**63 - 1), SIDE, SIDE, st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_no_crop_is_enlarged_by_a_smaller_decode(key: int, height: int, width: int, large: int, small: int) -> None:
    size = torch.tensor([height]), torch.tensor([width])
    boxes = crop_boxes(torch.tensor([key]), *size, 4, (0.05, 1.0), (0.75, 4 / 3))[0].numpy()
    sides = np.array([large, large, small, small])
    part = crops.reduction(boxes, sides, 8)
    assert part == portable_crops.reduction(boxes, sides)
    room = (boxes[:, 2:] // sides[:, None]).min()
    assert part == max(p for p in (1, 2, 4, 8) if p <= max(room, 1))
    for (top, left, h, w), side in zip(boxes.tolist(), sides.tolist(), strict=True):
        for start, length, whole in ((top, h, height), (left, w, width)):
            first, size = crops._reduced(start, length, part, side, -(-whole // part))
            if part > 1:
                assert size >= side and first >= 0 and first + size <= -(-whole // part)
                assert abs(first - start / part) <= 1 and abs(first + size - (start + length) / part) <= 1
