"""The pictures of the report show what the model really does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import draw_views
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.report.patches import class_attention, components, principal_colours
from harmony_fast.engine.report.reconstructions import reconstruct
from harmony_fast.engine.report.samples import cut_crops
from harmony_fast.engine.report.targets import drawn, prototype_scores, spread
from harmony_fast.engine.report.views import with_holes
from harmony_fast.harmony.model import Harmony
from harmony_fast.harmony.objectives import Collectives, Features
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import View, Views
from PIL import Image
from sklearn.decomposition import PCA

CONFIG = parse_config(
    {
        "data": {"train": "none.beton"},
        "model": {"image": {"width": 16, "depth": 2, "heads": 2, "patch_size": 8}},
        "views": {"global_size": 32, "local_size": 16, "local_crops": 2},
        "objectives": {"reconstruction": {"width": 16, "depth": 1, "heads": 2}},
    },
    "test",
)


@pytest.fixture(scope="module")
def model() -> Harmony:
    torch.manual_seed(1)
    model = Harmony(CONFIG).eval()
    for parameter in model.parameters():  # initial weights attend almost evenly
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_attention_maps_are_the_weights_that_the_block_uses(model: Harmony) -> None:
    encoder, images = model.student.image, torch.randn(3, 3, 32, 32)
    attention, seen = encoder.blocks[-1].attn, []
    attention.qkv.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    attention.proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        weights = class_attention(encoder, images)
        values = attention.qkv(seen[0]).view(3, 17, 3, 2, 8)[:, :, 2].transpose(1, 2)  # [B, heads, tokens, d]
    on_class = 1 - weights.sum(-1, keepdim=True)
    mixed = torch.cat([on_class, weights], -1)[:, :, None] @ values
    torch.testing.assert_close(mixed.squeeze(2).flatten(1), seen[1].view(3, 17, 16)[:, 0], atol=1e-5, rtol=1e-5)
    assert weights.std() > 0.01


def test_reconstructions_keep_visible_patches_and_the_error_is_the_loss(model: Harmony) -> None:
    tokens = torch.tensor([[49406, 320, 49407, 0]]).expand(5, -1)
    crops = torch.randn(2, 5, 3, 32, 32), torch.zeros(0, 5, 3, 16, 16)
    views = draw_views(CONFIG.views, 8, *crops, tokens, torch.arange(5), seed=0, epoch=0)
    filled, errors = reconstruct(model, views)
    changed = (filled != views.global_crops[0]).any(1).view(5, 4, 8, 4, 8).any(4).any(2).flatten(1)
    removed = torch.zeros(5, 16, dtype=torch.bool).scatter_(1, views.removed[0], True)
    assert torch.equal(changed & ~removed, torch.zeros_like(removed))
    assert torch.equal(changed, removed)

    objective, encoder = model.objectives["reconstruction"], model.student.image
    student = Features(encoder(views, {View.GLOBAL_VISIBLE: 2}), {}, encoder, None, None)
    outcome = objective(student, student, views, Clock(0, 1, 1), Collectives())
    both = torch.tensor(errors).mean()
    second = reconstruct_second_crop(model, views)
    assert outcome.loss.item() == pytest.approx((both + second).item(), rel=1e-4)


def reconstruct_second_crop(model: Harmony, views: Views) -> torch.Tensor:
    """The error of the second crop: the first one of views with swapped crops."""
    names = "global_crops", "kept", "removed"
    swapped = replace(views, **{name: getattr(views, name).flip(0) for name in names})
    return torch.tensor(reconstruct(model, swapped)[1]).mean()


def test_crops_are_those_of_the_run() -> None:
    images = [Image.effect_noise((30 + i, 40), 50).convert("RGB") for i in range(3)]
    one, _ = cut_crops(images, torch.tensor([7, 8, 9]), CONFIG)
    other, small = cut_crops(images[1:], torch.tensor([8, 9]), CONFIG)
    assert torch.equal(one[1:], other)
    assert one.shape == (3, 2, 32, 32, 3)
    assert small.shape == (2, 2, 16, 16, 3)


def test_holes_are_transparent() -> None:
    crops = np.full((1, 16, 16, 3), 200, np.uint8)
    shown = with_holes(crops, torch.tensor([[1, 2]]), 8)
    assert shown[0, 0, 0].tolist() == [200, 200, 200, 255]
    assert shown[0, 0, 8, 3] == shown[0, 8, 0, 3] == 0
    assert shown[0, 8, 8, 3] == 255


def test_components_are_those_of_an_independent_implementation() -> None:
    rows = torch.randn(200, 12) @ torch.randn(12, 12) + torch.randn(12)
    theirs = torch.from_numpy(PCA(3).fit_transform(rows.numpy()))
    ours = components(rows, 3)
    for i in range(3):  # up to the sign
        assert min((ours[:, i] - s * theirs[:, i]).abs().max() for s in (1, -1)) < 1e-3


def test_foreground_is_in_the_middle_and_colours_are_shared() -> None:
    tokens = 0.1 * torch.randn(4, 64, 10)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    tokens[:, inside.flatten(), 0] += 5.0
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[2:6, 2:4] = True
    tokens[:, left.flatten(), 1] += 2.0
    colours, front = principal_colours(tokens)
    assert torch.equal(front, inside.flatten().expand(4, -1))
    parts = [colours[:, side][..., 0].mean() for side in (left.flatten(), (inside & ~left).flatten())]
    assert abs(parts[0] - parts[1]) > 0.5
    assert colours[front].min() >= 0
    assert colours[front].max() <= 1
    assert not colours[~front].any()


def test_equal_tokens_have_no_components_and_no_error() -> None:
    colours, front = principal_colours(torch.ones(2, 16, 5))
    assert colours.shape == (2, 16, 3)
    assert front.shape == (2, 16)
    assert colours.isfinite().all()


def test_the_teachers_targets_are_those_of_the_loss() -> None:
    raw = {**CONFIG.model_dump(mode="json", by_alias=True), "objectives": {"self_distillation": {
        "prototypes": 24, "hidden": 16, "bottleneck": 8, "patch_weight": None}}}  # fmt: skip
    torch.manual_seed(2)
    model = Harmony(parse_config(raw, "test")).eval()
    objective, crops = model.objectives["self_distillation"], torch.randn(6, 3, 32, 32)
    objective.class_center.value.copy_(torch.randn(24))
    u = model.teacher.heads["self_distillation"].bottleneck(model.teacher.image.features(crops)[:, 0])
    shares = prototype_scores(model.teacher, crops, objective, 0.04)
    tau = 0.04
    entropy = objective.entropy(u, model.teacher.heads["self_distillation"].last_layer(), tau)
    assert spread(shares) == pytest.approx(float(entropy.exp()), rel=1e-4)
    uncentred = prototype_scores(model.student, crops, objective, 0.04)
    assert not torch.allclose(shares, uncentred)  # equal weights: only the center parts them


def test_a_matrix_is_brightest_where_it_is_largest() -> None:
    probabilities = torch.tensor([[0.7, 0.3], [0.1, 0.9]])
    blue, green = np.zeros((2, 30, 50, 3), np.uint8)
    blue[..., 2] = green[..., 1] = 255
    pixels = drawn(probabilities, [blue, blue], [green, green])
    assert pixels.shape == (108, 108, 3)
    cells = pixels[54::36, 54::36].sum(-1, dtype=int)
    assert cells.argmax() == 3
    assert cells.argmin() == 2
    assert (pixels[36:, :36] == (0, 0, 255)).all(-1).any()
    assert (pixels[:36, 36:] == (0, 255, 0)).all(-1).any()
