"""Tokens that nobody reads end before the last block's second half: the same numbers for the others, less work."""

import pytest
import torch
from drawn import draw_views
from harmony_fast.harmony import model as model_module
from harmony_fast.harmony.model import Harmony, MethodConfig
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Reads, View, Views
from torch.utils.flop_counter import FlopCounterMode

READS = {View.GLOBAL_PLAIN: Reads.CLASS, View.GLOBAL_MASKED: Reads.MASKED, View.LOCAL: Reads.CLASS}


def build(tiny: dict, drop_path: float) -> Harmony:
    tiny["model"]["image"]["drop_path"] = drop_path
    torch.manual_seed(0)
    return Harmony(MethodConfig.model_validate({k: tiny[k] for k in ("model", "views", "objectives")})).double().train()


def views_of(model: Harmony, batch: int = 5) -> Views:
    torch.manual_seed(1)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    tokens[:, 0], tokens[:, 7], tokens[:, 1:7] = 49406, 49407, torch.randint(1, 49406, (batch, 6))
    sizes = (2, 32), (model.config.views.local_crops, 16)
    crops = (torch.randn(count, batch, 3, side, side, dtype=torch.float64) for count, side in sizes)
    return draw_views(model.config.views, 8, *crops, tokens, torch.arange(batch), 4, 0)


def losses(model: Harmony, views: Views) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """Losses, gradients, operations."""
    with FlopCounterMode(display=False) as counter:
        output = model.losses(views, model.teach(views), Clock(5, 4, 10), Collectives())
        output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.losses, found, counter.get_total_flops()


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_what_is_read_is_the_same_and_the_rest_is_0(tiny: dict, drop_path: float) -> None:
    model = build(tiny, drop_path)
    views = views_of(model)
    whole, short = (model.student.encode(views, model.student_views, reads)[0] for reads in (None, READS))
    assert views.block_mask.any() and set(whole) == set(short) == {*READS, View.GLOBAL_VISIBLE}
    for view, features in whole.items():
        read = torch.zeros(features.shape[:3], dtype=torch.bool)
        read[:, :, 0] = True
        if view is View.GLOBAL_MASKED:
            read[:, :, 1:] = views.block_mask
        if view is View.GLOBAL_VISIBLE:
            read[:] = True
        torch.testing.assert_close(short[view][read], features[read], rtol=1e-11, atol=1e-12)
        assert not short[view][~read].any()


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_losses_and_gradients_stay_and_work_goes(tiny: dict, drop_path: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny, drop_path)
    views = views_of(model)
    short, gradients, less = losses(model, views)
    monkeypatch.setattr(model_module, "most_read", lambda objectives: {})
    whole, expected, more = losses(model, views)
    assert less < more
    torch.testing.assert_close(short, whole, rtol=1e-11, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11, msg=name)


def test_somebody_who_reads_everything_gets_it(tiny: dict) -> None:
    """scfs reads every patch of the plain crops, which contrast alone would not."""
    tiny["objectives"] = {name: {"prototypes": 64, "hidden": 32, "bottleneck": 16} for name in ("scfs",)}
    tiny["objectives"]["contrastive"] = {"embed_dim": 16}
    model = build(tiny, 0.0)
    views = views_of(model)
    taught, _ = model.teach(views)
    whole, _ = model.teacher.encode(views, model.teacher_views)
    torch.testing.assert_close(taught[View.GLOBAL_PLAIN], whole[View.GLOBAL_PLAIN])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_a_crop_of_which_nothing_is_masked_goes_through_once(
    tiny: dict, drop_path: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny, drop_path)
    image, views, packed = model.student.image, views_of(model, 12), []
    own = views.block_mask[0].any(1)
    assert image is not None and 0 < own.sum() < len(own)
    encode = image.encode
    monkeypatch.setattr(image, "encode", lambda x, *rest: (packed.append(x.shape), encode(x, *rest))[1])
    request, (crops, batch, patches) = {View.GLOBAL_PLAIN: 1, View.GLOBAL_MASKED: 2}, views.block_mask.shape
    for reads in (READS, {}, {View.GLOBAL_PLAIN: Reads.ALL, View.GLOBAL_MASKED: Reads.MASKED}):
        together = image(views, request, reads)
        wanted = sum(r is Reads.ALL for r in reads.values())  # of the plain view, what the masked one has not
        assert packed.pop() == ((crops * batch + (batch if wanted else int(own.sum()))) * (1 + patches), 32)
        for view, features in together.items():
            alone = image(views, {view: request[view]}, reads)[view]
            torch.testing.assert_close(features, alone, rtol=1e-11, atol=1e-12)
            packed.pop()


def test_patches_under_masks_may_be_read_of_plain_crops_too(tiny: dict) -> None:
    """An objective of one's own may compare them: then plain crops have sequences of their own."""
    model = build(tiny, 0.0)
    image, views, request = model.student.image, views_of(model, 12), {View.GLOBAL_PLAIN: 2, View.GLOBAL_MASKED: 2}
    assert image is not None
    reads = dict.fromkeys(request, Reads.MASKED)
    for view, features in image(views, request, reads).items():
        alone = image(views, {view: 2}, reads)[view]
        torch.testing.assert_close(features, alone, rtol=1e-11, atol=1e-12)
