"""Micro-batches, split passes and kept graphs change nothing: losses and gradients in float64, and operations."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch
from harmony_fast.engine.accumulate import accumulate
from harmony_fast.harmony.model import Harmony, MethodConfig
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Masks, Views, assemble, draw_masks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
SAMPLES, CLOCK = 8, Clock(5, 4, 10)


class Plain:
    """What runs the model, without DeepSpeed. Losses are scaled, as for fp16."""

    loss_scale = 4.0

    def __init__(self, model: Harmony) -> None:
        self.model, self.last = model, 0

    def forward(self, call: Callable[[Harmony], T]) -> T:
        return call(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        assert not self.last
        self.last += last
        (self.loss_scale * loss).backward()


class Parts:
    """The same samples in any number of micro-batches."""

    def __init__(self, masks: Masks, crops: list[Tensor], count: int) -> None:
        self._masks, self._crops, self._count = masks, crops, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int) -> Views:
        own = slice(k * SAMPLES // self._count, (k + 1) * SAMPLES // self._count)
        words = float(self._masks.caption_mask.sum()) / self._count
        return assemble(*(c[:, own] for c in self._crops), self._masks.micro_batch(own), words)


def step(raw: dict[str, Any], parts: int, split: bool = False, kept: int = 1) -> tuple[dict, dict]:
    """Losses and gradients of a step."""
    torch.manual_seed(0)
    raw = {key: raw[key] for key in ("model", "views", "objectives")}
    raw["model"]["text"]["vocabulary"] = 64
    model = Harmony(MethodConfig.model_validate(raw)).double().train()
    v = model.config.views
    crops = [torch.randn(n, SAMPLES, 3, side, side, dtype=torch.float64)
             for n, side in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))]  # fmt: skip
    tokens = torch.zeros(SAMPLES, 16, dtype=torch.int64)
    tokens[:, 0], tokens[:, 7], tokens[:, 1:7] = 62, 63, torch.randint(1, 62, (SAMPLES, 6))
    masks = draw_masks(v, 8, tokens, torch.arange(SAMPLES), 4, 0, 0.5)
    runner = Plain(model)
    output = accumulate(runner, Parts(masks, crops, parts), CLOCK, Collectives(), split, kept)
    assert runner.last == 1
    gradients = {n: p.grad / runner.loss_scale for n, p in model.named_parameters() if p.grad is not None}
    return {**output.losses, "total": output.loss}, gradients


OBJECTIVES = (
    ["contrastive", "self_distillation", "reconstruction", "masked_language", "text_distillation"],
    ["contrastive"], ["contrastive", "self_distillation"], ["contrastive", "reconstruction"], ["self_distillation"],
)  # fmt: skip


@pytest.mark.parametrize("names", OBJECTIVES, ids="+".join)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_the_same_losses_and_gradients(tiny: dict, names: list[str], drop_path: float) -> None:
    tiny["model"]["image"]["drop_path"] = drop_path
    tiny["objectives"] = {name: tiny["objectives"][name] for name in names}
    expected = step(tiny, 1)
    for parts, split, kept in ((2, False, 1), (4, False, 0), (4, False, 3), (8, False, 99), (4, True, 2), (1, True, 1)):
        found = step(tiny, parts, split, kept)
        assert found[1].keys() == expected[1].keys()
        for name, value in {**expected[0], **expected[1]}.items():
            ours = {**found[0], **found[1]}[name]
            torch.testing.assert_close(ours, value, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "views",
    [
        {"caption_mask_ratio": 0.07},  # fewer masked words than micro-batches
        {"global_crops": 1, "block_ratios": [0.0], "block_ratio_spreads": [0.0]},  # every masked crop is the plain one
        {"global_crops": 1, "local_crops": 3},
    ],
    ids=str,
)
def test_the_same_where_there_is_little(tiny: dict, views: dict[str, Any]) -> None:
    tiny["views"] |= views
    (loss, expected), (found, gradients) = step(tiny, 1), step(tiny, 8)
    for name, value in {**loss, **expected}.items():
        ours = {**found, **gradients}.get(name, torch.zeros(()))  # without a masked patch, patch heads have none
        torch.testing.assert_close(ours, value, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_each_kept_graph_saves_a_pass_over_what_is_compared(tiny: dict) -> None:
    """With all of them a step does what one pass does, and makes the compared crops' patches again."""

    def count(parts: int, kept: int = 1) -> int:
        with FlopCounterMode(display=False) as counter:
            step(tiny, parts, kept=kept)
        return counter.get_total_flops()

    operations = [count(4, kept) for kept in range(5)]
    assert all(more - fewer > 0.005 * more for more, fewer in pairwise(operations))
    assert operations[4] == pytest.approx(count(1), rel=0.03)
