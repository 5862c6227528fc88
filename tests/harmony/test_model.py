"""The model as a whole: what is built, what is learned, what does not depend on the batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn import draw_views
from harmony_fast.harmony.heads import sincos_positions
from harmony_fast.harmony.model import Harmony, MethodConfig, StepOutput
from harmony_fast.harmony.objectives import REGISTRY, Collectives
from harmony_fast.harmony.objectives.base import Center, Distillation, feature_std
from harmony_fast.harmony.objectives.contrastive import accuracy
from harmony_fast.harmony.schedules import Clock, ramp_cosine, ramp_linear, warmup_cosine
from harmony_fast.harmony.teacher import twins
from harmony_fast.harmony.views import Views

CLOCK = Clock(5, 4, 10)


def build(tiny: dict, **objectives: dict | None) -> Harmony:
    chosen = {**tiny["objectives"], **objectives}
    torch.manual_seed(0)
    return Harmony(MethodConfig.model_validate({**{k: tiny[k] for k in ("model", "views")}, "objectives": chosen}))


def views_of(model: Harmony, batch: int = 6) -> Views:
    torch.manual_seed(1)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    for i, row in enumerate(tokens):
        length = 4 + i % 12
        row[0], row[length - 1] = 49406, 49407
        row[1 : length - 1] = torch.randint(1, 49406, (length - 2,))
    v = model.config.views
    crops = torch.randn(2, batch, 3, 32, 32), torch.randn(v.local_crops, batch, 3, 16, 16)
    return draw_views(v, 8, *crops, tokens, torch.arange(batch), 0, 0)


def losses(model: Harmony) -> StepOutput:
    views = views_of(model)
    return model.losses(views, model.teach(views), CLOCK, Collectives())


@pytest.mark.parametrize(
    ("views", "objective", "message"),
    [
        ({"global_crops": 1, "local_crops": 0}, {}, r"self_distillation compares crops: set views\.global_crops"),
        ({"pixel_mask_ratio": 0}, {}, r"views\.pixel_mask_ratio must be above 0"),
        ({"pixel_mask_ratio_end": 0}, {}, r"views\.pixel_mask_ratio must be above 0"),
        ({}, {"crops": 3}, r"objectives\.reconstruction\.crops 3: views\.global_crops is 2"),
    ],
)
def test_views_that_do_not_serve_an_objective_are_refused(
    tiny: dict, views: dict, objective: dict, message: str
) -> None:
    tiny["views"] |= views
    tiny["objectives"]["reconstruction"] |= objective
    with pytest.raises(ValueError, match=message):
        build(tiny)


def test_passes_share_views_that_are_there(tiny: dict) -> None:
    """Without local crops, searching in plain crops and distilling masked ones have nothing in common."""
    tiny["views"]["local_crops"] = 0
    scfs = {"prototypes": 64, "hidden": 32, "bottleneck": 16}
    others = {name: None for name in REGISTRY if name != "self_distillation"}
    assert sorted(build(tiny, **{**others, "scfs": scfs}).passes()) == [["scfs"], ["self_distillation"]]


def test_weights_of_patches_are_not_rounded(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision: bf16 has three digits, and a reciprocal of many patches is 0 in fp16."""
    model, given = build(tiny).bfloat16(), {}
    views, ask = views_of(model), Distillation.cross_entropy

    def spy(self: Distillation, *arguments: Any) -> torch.Tensor:
        *_, given[type(self).__name__] = arguments
        return ask(self, *arguments)

    monkeypatch.setattr(Distillation, "cross_entropy", spy)
    model.losses(views, model.teach(views), CLOCK, Collectives())
    patches, words = views.block_mask.sum(-1), views.caption_mask.sum(-1)
    for name, count in (("SelfDistillation", (patches > 0).sum() / patches.numel()),
                        ("TextDistillation", (words > 0).sum() / len(words))):  # fmt: skip
        torch.testing.assert_close(given[name].sum(), count, rtol=1e-6, atol=0)


def test_every_trainable_parameter_gets_a_gradient(tiny: dict) -> None:
    model = build(tiny).train()
    losses(model).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_one_objective_alone_trains_and_builds_no_more_than_it_needs(tiny: dict, name: str) -> None:
    chosen = {other: None for other in REGISTRY}
    chosen[name] = tiny["objectives"].get(name, {"prototypes": 64, "hidden": 32, "bottleneck": 16})
    model = build(tiny, **chosen)
    losses(model).loss.backward()
    assert list(model.objectives) == [name]
    assert (model.student.text is None) == (name in ("self_distillation", "scfs", "reconstruction"))
    assert (model.student.image is None) == (name in ("masked_language", "text_distillation"))
    has_teacher = any(True for _ in model.teacher.parameters())
    assert has_teacher == (name in ("contrastive", "self_distillation", "scfs", "text_distillation"))
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_hard_labels_alone_need_no_teacher(tiny: dict) -> None:
    others = {other: None for other in REGISTRY if other != "contrastive"}
    model = build(tiny, **{**others, "contrastive": {"embed_dim": 16, "hard_weight_end": 1.0}})
    assert list(model.teacher.parameters()) == []


def test_teacher_starts_as_the_student(tiny: dict) -> None:
    model = build(tiny)
    pairs = twins(model.teacher, model.student)
    assert len(pairs) > 50
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


def test_loss_is_the_weighted_sum(tiny: dict) -> None:
    model = build(tiny, reconstruction={**tiny["objectives"]["reconstruction"], "weight": 3.0})
    out = losses(model)
    weights = {name: o.config.weight for name, o in model.objectives.items()}
    assert weights["reconstruction"] == 3.0
    torch.testing.assert_close(out.loss, sum(weights[n] * v for n, v in out.losses.items()))


def test_captions_without_masked_words_give_no_text_loss(tiny: dict) -> None:
    tiny["views"]["caption_mask_ratio"] = 0.0
    tiny["views"]["block_ratios"], tiny["views"]["block_ratio_spreads"] = [0.0], [0.0]
    model = build(tiny)
    out = losses(model)
    out.loss.backward()
    assert out.losses["masked_language"] == 0 and out.losses["text_distillation"] == 0
    assert out.metrics["self_distillation/patch"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.end_step(Collectives())
    assert all(m.value.isfinite().all() for m in model.modules() if isinstance(m, Center))


def calls(model: Harmony) -> list[str]:
    """The modules with parameters of their own, in the order in which a step's passes call them."""
    called: list[str] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
            module.register_full_backward_pre_hook(lambda *_, name=name: called.append(f"{name} backward"))
    losses(model.train()).loss.backward()
    return called


@pytest.mark.filterwarnings("ignore:For backward hooks")  # of a module that returns a dict, and has inner ones
def test_modules_are_called_in_the_same_order_whatever_the_batch_holds(tiny: dict) -> None:
    """Ranks whose batches differ would otherwise wait for each other where parameters are sharded."""
    found = []
    for captions, blocks in ((0.5, 0.5), (0.0, 0.0)):
        tiny["views"]["caption_mask_ratio"] = captions
        tiny["views"]["block_ratios"], tiny["views"]["block_ratio_spreads"] = [blocks], [0.0]
        found.append(calls(build(tiny)))
        model = build(tiny)
        views = views_of(model)
        assert views.block_mask.any() == views.caption_mask.any() == bool(blocks)
    assert found[0] == found[1] and len(found[0]) > 100


def test_by_default_the_pixel_decoder_can_tell_positions_apart(tiny: dict) -> None:
    """With zeros, as the authors' code leaves the table, all removed patches of an image look the same."""
    for positions, differ in (("sincos", True), ("zeros", False)):
        model = build(tiny, reconstruction={**tiny["objectives"]["reconstruction"], "position_embedding": positions})
        views = views_of(model)
        images, captions = model.student.encode(views, model.student_views)
        features = model.student.features((images, captions), "reconstruction")
        prediction = model.objectives["reconstruction"].predict(features, views)
        spread = (prediction - prediction[:, :, :1]).abs().max()
        assert (spread > 1e-3) == differ


def test_positions_of_the_pixel_decoder_are_maes() -> None:
    table = sincos_positions(9, 8)
    assert table.shape == (1, 10, 8) and table.dtype == torch.float32 and not table[0, 0].any()
    for patch in range(9):
        expected = [wave(place * rate) for place in (patch % 3, patch // 3)
                    for wave in (math.sin, math.cos) for rate in (1, 0.01)]  # fmt: skip
        torch.testing.assert_close(table[0, 1 + patch], torch.tensor(expected))
    with pytest.raises(ValueError, match="width 6 is not divisible by 4"):
        sincos_positions(9, 6)


def test_prototypes_alone_are_frozen_and_only_where_asked_for(tiny: dict) -> None:
    model = build(tiny)
    ((parameters, epochs),) = model.frozen_parameters()
    assert parameters == [model.student.heads["self_distillation"].last_layer.weight_v] and epochs == 1
    tiny["objectives"]["self_distillation"] |= {"freeze_last_layer": 2, "patch_prototypes": 8}
    ((parameters, epochs),) = build(tiny).frozen_parameters()
    assert [len(p) for p in parameters] == [64, 8] and epochs == 2


def test_logged_numbers_are_what_they_say(tiny: dict) -> None:
    """Accuracy among texts of other ranks too; the entropy of the teacher; the spread of vectors."""
    texts = torch.eye(6)
    assert accuracy(texts[[2, 3, 0, 5]], texts, 2) == 0.75
    vectors = F.normalize(torch.randn(2, 5, 7), dim=-1)
    expected = vectors.flatten(0, 1).var(0, correction=0).sum().sqrt()
    torch.testing.assert_close(feature_std(vectors), {"feature_std": expected})
    assert feature_std(vectors[:1, :3]) == {} and set(feature_std(vectors[:1, :4])) == {"feature_std"}
    objective, layer = build(tiny).objectives["self_distillation"], torch.nn.Linear(7, 64, bias=False)
    objective.class_center.value.normal_()
    scores = (vectors @ layer.weight.T - objective.class_center.value) / 0.2
    entropy = torch.distributions.Categorical(logits=scores).entropy().mean()
    torch.testing.assert_close(objective.entropy(vectors, layer.weight, 0.2), entropy.detach())


def test_accuracy_of_masked_words(tiny: dict) -> None:
    tiny["views"]["caption_mask_ratio"] = 0.5
    model = build(tiny)
    words = views_of(model).tokens.flatten()[views_of(model).caption_index]
    head = model.objectives["masked_language"].decoder.head
    with torch.no_grad():  # every guess is the first masked word
        head.weight.zero_()
        head.bias.zero_()[words[0]] = 1
    share = (words == words[0]).float().mean()
    assert len(words) > 4 and losses(model).metrics["masked_language/accuracy"] == share


def test_center_moves_by_the_mean_of_all_that_was_taken_in() -> None:
    center, outputs = Center(4, 0.9), torch.randn(10, 4)
    for part in outputs.split([3, 7]):
        center.add(part.sum(0), len(part))
    center.move(Collectives())
    torch.testing.assert_close(center.value, 0.1 * outputs.mean(0))
    before = center.value.clone()
    center.move(Collectives())
    assert torch.equal(center.value, before)


def test_schedules() -> None:
    assert warmup_cosine(0, 1.0, 0.1, 100, 10) == 0
    assert warmup_cosine(9, 1.0, 0.1, 100, 10) == 1.0
    assert warmup_cosine(10, 1.0, 0.1, 100, 10) == 1.0
    assert warmup_cosine(55, 1.0, 0.1, 100, 10) == pytest.approx(0.55)
    assert 0.1 < warmup_cosine(99, 1.0, 0.1, 100, 10) < 0.101
    assert warmup_cosine(500, 1.0, 0.1, 100, 10) == pytest.approx(0.1)
    assert ramp_cosine(0, 1.0, 0.2, 10) == 1.0 and ramp_cosine(10, 1.0, 0.2, 10) == 0.2
    assert ramp_cosine(5, 1.0, 0.2, 10) == pytest.approx(0.6)
    by_epoch = [ramp_linear(Clock(step, 10, 20), 0.04, 0.07, 4, by_epoch=True) for step in (0, 9, 10, 39, 40)]
    assert by_epoch == pytest.approx([0.04, 0.04, 0.05, 0.07, 0.07])
    assert ramp_linear(Clock(20, 10, 20), 0.04, 0.08, 4) == pytest.approx(0.06)
    assert ramp_linear(Clock(3, 10, 20), 0.04, 0.08, 0) == 0.08
