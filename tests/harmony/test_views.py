import json
import math
from itertools import count as counting
from pathlib import Path

import pytest
import torch
from harmony_fast.harmony.randomness import Purpose, mix, sample_keys, split, uniform
from harmony_fast.harmony.views import (
    View,
    ViewsConfig,
    block_masks,
    caption_lengths,
    caption_masks,
    crop_boxes,
    cut_captions,
    pixel_masks,
    union,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
index = torch.arange(2000)


def test_mix_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 1234567, as published with the reference code (Vigna)."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        signed = state - 2**64 if state >> 63 else state
        outputs.append(int(mix(torch.tensor(signed))) % 2**64)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [key % 2**64 for key in split(torch.tensor(1234567), 3).tolist()] == outputs


def test_draws_are_uniform_and_independent_of_their_company() -> None:
    keys = sample_keys(3, 1, index, Purpose.CROP)
    u = uniform(keys, 50)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert torch.equal(uniform(sample_keys(3, 1, index[7:8], Purpose.CROP), 50), u[7:8])
    others = [sample_keys(4, 1, index, Purpose.CROP), sample_keys(3, 2, index, Purpose.CROP),
              sample_keys(3, 1, index, Purpose.AUGMENT)]  # fmt: skip
    for other in others:
        correlation = torch.corrcoef(torch.stack([u[:, 0], uniform(other, 1)[:, 0]]))[0, 1]
        assert abs(correlation) < 0.1


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 700), width=st.integers(1, 700), seed=st.integers(0, 10**6))
def test_crops_lie_inside(height: int, width: int, seed: int) -> None:
    keys = sample_keys(seed, 0, index[:20], Purpose.CROP)
    sizes = torch.full((20,), height), torch.full((20,), width)
    top, left, h, w = crop_boxes(keys, *sizes, 3, (0.05, 0.32), (0.75, 4 / 3)).unbind(-1)
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_crops_have_the_areas_and_ratios_asked_for() -> None:
    keys = sample_keys(0, 0, index, Purpose.CROP)
    side = torch.full((len(index),), 500)
    _, _, h, w = crop_boxes(keys, side, side, 2, (0.32, 0.8), (0.75, 4 / 3)).double().unbind(-1)
    area, ratio = h * w / 500**2, w / h
    assert area.min() > 0.315 and area.max() < 0.805 and abs(area.mean() - 0.56) < 0.02
    assert ratio.min() > 0.74 and ratio.max() < 1.35 and abs(ratio.log().mean()) < 0.02


def crop_by_hand(numbers: list[float], height: int, width: int, scale: tuple, aspect: tuple) -> list[int]:
    """Top, left, height, width, from four numbers an attempt."""
    for i in range(0, len(numbers), 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[i])
        ratio = aspect[0] * (aspect[1] / aspect[0]) ** numbers[i + 1]
        w, h = (math.floor(math.sqrt(x) + 0.5) for x in (area * ratio, area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return [math.floor(numbers[i + 2] * (height - h + 1)), math.floor(numbers[i + 3] * (width - w + 1)), h, w]
    w = math.floor(height * aspect[1] + 0.5) if width / height > aspect[1] else width
    h = math.floor(width / aspect[0] + 0.5) if width / height < aspect[0] else height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("height", "width"), [(64, 48), (9, 50), (50, 9), (3, 700), (701, 4), (1, 1)])
@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.7, 1.0)])
def test_crops_are_those_of_the_written_out_draw(height: int, width: int, scale: tuple) -> None:
    keys, aspect = sample_keys(2, 0, index[:30], Purpose.CROP), (0.6, 4 / 3)
    found = crop_boxes(keys, torch.full((30,), height), torch.full((30,), width), 2, scale, aspect)
    numbers = uniform(split(keys, 2), 40).flatten(0, 1).tolist()
    assert found.flatten(0, 1).tolist() == [crop_by_hand(n, height, width, scale, aspect) for n in numbers]


def test_a_range_may_be_one_number() -> None:
    assert ViewsConfig(global_scale=(0.5, 0.5)).global_scale == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"lower bound 0\.6 is above"):
        ViewsConfig(global_scale=(0.6, 0.5))


STORED = json.loads((GOLDEN / "schedules_a.json").read_text())["block_masks"]


@pytest.mark.parametrize("expected", STORED)
def test_block_masks_have_the_reference_statistics(expected: dict) -> None:
    keys = sample_keys(5, 0, torch.arange(20000), Purpose.BLOCK_MASK)
    mask = block_masks(keys, 14, tuple(expected["pred_ratio"]), tuple(expected["pred_ratio_var"]))
    share = mask.float().mean(1)
    filled = share[share > 0]
    assert abs(share.mean() - expected["mean_masked_fraction"]) < 4.5 * expected["standard_error_of_mean"]
    assert abs((share == 0).float().mean() - expected["fraction_of_empty_masks"]) < 0.015
    assert abs(filled.mean() - expected["mean_masked_fraction_of_nonempty"]) < 0.006
    assert filled.max() <= expected["max_masked_fraction"] + 1e-6
    grid = mask.view(-1, 14, 14)
    pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
    assert abs(pairs / grid.sum() - expected["mean_side_neighbour_pairs_per_masked_patch"]) < 0.03
    frequency = torch.tensor(expected["per_position_masked_frequency"])
    assert (grid.float().mean(0) - frequency).abs().max() < 0.02


def block_mask_by_hand(key: torch.Tensor, side: int, ratios: tuple, spreads: tuple, aspect: float) -> list[list[bool]]:
    """Rectangles one after the other."""
    start, rounds = split(key, 2)
    which, spread = uniform(start, 2).tolist()
    choice = int(which * len(ratios))
    goal = int((ratios[choice] + spreads[choice] * (2 * spread - 1)) * side * side)
    mask, failures = torch.zeros(side, side, dtype=torch.bool), 0
    for attempt in counting():
        missing = goal - int(mask.sum())
        if missing <= 0 or failures == 10:
            return mask.tolist()
        u = uniform(rounds + attempt, 4).tolist()
        smallest = (side // 3) ** 2
        area, ratio = max(0, smallest + u[0] * (missing - smallest)), aspect ** (1 - 2 * u[1])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = int(u[2] * (side - h + 1)), int(u[3] * (side - w + 1))
        both = mask.clone()
        both[top : top + h, left : left + w] = True
        failures += 1
        if h < side and w < side and mask.sum() < both.sum() <= goal:
            mask, failures = both, 0


@pytest.mark.parametrize(("side", "ratios", "spreads", "aspect"), [
    (6, (0.0, 0.3), (0.0, 0.2), 0.3), (7, (0.9,), (0.1,), 0.05), (4, (0.5, 0.2, 0.7), (0.1, 0.2, 0.3), 1.0),
])  # fmt: skip
def test_block_masks_are_those_of_the_written_out_draw(side: int, ratios: tuple, spreads: tuple, aspect: float) -> None:
    keys = sample_keys(3, 0, index[:25], Purpose.BLOCK_MASK)
    found = block_masks(keys, side, ratios, spreads, aspect).unflatten(1, (side, side))
    assert found.tolist() == [block_mask_by_hand(key, side, ratios, spreads, aspect) for key in keys]


def test_a_block_mask_does_not_depend_on_its_batch() -> None:
    keys = sample_keys(5, 0, index[:64], Purpose.BLOCK_MASK)
    together = block_masks(split(keys, 2).T, 8, (0.0, 0.3), (0.0, 0.2))
    alone = block_masks(split(keys[9:10], 2).T, 8, (0.0, 0.3), (0.0, 0.2))
    assert together.shape == (2, 64, 64)
    assert torch.equal(together[:, 9:10], alone)


@given(patches=st.integers(1, 200), ratio=st.floats(0, 1))
def test_pixel_masks_split_the_patches(patches: int, ratio: float) -> None:
    kept, removed = pixel_masks(sample_keys(0, 0, index[:6], Purpose.PIXEL_MASK).view(2, 3), patches, ratio)
    assert kept.shape == (2, 3, int(patches * (1 - ratio)))
    everything = torch.cat([kept, removed], -1).sort(-1).values
    assert torch.equal(everything, torch.arange(patches).expand(2, 3, -1))


def test_only_words_are_masked() -> None:
    tokens = torch.zeros(500, 12, dtype=torch.int64)
    lengths = torch.arange(500) % 11 + 2
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = 7
        row[length - 1] = 99
    assert torch.equal(caption_lengths(tokens), lengths)
    mask = caption_masks(sample_keys(0, 0, index[:500], Purpose.CAPTION_MASK), lengths, 12, 0.2)
    position = torch.arange(12)
    words = (position > 0) & (position < lengths[:, None] - 1)
    assert not (mask & ~words).any()
    assert abs(mask.sum() / words.sum() - 0.2) < 0.03


def test_captions_are_cut_after_their_first_phrase() -> None:
    captions = ["french fries, fries", "om, om symbol", "factory", ", odd"]
    tokens = SimpleTokenizer(context_length=12)(captions)
    expected = SimpleTokenizer(context_length=12)(["french fries", "om", "factory", ", odd"])
    keys = sample_keys(0, 0, torch.arange(4), Purpose.CAPTION_CUT)
    assert torch.equal(cut_captions(keys, tokens, 1.0, ViewsConfig().caption_separators), expected)
    assert torch.equal(cut_captions(keys, tokens, 0.0, ViewsConfig().caption_separators), tokens)
    many = cut_captions(sample_keys(0, 0, index, Purpose.CAPTION_CUT), tokens[:1].repeat(2000, 1), 0.3, (267,))
    assert abs((caption_lengths(many) == 4).float().mean() - 0.3) < 0.04


@pytest.mark.parametrize(
    ("ratios", "spreads", "message"),
    [([0.3], [0.0, 0.2], "they are 1 and 2"), ([], [], "they are 0 and 0"), ([1.3], [0.0], "less than or equal to 1")],
)
def test_block_ratios_that_say_nothing_are_refused(ratios: list[float], spreads: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewsConfig.model_validate({"block_ratios": ratios, "block_ratio_spreads": spreads})


def test_union_of_requests() -> None:
    one, other = {View.GLOBAL_PLAIN: 1, View.CAPTION: 1}, {View.GLOBAL_PLAIN: 2, View.LOCAL: 0}
    assert union([one, other]) == {View.GLOBAL_PLAIN: 2, View.CAPTION: 1}
