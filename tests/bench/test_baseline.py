"""The four-pass baseline computes what the engine computes, and does the work that the authors' code does."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from drawn import draw_views
from harmony_fast.bench.baseline import PASSES, FourPass
from harmony_fast.bench.counts import count_baseline
from harmony_fast.engine.build import build_model
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.errors import UserError
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Views
from tiny import tiny_config

CLOCK = Clock(2, 4, 3)
AUTHORS_GFLOPS = {"discriminative": 147, "contrastive": 61, "text": 42, "generative": 78}
"""Matrix operations per sample, counted in a run of the authors' code: ViT-S/16, 224 px, 2 + 8 crops, context 77"""


def config(**over: Any) -> RunConfig:
    raw = {**tiny_config(), "reference_compat": True, "zero": {"stage": 0}, **over}
    raw["model"]["text"]["vocabulary"] = 64
    raw["optimizer"] = {"lr": 0.03, "warmup_epochs": 0, "eps": 1e-3, "clip_grad": 0.05}
    return parse_config(raw, "the test")


def views_of(config: RunConfig, dtype: torch.dtype, batch: int = 6) -> Views:
    torch.manual_seed(3)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    for i, row in enumerate(tokens):
        length = 4 + 2 * i
        row[0], row[1 : length - 1], row[length - 1] = 62, torch.randint(1, 60, (length - 2,)), 63
    v = config.views
    crops = torch.randn(2, batch, 3, 32, 32), torch.randn(v.local_crops, batch, 3, 16, 16)
    return draw_views(v, 8, *(c.to(dtype) for c in crops), tokens, torch.arange(batch), 5, 0)


def both(config: RunConfig, dtype: torch.dtype) -> tuple[Any, FourPass]:
    """A model whose branches and centers differ, and the baseline with its weights."""
    torch.manual_seed(0)
    model = build_model(config).to(dtype).train()
    with torch.no_grad():
        for tensor in (*model.teacher.parameters(), *(b for n, b in model.named_buffers() if n.endswith("r.value"))):
            tensor.add_(0.02 * torch.randn_like(tensor))
        model.objectives["reconstruction"].decoder.mask_token.normal_()
        model.student.image.masked_embed.normal_()
    return model, FourPass(model, config)


def assert_near(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        difference = (value - theirs[name]).detach()
        if name.endswith(("attn.qkv.bias", "attn.in_proj_bias")):  # keys' biases have no gradient but rounding's
            difference.view(3, -1)[1] = 0
        assert difference.norm() <= tolerance * value.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_losses_and_gradients_are_the_engines(dtype: torch.dtype, tolerance: float) -> None:
    chosen = config()
    assert chosen.model.image.drop_path > 0
    model, baseline = both(chosen, dtype)
    views = views_of(chosen, dtype)
    assert views.caption_mask.any() and views.block_mask.any()
    output = model.losses(views, model.teach(views), CLOCK, Collectives())
    output.loss.backward()
    assert_near(baseline.gradient(views, CLOCK), output.losses, tolerance)
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, baseline.model)]
    assert_near(*gradients, 10 * tolerance)


def test_two_steps_lead_to_the_same_weights_centers_and_teacher(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config().model_dump_json(by_alias=True))
    worker = [sys.executable, str(Path(__file__).with_name("baseline_worker.py"))]
    run(tmp_path / "config.json", tmp_path / "found.pt", command=worker)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_near(found["ours"], found["theirs"], 1e-4)


def test_the_work_is_that_of_the_authors_code() -> None:
    raw = {
        "data": {"train": "none.beton", "batch_size": 2}, "model": {"image": {"name": "ViT-S/16"}},
        "objectives": {name: {} for names in PASSES.values() for name in names},
    }  # fmt: skip
    found = count_baseline(parse_config(raw, "the test"))
    for name, theirs in AUTHORS_GFLOPS.items():
        assert found.by_pass[name] / 1e9 / 2 == pytest.approx(theirs, rel=0.03), name


def test_what_the_authors_code_has_not_is_refused() -> None:
    raw = tiny_config()
    raw["objectives"]["contrastive"]["kind"] = "sigmoid"
    chosen = parse_config(raw, "the test")
    with pytest.raises(UserError, match="kind sigmoid"):
        FourPass(build_model(chosen), chosen)
