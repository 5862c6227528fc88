"""Operations of a step's matrix products, and bytes at its peak, counted on the meta device: the same counter for every
rival."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.build import build_model
from ..engine.config import RunConfig
from ..engine.live_bytes import LiveBytes
from ..engine.memory import imagined_samples
from ..harmony.model import Harmony
from ..harmony.objectives import Collectives
from ..harmony.schedules import Clock
from ..harmony.views import Views, assemble, draw_masks
from ..kernels import dispatch
from .baseline import PASSES, FourPass

CLOCK = Clock(15, 10, 100)
"""A step at which soft targets count and nothing is frozen"""


@dataclass(frozen=True)
class Counted:
    """Of one forward and backward pass over a batch."""

    flops: int
    by_pass: dict[str, int]


def imagined_views(config: RunConfig) -> Views:
    """A batch without contents: the first `data.batch_size` samples, captions of `memory.CAPTION_TOKENS` tokens."""
    tokens, v = imagined_samples(config, 1).tokens, config.views
    index, ratio = torch.arange(len(tokens)), v.pixel_mask_ratio
    masks = draw_masks(v, config.model.image.patch_size, tokens, index, config.seed, 0, ratio)
    global_crops, local_crops = (
        torch.empty(count, len(index), 3, side, side, device="meta")
        for count, side in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
    )
    return assemble(global_crops, local_crops, masks).to(torch.device("meta"))


def count_ours(config: RunConfig, views: Views | None = None) -> Counted:
    """Ours, as a GPU would compute it: one packed pass, nothing recomputed. views: default `imagined_views`."""
    views = views or imagined_views(config)
    with _counting(config) as (model, live), live:
        model.losses(views, model.teach(views), CLOCK, Collectives()).loss.backward()
    return Counted(live.flops, {})


def count_baseline(config: RunConfig, views: Views | None = None) -> Counted:
    """The four-pass baseline, and each of its passes. views: default `imagined_views`."""
    views = views or imagined_views(config)
    by_pass: dict[str, int] = {}
    with _counting(config) as (model, live):
        baseline = FourPass(model, config)
        for name in PASSES:
            before = live.flops
            with live:
                baseline.gradient(views, CLOCK, [name])
            by_pass[name] = live.flops - before
    return Counted(live.flops, by_pass)


@contextmanager
def _counting(config: RunConfig) -> Iterator[tuple[Harmony, LiveBytes]]:
    """A model without contents, and a counter that is not active yet."""
    plain = config.model_copy(update={"compile": False})
    with torch.device("meta"):
        model = build_model(plain).train()
    with dispatch.preferring("auto"):
        yield model, LiveBytes("meta")


def baseline_peak(config: RunConfig) -> float:
    """The four passes' peak: what AdamW in fp32 holds, as ours does, and what is alive in the passes."""
    with torch.device("meta"):
        model = build_model(config.model_copy(update={"compile": False})).train()
    passes = FourPass(model, config)
    live = LiveBytes("meta")
    live.watch(passes.model)  # weights are counted by themselves
    with live, _attention_as_on_a_cpu():
        passes.gradient(imagined_views(config), CLOCK)
    own = [*passes.model.parameters(), *passes.model.buffers()]
    moments = 2 * sum(p.nbytes for p in passes.model.parameters() if p.requires_grad)
    return sum(t.nbytes for t in own) + moments + live.peak


@contextmanager
def _attention_as_on_a_cpu() -> Iterator[None]:
    """PyTorch's attention, which text towers call, keeps no maps on a CPU; on the meta device it would be composed."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]

    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
