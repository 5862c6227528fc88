"""Who takes part in `harmony-fast bench step`: our engine, the four-pass baseline, open_clip. Each is built with the
same seed, gets the same samples, and takes whole training steps: views, passes, clipping, AdamW, EMA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.accumulate import accumulate
from ..engine.backends import DTYPES, use_backends
from ..engine.build import build_model, count_micro_batches
from ..engine.config import RunConfig
from ..engine.data.batch import RawBatch
from ..engine.data.views import StepViews
from ..engine.distributed import Ranks
from ..engine.ema import ShardedEma
from ..engine.live_bytes import LiveBytes
from ..engine.optimizer import scalars_at
from ..engine.zero import Zero
from ..harmony.objectives.contrastive import ContrastiveConfig
from ..harmony.views import Views
from .baseline import FourPass, Watch, unwatched
from .counts import CLOCK

if TYPE_CHECKING:
    from open_clip.model import CLIP

PARTS = ("data", "teacher", "student forward", "backward", "optimizer", "EMA")
"""What a step is made of; the rest, if any, is Python between them"""
WORDS = (10.3, 4.5)
"""Mean and standard deviation of the words of a CC3M caption (Sharma et al. 2018, table 2)"""
TOKENS_A_WORD = 1.3
"""Of CLIP's tokenizer: 1.29 on the captions of demo/noto.tar"""


class Rival(Protocol):
    """A training step that can be repeated."""

    watch: Watch
    """Told which of PARTS begins"""

    def step(self) -> dict[str, Tensor]:
        """One step; its losses by objective, unweighted."""


def made_samples(config: RunConfig, seed: int = 0) -> RawBatch:
    """A step's samples: noise as crops, random words as captions, whose lengths are drawn as CC3M's are distributed
    (log-normal with the mean and the standard deviation of WORDS)."""
    g, v, text = torch.Generator().manual_seed(seed), config.views, config.model.text
    size = config.data.batch_size
    global_crops, local_crops = (
        torch.randint(0, 256, (size, count, side, side, 3), dtype=torch.uint8, generator=g)
        for count, side in ((v.global_crops, v.global_size), (v.local_crops, v.local_size))
    )
    spread = math.log(1 + (WORDS[1] / WORDS[0]) ** 2)
    words = (math.log(WORDS[0]) - spread / 2 + spread**0.5 * torch.randn(size, generator=g)).exp()
    lengths = (words * TOKENS_A_WORD + 2).round().long().clamp(4, text.context)
    tokens = torch.randint(1, text.vocabulary - 2, (size, text.context), generator=g)
    place = torch.arange(text.context)
    tokens = tokens.masked_fill(place >= lengths[:, None], 0)
    tokens[:, 0] = text.vocabulary - 2
    tokens.scatter_(1, lengths[:, None] - 1, text.vocabulary - 1)
    return RawBatch(global_crops, local_crops, tokens, torch.arange(size))


class Ours:
    """The engine, as `harmony-fast train` runs it."""

    def __init__(self, config: RunConfig, batch: RawBatch, ranks: Ranks) -> None:
        use_backends(config, ranks.device)
        torch.manual_seed(config.seed)
        self.watch: Watch = unwatched
        self._config, self._batch, self._ranks = config, batch, ranks
        self.model = build_model(config).to(ranks.device)
        self._zero = Zero(self.model, config, ranks)
        self._ema = ShardedEma(self._zero, self.model)
        self.model.train()
        watched: dict[str, list[tuple[object, str]]] = {
            "teacher": [(self.model, "teach")],
            "student forward": [(self.model, name) for name in ("losses", "embed", "compare")],
            "backward": [(self._zero, "backward")],
        }
        for part, methods in watched.items():
            for owner, method in methods:
                setattr(owner, method, self._watched(part, getattr(owner, method)))

    def step(self) -> dict[str, Tensor]:
        """As the loop in `engine/train.py`."""
        with self.watch("data"):
            parts = count_micro_batches(self._config, self._ranks)
            views = _Watched(StepViews(self._config, self._batch, CLOCK, self._ranks.device, parts), self)
        scalars = scalars_at(self._config, CLOCK)
        split, kept = self._config.pass_mode == "split", self._config.kept_graphs
        output = accumulate(self._zero, views, CLOCK, self._ranks, split, kept)
        with self.watch("optimizer"):
            self._zero.step(scalars, CLOCK)
        with self.watch("EMA"):
            self._ema.update(scalars.ema_momentum)
            self.model.end_step(self._ranks)
        return output.losses

    def _watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.watch(part):
                return function(*arguments, **options)

        return call


class _Watched:
    """Views of micro-batches whose making is told to a rival's watch."""

    def __init__(self, views: StepViews, rival: Rival) -> None:
        self._views, self._rival = views, rival

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, k: int) -> Views:
        with self._rival.watch("data"):
            return self._views[k]


class Baseline:
    """The four-pass baseline; its views come from the same augmentation, so that only the step differs."""

    def __init__(self, config: RunConfig, batch: RawBatch, ranks: Ranks) -> None:
        device = ranks.device
        use_backends(config, device)
        torch.manual_seed(config.seed)
        self._config, self._batch, self._device = config, batch, device
        self._passes = FourPass(build_model(config.model_copy(update={"compile": False})).to(device), config)

    @property
    def watch(self) -> Watch:
        """Told which of PARTS begins."""
        return self._passes.watch

    @watch.setter
    def watch(self, watch: Watch) -> None:
        self._passes.watch = watch

    def step(self) -> dict[str, Tensor]:
        """Views, then the four passes and the update."""
        with self.watch("data"):
            views = StepViews(self._config, self._batch, CLOCK, self._device)[0]
        return self._passes.step(views, CLOCK, scalars_at(self._config, CLOCK))


class OpenClip:
    """open_clip's model and loss with towers of the same sizes, and torch's AdamW, as its own training has them."""

    def __init__(self, config: RunConfig, batch: RawBatch, ranks: Ranks) -> None:
        from open_clip.loss import ClipLoss

        device = ranks.device
        use_backends(config, device)
        torch.manual_seed(config.seed)
        self.watch: Watch = unwatched
        self._config, self._batch, self._device = config, batch, device
        self.model, self._loss = open_clip_model(config).to(device), ClipLoss()
        named = list(self.model.named_parameters())
        plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        chosen = {id(p) for p in plain}
        c = config.optimizer
        others = [p for _, p in named if id(p) not in chosen]
        groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}, {"params": others}]
        self._optimizer = torch.optim.AdamW(groups, betas=c.betas, eps=c.eps)

    def step(self) -> dict[str, Tensor]:
        """One step."""
        with self.watch("data"):
            views = StepViews(self._config, self._batch, CLOCK, self._device)[0]
        half = DTYPES[self._config.precision]
        mixed = torch.autocast(self._device.type, half) if half != torch.float32 else nullcontext()
        with mixed, self.watch("student forward"):
            loss = self._loss(*self.model(views.global_crops[0], views.tokens)[:3])
        with self.watch("backward"):
            loss.backward()
        with self.watch("optimizer"), torch.no_grad():
            scalars = scalars_at(self._config, CLOCK)
            for group in self._optimizer.param_groups:
                group["lr"] = scalars.lr
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.model.logit_scale.clamp_(0, math.log(100))
        return {"contrastive": loss.detach()}


def open_clip_model(config: RunConfig) -> CLIP:
    """open_clip's CLIP with a configuration's towers."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image, text, views = config.model.image, config.model.text, config.views
    contrastive = cast(ContrastiveConfig, config.objectives.active()["contrastive"])
    return CLIP(
        contrastive.embed_dim,
        CLIPVisionCfg(
            layers=image.depth, width=image.width, head_width=image.width // image.heads, mlp_ratio=image.mlp_ratio,
            patch_size=image.patch_size, image_size=views.global_size,
        ),
        CLIPTextCfg(
            context_length=text.context, vocab_size=text.vocabulary, width=text.width, heads=text.heads,
            layers=text.depth,
        ),
    )  # fmt: skip


def count_open_clip(config: RunConfig) -> int:
    """Operations of one forward and backward pass over a batch, counted on the meta device."""
    with torch.device("meta"):
        model = open_clip_model(config)
        size, v = config.data.batch_size, config.views
        images = torch.empty(size, 3, v.global_size, v.global_size)
        tokens = torch.empty(size, config.model.text.context, dtype=torch.int64)
    with LiveBytes("meta") as live:
        image, text, _ = model(images, tokens)[:3]
        (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).sum().backward()
    return live.flops
