"""How much memory a rank of a run needs, part by part, before it starts, on any machine.

What a rank holds for the whole run follows the formulas of `scaling.held_bytes`. What a step needs on top is found by
going through it on the meta device: the real model, views, passes and losses, on tensors that have shapes but no
contents. So the prediction follows every change of the model, of checkpointing and of the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..harmony.image_encoder import Block
from ..harmony.model import Harmony
from ..harmony.objectives import Collectives
from ..harmony.schedules import Clock
from ..harmony.text_encoder import TextBlock
from ..harmony.views import Masks, Views, ViewsConfig, assemble, draw_block_masks, draw_masks
from ..kernels import dispatch
from .accumulate import accumulate
from .backends import DTYPES, settle_precision
from .build import build_model, count_micro_batches
from .config import RunConfig
from .data.batch import RawBatch
from .half_on_cpu import products_for
from .live_bytes import GRADIENTS, LiveBytes
from .optimizer import parameter_groups
from .scaling import Sizes, held_bytes
from .zero import deepspeed_config

T = TypeVar("T")
Device = Literal["cuda", "cpu"]
VIEWS, TAUGHT, CUDA, ALLOCATOR = "views", "teacher features", "CUDA", "allocator"
OPTIMIZER_STEP, GATHERED = "optimizer step", "gathered parameters"
BLOCKS = (Block, TextBlock)
"""Of these stage 3 has the parameters of all layers gathered at times in the backward pass"""
CAPTION_TOKENS = 16
"""Tokens of a caption that the prediction assumes: CC3M's have 10.3 words on average (Sharma et al. 2018)"""
CONTEXT = 600 * 2**20
"""Bytes that CUDA, cuBLAS and the kernels' code take of a GPU; not measured yet"""
SLACK = 0.04
"""Share of the step's own bytes that the caching allocator cannot use; not measured yet"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment."""

    held: dict[str, float]
    """For the whole run, by part"""
    step: dict[str, float]
    """On top of it while a step is computed, by part"""
    host: dict[str, float]
    """Offloaded to the host's memory, by part"""

    @property
    def parts(self) -> dict[str, float]:
        """What lies on the device."""
        return {**self.held, **self.step}

    @property
    def total(self) -> float:
        """Of the device."""
        return sum(self.parts.values())

    @property
    def tensors(self) -> float:
        """Of the device's, what tensors take: `torch.cuda.max_memory_allocated`."""
        return self.total - self.held.get(CUDA, 0.0) - self.step.get(ALLOCATOR, 0.0)


@dataclass(frozen=True)
class Passes:
    """What the forward and backward passes of a rank's step need, and do."""

    sizes: Sizes
    groups: list[int]
    """Parameters of each of the optimizer's groups, in the order of the step"""
    together: int
    """Parameters of the largest part, a block or a layer outside blocks, that stage 3 gathers while it is used"""
    small: int
    """Parameters of tensors so small that stage 3 has them whole between steps"""
    buffers: int
    """Bytes of the model's buffers"""
    peak: dict[str, float]
    """Bytes by label at the fullest moment"""
    flops: float
    """Of products, recomputation included"""
    written: float
    """Bytes that operators write"""
    calls: int
    """Of operators"""
    backward: int
    """Backward passes"""


def predict(config: RunConfig, ranks: int, device: Device = "cuda") -> Memory:
    """What a rank of `ranks` will need. device: cuda counts what a GPU takes beside the tensors, too."""
    config = settle_precision(config, bf16=device == "cuda")
    return memory_of(config, ranks, go_through(config, ranks, device), device)


def memory_of(config: RunConfig, ranks: int, passes: Passes, device: Device = "cuda") -> Memory:
    """What a rank holds in this configuration, and what passes that were gone through before take on top."""
    stage, element = config.zero.stage, DTYPES[config.precision].itemsize
    held = held_bytes(passes.sizes, stage, ranks, element, 2 if config.optimizer.states == "8bit" else 8)
    del held["gradients"]  # which grow while activations go: they are in the step's part
    if element == 4 and not (config.zero.offload_optimizer and device == "cuda"):
        held["ema"] = 0.0  # the compute copy is the average itself
    host = {name: held.pop(name) for name in ("masters", "moments", "ema") if config.zero.offload_optimizer}
    if config.zero.offload_parameters:
        host["parameters"] = held.pop("parameters")
    held["buffers"] = passes.buffers
    step = max(_moments(config, ranks, passes), key=lambda moment: sum(moment.values()))
    if device == "cuda":
        step[ALLOCATOR] = SLACK * sum(step.values())
        held[CUDA] = CONTEXT
    return Memory(held, step, host)


def _moments(config: RunConfig, ranks: int, passes: Passes) -> Iterator[dict[str, float]]:
    """Bytes by part at the moments of a step that may be its fullest, on top of what is held for the whole run."""
    stage, element = config.zero.stage, DTYPES[config.precision].itemsize
    gradients = element * passes.sizes.trained / (ranks if stage >= 2 else 1)
    zero = deepspeed_config(config, ranks)["zero_optimization"]
    during = {**passes.peak, "buckets": buckets(config, ranks, element)}
    if stage >= 2:
        # There is a place for all of them from the start; with several passes in stage 2 also the sum of the earlier
        # ones, which offload has in host memory, and the last one's place, which goes as this one's is filled.
        again = stage == 2 and passes.backward > 1 and not config.zero.offload_optimizer
        during[GRADIENTS] = gradients * (3 if again else 1)
    if stage == 3:
        during[GATHERED] = element * passes.together
        first = min(sum(passes.sizes), passes.small + zero["stage3_prefetch_bucket_size"])
        yield {GRADIENTS: gradients, GATHERED: element * first}  # as a step begins
    yield during
    if stage == 0 and ranks > 1:  # all-reduced after the backward pass; a bucket ends with the tensor that fills it
        yield {GRADIENTS: gradients, "buckets": min(gradients, 2 * element * zero["reduce_bucket_size"])}
    yield {OPTIMIZER_STEP: stepping(config, passes.groups, ranks)}


def buckets(config: RunConfig, ranks: int, element: int) -> float:
    """Bytes of the buffers through which gradients are reduced while the backward pass goes on; none in stage 0.

    In stages 1 and 2 there are two, if one is sent while the other is filled.
    """
    if config.zero.stage == 0:
        return 0.0
    zero = deepspeed_config(config, ranks)["zero_optimization"]
    return element * zero["reduce_bucket_size"] * (2 if zero["overlap_comm"] and config.zero.stage < 3 else 1)


def stepping(config: RunConfig, groups: list[int], ranks: int) -> float:
    """Bytes that the optimizer's step needs at its fullest moment, gradients included; none with offload.

    In stages 1 to 3 DeepSpeed makes a flat copy of a group's gradients and an fp32 one of that, then frees the group's
    own; in stage 0 fp32 copies of all.
    """
    element, stage = DTYPES[config.precision].itemsize, config.zero.stage
    in_float = 4 if element < 4 else 0
    if config.zero.offload_optimizer:
        return 0.0
    if stage == 0:
        return (element + in_float) * sum(groups)
    held = ranks if stage == 1 else 1  # parts of the groups that come later; in stage 1 those of all ranks
    return max(
        (element * held * sum(groups[i + 1 :]) + (2 * element + in_float) * groups[i]) / ranks
        for i in range(len(groups))
    )


def go_through(config: RunConfig, ranks: int, device: Device = "cuda") -> Passes:
    """The passes of one step on the meta device. device: whose kernels it would use."""
    imagined = _Ranks(ranks)
    with torch.device("meta"):
        model = build_model(config.model_copy(update={"compile": False}))
    sizes = Sizes(
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.teacher.parameters()),
    )
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model)]
    together = max(sum(p.numel() for p in m.parameters(recurse=isinstance(m, BLOCKS))) for m in model.modules())
    model = model.to(DTYPES[config.precision]).train()
    clock = Clock(0, 10, config.epochs)
    threshold = deepspeed_config(config, ranks)["zero_optimization"]["stage3_param_persistence_threshold"]
    small = sum(p.numel() for p in model.parameters() if p.numel() <= threshold)
    (samples, masks), parts = _drawn(config, ranks), count_micro_batches(config, imagined)
    live = LiveBytes("meta", 0.0 if config.zero.stage >= 2 else 1.0)
    _name_parts(live, model)
    # What operators keep differs between backends.
    products = products_for(torch.device(device), DTYPES[config.precision])
    with dispatch.preferring("torch" if device == "cpu" else config.kernels.model_dump()), live, products:
        zero = Imagined(model, live)
        views = _ImaginedViews(config, samples, masks, parts, live)
        accumulate(zero, views, clock, imagined, config.pass_mode == "split", config.kept_graphs)
    buffers = sum(b.nbytes for b in model.buffers())
    peak: dict[str, float] = {label: size for label, size in live.at_peak.items() if size}
    raw = samples.global_crops.nbytes + samples.local_crops.nbytes
    if device == "cuda":
        # Made on a stream of their own, whose memory is no one else's, from raw crops and with a copy for the colour
        # jitter; and the next ones are made ahead.
        peak[VIEWS] = (2 * live.most[VIEWS] / min(parts, 2) + raw / parts) * min(parts, 2)
    else:
        peak[VIEWS] += raw
    return Passes(sizes, groups, together, small, buffers, peak, live.flops, live.written, live.calls, zero.passes)


def _name_parts(live: LiveBytes, model: Harmony) -> None:
    """Which module's tensors go under which label."""
    live.watch(model)
    for tower in ("image", "text"):
        for branch, label in ((model.student, f"{tower} activations"), (model.teacher, TAUGHT)):
            if getattr(branch, tower) is not None:
                live.label_calls(getattr(branch, tower), label)
    for objective in model.objectives.values():
        live.label_calls(objective, "heads and losses")


def imagined_samples(config: RunConfig, ranks: int) -> RawBatch:
    """A rank's samples without contents; captions of `CAPTION_TOKENS` tokens.

    They are such that every plain crop needs a sequence of its own, where half of them do without on average: what has
    room for these has room for any.
    """
    return _drawn(config, ranks)[0]


def _drawn(config: RunConfig, ranks: int) -> tuple[RawBatch, Masks]:
    """The samples, and their masks."""
    own, views, text = config.data.batch_size // ranks, config.views.model_dump_json(by_alias=True), config.model.text
    return _draw(views, config.model.image.patch_size, text.context, text.vocabulary, own, config.seed)


@lru_cache(maxsize=4)  # the plans of a search differ in other things
def _draw(
    views: str, patch_size: int, context: int, vocabulary: int, own: int, seed: int
) -> tuple[RawBatch, Masks]:  # fmt: skip
    v = ViewsConfig.model_validate_json(views)
    tokens = torch.zeros(own, context, dtype=torch.int64)
    tokens[:, : min(CAPTION_TOKENS, context)] = 1
    tokens[:, min(CAPTION_TOKENS, context) - 1] = vocabulary - 1
    global_crops, local_crops = (
        torch.empty(own, count, side, side, 3, dtype=torch.uint8, device="meta")
        for count, side in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
    )
    index = torch.arange(3 * own + 64)
    hidden = draw_block_masks(v, patch_size, index, seed, 0)[0].any(1)
    index = torch.cat([index[hidden], index[~hidden]])[:own]
    masks = draw_masks(v, patch_size, tokens, index, seed, 0, v.pixel_mask_ratio)
    return RawBatch(global_crops, local_crops, tokens, index), masks


class _Ranks(Collectives):
    """Ranks that are not there: gathering repeats what this one has."""

    def __init__(self, world_size: int) -> None:
        self.rank, self.world_size = 0, world_size

    def gather(self, x: Tensor) -> Tensor:
        return x if self.world_size == 1 else torch.cat([x] * self.world_size)


class Imagined:
    """In the place of `Zero`: the passes without DeepSpeed."""

    loss_scale = 1.0

    def __init__(self, model: Harmony, live: LiveBytes) -> None:
        self.model, self._live, self.passes = model, live, 0

    def forward(self, call: Callable[[Harmony], T]) -> T:
        """As `Zero.forward`."""
        return call(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """As `Zero.backward`; counts them."""
        self.passes += 1
        with self._live.label("backward pass"):
            loss.backward()


class _ImaginedViews:
    """In the place of `StepViews`: the same shapes, nothing augmented."""

    def __init__(self, config: RunConfig, samples: RawBatch, masks: Masks, parts: int, live: LiveBytes) -> None:
        self._config, self._masks, self._parts, self._live = config, masks, parts, live
        self._size = len(samples.index) // parts

    def __len__(self) -> int:
        return self._parts

    def __getitem__(self, k: int) -> Views:
        v = self._config.views
        with self._live.label(VIEWS):
            global_crops, local_crops = (
                torch.empty(count, self._size, 3, side, side, device="meta")
                for count, side in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
            )
            masks = self._masks.micro_batch(slice(k * self._size, (k + 1) * self._size))
            return assemble(global_crops, local_crops, masks).to(torch.device("meta"))
