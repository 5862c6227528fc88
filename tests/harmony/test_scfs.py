"""SCFS: against a slow explicit reference in float64, and what must hold of any search."""

import pytest
import torch
import torch.nn.functional as F
from drawn import draw_views
from harmony_fast.harmony.model import Harmony, MethodConfig
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.objectives.scfs import search
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import View, Views
from torch import Tensor

CLOCK = Clock(5, 4, 10)
SCFS = {"prototypes": 24, "hidden": 32, "bottleneck": 16, "search_temperature": 0.05}


def build(tiny: dict, views: dict, **scfs: object) -> Harmony:
    torch.manual_seed(0)
    raw = {"model": tiny["model"], "views": {**tiny["views"], **views}, "objectives": {"scfs": {**SCFS, **scfs}}}
    model = Harmony(MethodConfig.model_validate(raw)).double()
    with torch.no_grad():  # a teacher that is not the student, with a center that is not zero
        for parameter in model.teacher.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.objectives["scfs"].center.value.normal_()
    return model


def views_of(model: Harmony, batch: int = 3) -> Views:
    torch.manual_seed(1)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1], tokens[:, 2] = 49406, 320, 49407
    v = model.config.views
    sizes = ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
    crops = (torch.randn(count, batch, 3, size, size, dtype=torch.float64) for count, size in sizes)
    return draw_views(v, 8, *crops, tokens, torch.arange(batch), 0, 0)


def loss_of(model: Harmony, views: Views) -> Tensor:
    student = model.student.features(model.student.encode(views, model.student_views), "scfs")
    with torch.no_grad():
        teacher = model.teacher.features(model.teacher.encode(views, model.teacher_views), "scfs")
    return model.objectives["scfs"](student, teacher, views, CLOCK, Collectives()).loss


def reference_loss(model: Harmony, views: Views) -> tuple[Tensor, Tensor]:
    """The loss, and the mean of the teacher's logits, one patch at a time."""
    learned, _ = model.student.encode(views, model.student_views)
    taught, _ = model.teacher.encode(views, model.teacher_views)
    c, center = model.objectives["scfs"].config, model.objectives["scfs"].center.value
    tau = c.teacher_temperature_start + (c.teacher_temperature - c.teacher_temperature_start) * 1.25 / 5
    student = [crop[:, 1:] for view in (View.GLOBAL_PLAIN, View.LOCAL) for crop in learned.get(view, [])]
    teacher = [crop[:, 1:].detach() for crop in taught[View.GLOBAL_PLAIN]]
    terms, logits = [], []
    for a, there in enumerate(teacher):
        for v, here in enumerate(student):
            if a == v:
                continue
            pair = []
            for sample in range(len(here)):
                for patch in here[sample]:
                    cosines = [torch.cosine_similarity(patch.detach(), t, dim=0) for t in there[sample]]
                    weights = torch.stack(cosines).div(c.search_temperature).softmax(0)
                    found = sum(w * t for w, t in zip(weights, there[sample], strict=True))
                    logits.append(model.teacher.heads["scfs"](found).detach())
                    q = ((logits[-1] - center) / tau).softmax(0)
                    pair.append(-(q * (model.student.heads["scfs"](patch) / 0.1).log_softmax(0)).sum())
            terms.append(torch.stack(pair).mean())
    return torch.stack(terms).mean(), torch.stack(logits).mean(0)


@pytest.mark.parametrize("views", [
    {}, {"local_crops": 0}, {"global_crops": 3, "local_crops": 1}, {"global_crops": 1},
])  # fmt: skip
def test_loss_gradients_and_center_are_the_reference_s(tiny: dict, views: dict) -> None:
    model = build(tiny, views, teacher_temperature=0.06)
    sample = views_of(model)
    loss = loss_of(model, sample)
    expected, mean = reference_loss(model, sample)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, expected))
    assert all(g is not None for g in ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    before = model.objectives["scfs"].center.value.clone()
    model.objectives["scfs"].end_step(Collectives())
    torch.testing.assert_close(model.objectives["scfs"].center.value, 0.9 * before + 0.1 * mean)


def test_in_an_identical_view_a_cold_search_finds_the_patch_itself() -> None:
    torch.manual_seed(0)
    patches = torch.randn(1, 4, 9, 16, dtype=torch.float64)
    found, weights = search(patches, patches, 1e-4)
    torch.testing.assert_close(found[0], patches)
    torch.testing.assert_close(weights[0, 0], torch.eye(9, dtype=torch.float64).expand(4, -1, -1))


def test_a_hot_search_finds_the_mean() -> None:
    torch.manual_seed(0)
    places = torch.randn(2, 4, 9, 16)
    found, weights = search(torch.randn(3, 4, 5, 16), places, 1e6)
    torch.testing.assert_close(found, places.mean(2)[:, None, :, None].expand_as(found))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, 5))


def test_the_order_of_patches_does_not_matter() -> None:
    torch.manual_seed(0)
    query, places = torch.randn(1, 2, 5, 8).double(), torch.randn(1, 2, 7, 8).double()
    found, weights = search(query, places, 0.07)
    queries, there = torch.randperm(5), torch.randperm(7)
    again, permuted = search(query[:, :, queries], places[:, :, there], 0.07)
    torch.testing.assert_close(again, found[:, :, :, queries])
    torch.testing.assert_close(permuted, weights[:, :, :, queries][..., there])


def test_only_directions_are_compared() -> None:
    torch.manual_seed(0)
    query, places = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    _, weights = search(query, places, 0.07)
    _, scaled = search(3 * query, places * torch.rand(1, 2, 7, 1).add(0.5), 0.07)
    torch.testing.assert_close(scaled, weights)
    assert (
        weights.argmax(-1) == (F.normalize(query, dim=-1) @ F.normalize(places, dim=-1)[:, None].mT).argmax(-1)
    ).all()


def test_half_precision_features_are_compared_in_float() -> None:
    torch.manual_seed(0)
    query, places = torch.randn(1, 2, 5, 64), torch.randn(1, 2, 7, 64)
    found, weights = search(query.bfloat16(), places.bfloat16(), 0.07)
    _, expected = search(query.bfloat16().double(), places.bfloat16().double(), 0.07)
    assert found.dtype == torch.bfloat16 and weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-7)


def test_the_teacher_gets_no_gradient_and_the_search_none_either(tiny: dict) -> None:
    model = build(tiny, {})
    for parameter in model.teacher.parameters():
        parameter.requires_grad_(True)  # nothing but the objective itself may stop the gradient
    sample = views_of(model)
    taught = model.teacher.features(model.teacher.encode(sample, model.teacher_views), "scfs")
    student = model.student.features(model.student.encode(sample, model.student_views), "scfs")
    model.objectives["scfs"](student, taught, sample, CLOCK, Collectives()).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())


def test_a_single_view_is_refused(tiny: dict) -> None:
    with pytest.raises(ValueError, match=r"objectives\.scfs compares crops: set views\.global_crops"):
        build(tiny, {"global_crops": 1, "local_crops": 0})
