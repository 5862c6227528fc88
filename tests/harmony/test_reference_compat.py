"""Each key that `reference_compat` sets: what the authors' code does, and what the default does instead."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawn import draw_views
from harmony_fast.engine.build import build_model
from harmony_fast.engine.config import REFERENCE_COMPAT, RunConfig, parse_config
from harmony_fast.engine.optimizer import parameter_groups
from harmony_fast.harmony.model import Harmony
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.packing import lay_out_captions
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Views, pixel_ratio

DOCS = Path(__file__).parents[2] / "docs" / "reference.md"
CLOCK = Clock(5, 4, 10)  # in the middle of the second epoch


def models(tiny: dict) -> tuple[Harmony, Harmony]:
    """As the authors' code has it, and by default, with equal weights."""
    built = []
    for compat in (True, False):
        torch.manual_seed(0)
        built.append(build_model(parse_config({**tiny, "reference_compat": compat}, "the test")))
    return built[0], built[1]


def configs(tiny: dict) -> tuple[RunConfig, RunConfig]:
    theirs, ours = models(tiny)
    return theirs.config, ours.config


def views_of(model: Harmony, batch: int = 6) -> Views:
    g = torch.Generator().manual_seed(1)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    for i, row in enumerate(tokens):
        length = 6 + i
        row[0], row[length - 1] = 49406, 49407
        row[1 : length - 1] = torch.randint(1, 49406, (length - 2,), generator=g)
    crops = torch.randn(2, batch, 3, 32, 32, generator=g), torch.randn(2, batch, 3, 16, 16, generator=g)
    return draw_views(model.config.views, 8, *crops, tokens, torch.arange(batch), 0, 0)


def centers_after_a_step(model: Harmony) -> dict[str, torch.Tensor]:
    views = views_of(model)
    model.losses(views, model.teach(views), CLOCK, Collectives())
    model.end_step(Collectives())
    return {name: value for name, value in model.state_dict().items() if name.endswith("center.value")}


def logit_scale_bound(tiny: dict) -> None:
    theirs, ours = models(tiny)
    assert theirs.objectives["contrastive"].upper_bounds() == []
    ((parameter, bound),) = ours.objectives["contrastive"].upper_bounds()
    assert parameter is ours.objectives["contrastive"].logit_scale and bound == pytest.approx(torch.tensor(100.0).log())


def image_temperature(tiny: dict) -> None:
    """Within an epoch the temperature stands still in the authors' code and moves by default."""
    tiny["objectives"]["self_distillation"].update(teacher_temperature_start=0.02, teacher_temperature=0.08)
    for model, moves in zip(models(tiny), (False, True), strict=True):
        objective = model.objectives["self_distillation"]
        first, second = (objective.teacher_temperature(Clock(step, 4, 10)) for step in (4, 6))
        assert (first != second) == moves


def text_temperature(tiny: dict) -> None:
    for model, moves in zip(models(tiny), (False, True), strict=True):
        objective = model.objectives["text_distillation"]
        first, second = (objective.teacher_temperature(Clock(step, 4, 10)) for step in (4, 6))
        assert (first != second) == moves


def patch_center(tiny: dict) -> None:
    """Over all teacher patches, or over those that the student must predict."""
    name = "objectives.self_distillation.patch_center.value"
    theirs, ours = (centers_after_a_step(model)[name] for model in models(tiny))
    assert not torch.allclose(theirs, ours)
    model = models(tiny)[1]
    views, head = views_of(model), model.teacher.heads["self_distillation"]
    images, _ = model.teacher.encode(views, model.teacher_views)
    logits = head(next(iter(images.values()))[:, :, 1:])
    torch.testing.assert_close(theirs, 0.1 * logits.mean((0, 1, 2)))
    torch.testing.assert_close(ours, 0.1 * logits[views.block_mask].mean(0))


def text_center(tiny: dict) -> None:
    """The mean of probabilities, padding too, is about 1 / K and does not center; the mean of logits does."""
    name = "objectives.text_distillation.center.value"
    theirs, ours = (centers_after_a_step(model)[name] for model in models(tiny))
    assert float(theirs.sum()) == pytest.approx(0.1, rel=1e-4) and (theirs > 0).all()
    assert (ours < 0).any() and float(ours.std()) > float(theirs.std())
    model = models(tiny)[0]
    teacher, tokens = model.teacher, views_of(model).tokens
    words = teacher.text.encode(tokens[None], lay_out_captions(torch.full((len(tokens),), 16), 16))
    temperature = model.objectives["text_distillation"].teacher_temperature(CLOCK)
    probabilities = (teacher.heads["text_distillation"](words) / temperature).softmax(-1)
    torch.testing.assert_close(theirs, 0.1 * probabilities.mean(0))


def decoder_positions(tiny: dict) -> None:
    """With a table of zeros all removed patches of an image get one prediction."""
    for model, differ in zip(models(tiny), (False, True), strict=True):
        views = views_of(model)
        features = model.student.features(model.student.encode(views, model.student_views), "reconstruction")
        prediction = model.objectives["reconstruction"].predict(features, views)
        assert (float((prediction - prediction[:, :, :1]).abs().max()) > 1e-3) == differ


def mask_ratio(tiny: dict) -> None:
    """Read at the epoch's number the ramp has hardly begun when it should be over."""
    tiny["views"].update(pixel_mask_ratio=0.5, pixel_mask_ratio_end=0.9, pixel_mask_ratio_epochs=2)
    theirs, ours = configs(tiny)
    after_two_epochs = Clock(40, 20, 10)
    assert pixel_ratio(ours.views, after_two_epochs) == 0.9
    assert 0.5 < pixel_ratio(theirs.views, after_two_epochs) < 0.53


def clipping(tiny: dict) -> None:
    """tests/engine/test_zero.py shows what each does to the gradients."""
    theirs, ours = configs(tiny)
    assert (theirs.optimizer.clip, ours.optimizer.clip) == ("parameter", "global")


def clipped_parameters(tiny: dict) -> None:
    """Only the image tower and its head in the authors' code."""
    theirs, ours = configs(tiny)
    assert ours.optimizer.clip_only == []
    model = models(tiny)[0]
    names = [n for group in parameter_groups(model) for n, p in model.named_parameters() if p in set(group["params"])]
    clipped = [n for n in names if n.startswith(tuple(theirs.optimizer.clip_only))]
    expected = [n for n in names if n.startswith("student.image.") or "heads.self_distillation" in n]
    assert sorted(clipped) == sorted(expected) and 0 < len(clipped) < len(names)


BEHAVIOUR: dict[str, Callable[[dict], None]] = {
    "optimizer.clip": clipping,
    "optimizer.clip_only": clipped_parameters,
    "views.pixel_mask_ratio_by_epoch": mask_ratio,
    "objectives.contrastive.max_logit_scale": logit_scale_bound,
    "objectives.self_distillation.temperature_by_epoch": image_temperature,
    "objectives.self_distillation.patch_center": patch_center,
    "objectives.text_distillation.temperature_by_epoch": text_temperature,
    "objectives.text_distillation.center_of": text_center,
    "objectives.reconstruction.position_embedding": decoder_positions,
}


@pytest.mark.parametrize("key", REFERENCE_COMPAT)
def test_each_key_does_what_the_table_says(tiny: dict, key: str) -> None:
    BEHAVIOUR[key](tiny)


def test_a_key_that_is_set_stays_as_it_is(tiny: dict) -> None:
    tiny["objectives"]["text_distillation"]["center_of"] = "logits"
    config = parse_config({**tiny, "reference_compat": True, "optimizer": {"clip": "global"}}, "the test")
    assert config.objectives.text_distillation.center_of == "logits"
    assert config.optimizer.clip == "global"
    assert config.objectives.self_distillation.patch_center == "all"


def test_the_table_in_the_docs_has_every_key() -> None:
    documented = set(re.findall(r"^\| `([a-z_.]+)`", DOCS.read_text(), re.MULTILINE))
    assert documented == set(REFERENCE_COMPAT)
