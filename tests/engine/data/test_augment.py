"""Augmentation: each operation against torchvision, the whole chain's randomness and probabilities."""

import math
from itertools import permutations

import pytest
import torch
from harmony_fast.engine.data import augment
from harmony_fast.engine.data.augment import Augment, AugmentConfig, Kind, draw
from harmony_fast.harmony.randomness import Purpose, sample_keys
from torch import Tensor
from torchvision.transforms.v2 import functional as tv


def keys(count: int, epoch: int = 0) -> Tensor:
    return sample_keys(5, epoch, torch.arange(count), Purpose.AUGMENT)


def images(count: int, side: int = 24, seed: int = 0) -> Tensor:
    """uint8 [count, side, side, 3], with gray, black, white and equal-channel pixels among random ones."""
    x = torch.randint(0, 256, (count, side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x[:, 0] = x[:, 0, :, :1]
    x[:, 1, ::2], x[:, 1, 1::2] = 0, 255
    x[:, 2, :, 1] = x[:, 2, :, 0]
    x[:, 3, :, 2] = x[:, 3, :, 1]
    x[:, 4, :, 2] = x[:, 4, :, 0]
    return x


def floats(count: int, side: int = 24) -> Tensor:
    return images(count, side).permute(0, 3, 1, 2).float().contiguous() / 255


OPERATIONS = [
    (augment.adjust_brightness, tv.adjust_brightness, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (augment.adjust_contrast, tv.adjust_contrast, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (augment.adjust_saturation, tv.adjust_saturation, [0.0, 0.6, 1.0, 1.4, 3.0]),
    (augment.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.03, 0.1, 0.25, 0.5]),
]


@pytest.mark.parametrize(("ours", "theirs", "values"), OPERATIONS)
def test_colour_operations_are_those_of_torchvision(ours, theirs, values: list[float]) -> None:  # type: ignore[no-untyped-def]
    x = floats(len(values))
    expected = torch.stack([theirs(image, value) for image, value in zip(x, values, strict=True)])
    torch.testing.assert_close(ours(x.clone(), torch.tensor(values)), expected, atol=2e-5, rtol=0)


def test_hue_of_pixels_that_earlier_operations_changed() -> None:
    x = floats(8)
    factors = torch.linspace(0.6, 1.4, 8)
    x = augment.adjust_saturation(augment.adjust_contrast(x, factors), factors)
    expected = torch.stack([tv.adjust_hue(image, 0.07) for image in x])
    torch.testing.assert_close(augment.adjust_hue(x.clone(), torch.full((8,), 0.07)), expected, atol=2e-5, rtol=0)


def test_grayscale_and_solarize_are_those_of_torchvision() -> None:
    x = floats(3)
    torch.testing.assert_close(augment.to_grayscale(x.clone()), tv.rgb_to_grayscale(x, 3))
    torch.testing.assert_close(augment.solarize(x.clone()), tv.solarize(x, 128 / 255))


@pytest.mark.parametrize(("side", "radius"), [(24, 6), (24, 2), (9, 8)])
def test_blur_is_that_of_torchvision(side: int, radius: int) -> None:
    x, sigmas = floats(4, side), [0.1, 0.5, 1.3, 2.0]
    expected = torch.stack([tv.gaussian_blur(i, 2 * [2 * radius + 1], [s]) for i, s in zip(x, sigmas, strict=True)])
    torch.testing.assert_close(augment.gaussian_blur(x.clone(), torch.tensor(sigmas), radius), expected)


def by_torchvision(config: AugmentConfig, crop: Tensor, key: Tensor, kind: Kind, view: int, views: int) -> Tensor:
    """One crop, one operation after the other: uint8 [S, S, 3] -> float32 [3, S, S]."""
    d = draw(config, key[None], kind, views).apply(lambda t: t[0, view])
    x = crop.permute(2, 0, 1).float() / 255
    x = tv.horizontal_flip(x) if d.flip else x
    jitter = (
        lambda x: tv.adjust_brightness(x, d.brightness.item()),
        lambda x: tv.adjust_contrast(x, d.contrast.item()),
        lambda x: tv.adjust_saturation(x, d.saturation.item()),
        lambda x: tv.adjust_hue(x, d.hue.item()),
    )
    for operation in list(permutations(range(4)))[d.order] if d.order >= 0 else ():
        x = jitter[operation](x)
    x = tv.rgb_to_grayscale(x, 3) if d.grayscale else x
    if d.blur > 0:
        radius = min(math.ceil(3 * config.blur_sigma[1]), x.shape[-1] - 1)
        x = tv.gaussian_blur(x, 2 * [2 * radius + 1], [d.blur.item()])
    x = tv.solarize(x, 128 / 255) if d.solarize else x
    return tv.normalize(x, list(config.mean), list(config.std))


# A pixel at the threshold of solarize may fall on either side after different rounding: solarize only on its own.
NO_SOLARIZE = AugmentConfig(solarize_other_globals=0)
SOLARIZE = AugmentConfig(jitter=0, grayscale=0, blur_first_global=0, blur_other_globals=0, solarize_other_globals=0.5)


@pytest.mark.parametrize(("config", "kind"), [(NO_SOLARIZE, "global"), (NO_SOLARIZE, "local"), (SOLARIZE, "global")])
def test_the_whole_chain_is_that_of_torchvision(config: AugmentConfig, kind: Kind) -> None:
    crops = images(36).view(12, 3, 24, 24, 3)
    got = Augment(config)(crops, keys(12), kind)
    assert got.shape == (12, 3, 3, 24, 24) and got.dtype == torch.float32
    for b in range(12):
        for v in range(3):
            expected = by_torchvision(config, crops[b, v], keys(12)[b], kind, v, 3)
            torch.testing.assert_close(got[b, v], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_a_sample_does_not_depend_on_its_batch(kind: Kind) -> None:
    crops, apply = images(24).view(12, 2, 24, 24, 3), Augment(AugmentConfig())
    whole = apply(crops, keys(12), kind)
    for b in range(12):
        torch.testing.assert_close(apply(crops[b : b + 1], keys(12)[b : b + 1], kind)[0], whole[b], atol=1e-6, rtol=0)
    assert torch.equal(apply(crops, keys(12), kind), apply(crops, keys(12), kind))
    assert not torch.equal(apply(crops, keys(12, epoch=1), kind), whole)


def test_the_input_stays() -> None:
    crops = images(4).view(2, 2, 24, 24, 3)
    before = crops.clone()
    Augment(AugmentConfig())(crops, keys(2), "global")
    assert torch.equal(crops, before)


def test_crops_and_kinds_are_augmented_independently() -> None:
    one = images(1).expand(4, -1, -1, -1)[None]
    a, b = (Augment(AugmentConfig(jitter=1))(one, keys(1), kind)[0] for kind in ("global", "local"))
    seen = [*a, *b]
    assert not any(torch.equal(seen[i], seen[j]) for i in range(8) for j in range(i))


def test_no_augmentation_only_normalises() -> None:
    off = dict.fromkeys(
        ["flip", "jitter", "grayscale", "blur_first_global", "blur_other_globals", "solarize_other_globals"], 0.0
    )
    crops = images(4).view(2, 2, 24, 24, 3)
    got = Augment(AugmentConfig(**off, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1)))(crops, keys(2), "global")
    expected = (crops.permute(0, 1, 4, 2, 3) / 255 - 0.5) / torch.tensor([0.25, 0.5, 1])[:, None, None]
    torch.testing.assert_close(got, expected)


def near(share: Tensor, probability: float) -> bool:
    """Within five standard deviations of a share of 20,000 draws."""
    return abs(share.double().mean().item() - probability) <= 5 * math.sqrt(probability * (1 - probability) / 20_000)


def test_probabilities_and_ranges() -> None:
    config = AugmentConfig()
    for kind, view, blur, solarize in (("global", 0, 1.0, 0.0), ("global", 1, 0.1, 0.2), ("local", 1, 0.5, 0.0)):
        d = draw(config, keys(20_000), kind, 2).apply(lambda t, view=view: t[:, view])
        for chosen, probability in (
            (d.flip, 0.5), (d.order >= 0, 0.8), (d.grayscale, 0.2), (d.blur > 0, blur), (d.solarize, solarize)
        ):  # fmt: skip
            assert near(chosen, probability)
        assert all(near(d.order == order, 0.8 / 24) for order in range(24))
        cases = ((d.brightness, 0.6, 1.4), (d.contrast, 0.6, 1.4), (d.saturation, 0.8, 1.2), (d.hue, -0.1, 0.1))
        for values, low, high in (*cases, (d.blur[d.blur > 0], 0.1, 2.0)):
            assert low <= values.min() and values.max() <= high
            width, wanted = high - low, (low + high) / 2
            assert abs(values.mean() - wanted) < 5 * width / math.sqrt(12 * len(values))
            assert values.max() - values.min() > 0.99 * width


def test_draws_are_independent_of_each_other() -> None:
    d = draw(AugmentConfig(blur_first_global=0.5), keys(20_000), "global", 2)
    columns = torch.stack([getattr(d, name)[:, v].float() for name in vars(d) for v in (0, 1)])
    columns = columns[columns.std(1) > 0]
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlation.abs().max() < 6 / math.sqrt(20_000)


def test_a_sigma_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="blur_sigma"):
        AugmentConfig(blur_sigma=(0.0, 1.0))
