"""The four-pass baseline: how the authors' code runs a training step, in plain PyTorch, with a model's own weights.

Written from what that code is known to do (tests/golden/README.md, Q2, Q5, Q17, Q21, Q30 and docs/reference.md), as a
yardstick for `harmony-fast bench step`; tests/bench/test_baseline.py holds its losses, gradients, centers and updated
weights against the engine's, and its operations against those counted in the authors' code. A step is

- four passes, each with a backward pass of its own: discriminative, contrastive, text, generative;
- in them five passes of the student's image tower (masked global crops, local crops, the plain first crop, the visible
  patches of each crop), and teacher passes repeated by each objective that needs them;
- attention written out, with the maps of all blocks stacked; captions of full context length; every token through the
  prototype head, every place through the vocabulary, every patch through the pixel decoder's last layer;
- clipping, freezing and EMA in a loop over parameters; torch's AdamW as it comes.

With bf16 the weights are fp32 and the passes run under autocast, as plain PyTorch users do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.config import RunConfig
from ..engine.errors import UserError
from ..engine.optimizer import Scalars, is_decayed
from ..harmony.heads import ProjectionHead
from ..harmony.image_encoder import ImageEncoder
from ..harmony.model import Branch, Harmony
from ..harmony.objectives.base import Center
from ..harmony.objectives.contrastive import Contrastive, ContrastiveConfig
from ..harmony.objectives.masked_language import MaskedLanguage
from ..harmony.objectives.reconstruction import Reconstruction
from ..harmony.objectives.self_distillation import SelfDistillation
from ..harmony.objectives.text_distillation import TextDistillation
from ..harmony.randomness import split, uniform
from ..harmony.schedules import Clock
from ..harmony.teacher import twins
from ..harmony.views import View, Views
from .baseline_passes import (
    Branches,
    decode_pixels,
    decode_words,
    encode_captions,
    encode_images,
    project,
    project_words,
)

PASSES = {
    "discriminative": ("self_distillation",), "contrastive": ("contrastive",),
    "text": ("masked_language", "text_distillation"), "generative": ("reconstruction",),
}  # fmt: skip
"""The four passes and their objectives, in the order in which they run"""
T = TypeVar("T")
Watch = Callable[[str], AbstractContextManager]
"""A stopwatch: `with watch("teacher"): ...`"""


def unwatched(_: str) -> AbstractContextManager:
    """Takes no time."""
    return nullcontext()


class FourPass:
    """The baseline with a copy of a model's weights. One process, one micro-batch a step."""

    def __init__(self, model: Harmony, config: RunConfig) -> None:
        """Raises UserError for what the authors' code cannot train."""
        _check(config)
        self.config, self.model = config, copy.deepcopy(model).train()
        self.student, self.teacher = self.model.student, self.model.teacher
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        decayed = [p for n, p in named if is_decayed(n, p)]
        others = [p for n, p in named if not is_decayed(n, p)]
        c = config.optimizer
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=c.betas, eps=c.eps)
        self.watch: Watch = unwatched

    def step(self, views: Views, clock: Clock, scalars: Scalars) -> dict[str, Tensor]:
        """One training step; the losses by objective, unweighted and detached."""
        losses = self.gradient(views, clock)
        with self.watch("optimizer"):
            self._update(clock, scalars)
        with self.watch("EMA"), torch.no_grad():
            for teacher, student in twins(self.teacher, self.student):
                teacher.mul_(scalars.ema_momentum).add_(student.detach() * (1 - scalars.ema_momentum))
        return losses

    def gradient(self, views: Views, clock: Clock, passes: Sequence[str] = tuple(PASSES)) -> dict[str, Tensor]:
        """The four forward and backward passes, or some of them; their gradients add up. Returns the losses."""
        run = {"discriminative": self._discriminative, "contrastive": self._contrastive, "text": self._text,
               "generative": self._generative}  # fmt: skip
        found: dict[str, Tensor] = {}
        for name in passes:
            if not any(o in self.model.objectives for o in PASSES[name]):
                continue
            with self._autocast(), self.watch("student forward"):
                losses = run[name](views, clock)
                total = added(self.model.objectives[o].config.weight * loss for o, loss in losses.items())
            with self.watch("backward"):
                total.backward()
            found.update({o: loss.detach() for o, loss in losses.items()})
        return found

    def _autocast(self) -> AbstractContextManager:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.precision)
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, half) if half and device != "meta" else nullcontext()

    def _teach(self, compute: Callable[[], T]) -> T:
        """A teacher's pass."""
        with self.watch("teacher"), torch.no_grad():
            return compute()

    def _discriminative(self, views: Views, clock: Clock) -> dict[str, Tensor]:
        """Class tokens of all crops and masked patches, every token of every crop through the head."""
        name = "self_distillation"
        objective = cast(SelfDistillation, self.model.objectives[name])
        config = objective.config
        student, teacher = head_of(self.student, name), head_of(self.teacher, name)
        crops, mask = views.global_crops.flatten(0, 1), views.block_mask.flatten(0, 1)
        count = len(views.global_crops)
        known, known_patches = self._teach(lambda: project(teacher, encode_images(there(self.teacher.image), crops)[0]))
        learned, patches = project(
            student, self._encode(View.GLOBAL_MASKED, views, crops, mask) if objective.patches
            else self._encode(View.GLOBAL_PLAIN, views, crops),
        )  # fmt: skip
        classes = [*learned.chunk(count)]
        if len(views.local_crops):
            local = self._encode(View.LOCAL, views, views.local_crops.flatten(0, 1))
            classes += project(student, local)[0].chunk(len(views.local_crops))

        tau_s, tau = config.student_temperature, objective.teacher_temperature(clock)
        targets = ((known - objective.class_center.value) / tau).softmax(-1).chunk(count)
        terms = [
            cross_entropy(q, z / tau_s).mean() for a, q in enumerate(targets) for v, z in enumerate(classes) if v != a
        ]
        loss = config.class_weight * added(terms) / len(terms)
        if objective.patch_center is not None and config.patch_weight is not None:
            tau = objective.warmed_up(clock, config.patch_temperature_start, config.patch_temperature)
            q = ((known_patches - objective.patch_center.value) / tau).softmax(-1)
            each = (cross_entropy(q, patches / tau_s) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
            loss = loss + config.patch_weight * each.mean()
            move(objective.patch_center, known_patches.flatten(0, 1).mean(0))
        move(objective.class_center, known.mean(0))
        return {"self_distillation": loss}

    def _contrastive(self, views: Views, clock: Clock) -> dict[str, Tensor]:
        """The first crop and the caption once more, in both branches."""
        objective = cast(Contrastive, self.model.objectives["contrastive"])
        image, text = self._embeddings(self.student, views)
        logits = objective.logit_scale.exp() * image @ text.T
        pairs = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        if (weight := objective.hard_weight(clock)) < 1:
            known = self._teach(lambda: self._embeddings(self.teacher, views))
            similar = known[0] @ known[1].T / objective.config.soft_temperature
            soft = cross_entropy(similar.softmax(1), logits) + cross_entropy(similar.T.softmax(1), logits.T)
            loss = weight * loss + (1 - weight) * soft.mean() / 2
        return {"contrastive": loss}

    def _embeddings(self, branch: Branch, views: Views) -> tuple[Tensor, Tensor]:
        """Unit vectors of images and texts [B, E]."""
        image, text = there(branch.image), there(branch.text)
        if branch is self.student:
            features = self._encode(View.GLOBAL_PLAIN, views, views.global_crops[0])
        else:
            features = encode_images(image, views.global_crops[0])[0]
        tokens = there(text.ln_final)(encode_captions(text, views.tokens))
        rows = torch.arange(len(tokens), device=tokens.device)
        captions = tokens[rows, views.tokens.argmax(-1)] @ there(text.text_projection)
        images = features[:, 0] @ there(image.contrastive_projection)
        return F.normalize(images, dim=-1), F.normalize(captions, dim=-1)

    def _text(self, views: Views, clock: Clock) -> dict[str, Tensor]:
        """Masked words at full context length, and the teacher's text tower once more."""
        masked = views.tokens.masked_fill(views.caption_mask, self.config.model.text.vocabulary)
        features, mask, losses = encode_captions(there(self.student.text), masked), views.caption_mask, {}
        if "masked_language" in self.model.objectives:
            language = cast(MaskedLanguage, self.model.objectives["masked_language"])
            logits = decode_words(language.decoder, features)
            words = views.tokens.masked_fill(~mask, -100)  # what cross_entropy leaves out
            losses["masked_language"] = F.cross_entropy(logits.flatten(0, 1), words.flatten())
        if "text_distillation" in self.model.objectives:
            name = "text_distillation"
            objective = cast(TextDistillation, self.model.objectives[name])
            student, teacher = head_of(self.student, name), head_of(self.teacher, name)
            known = self._teach(lambda: project_words(teacher, encode_captions(there(self.teacher.text), views.tokens)))
            q = ((known - objective.center.value) / objective.teacher_temperature(clock)).softmax(-1)
            scores = project_words(student, features)
            each = cross_entropy(q, scores / objective.config.student_temperature) * mask
            losses["text_distillation"] = (each.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
            move(objective.center, q.flatten(0, 1).mean(0))
        return losses

    def _generative(self, views: Views, clock: Clock) -> dict[str, Tensor]:
        """Each crop by itself; all patches predicted, those removed compared."""
        objective, terms = cast(Reconstruction, self.model.objectives["reconstruction"]), []
        for crop in range(objective.crops):
            images, kept, removed = views.global_crops[crop], views.kept[crop], views.removed[crop]
            visible = self._encode(View.GLOBAL_VISIBLE, views, images, kept=kept, crop=crop)
            prediction = decode_pixels(objective.decoder, visible, kept, removed)
            target = _normalised(images, objective.patch_size)
            gone = torch.zeros(target.shape[:2], dtype=target.dtype, device=target.device).scatter(1, removed, 1.0)
            terms.append((((prediction - target) ** 2).mean(-1) * gone).sum() / gone.sum())
        return {"reconstruction": added(terms)}

    def _encode(
        self, view: View, views: Views, images: Tensor, mask: Tensor | None = None, kept: Tensor | None = None,
        crop: int | None = None,
    ) -> Tensor:  # fmt: skip
        """A pass of the student's image tower over all of a view's crops, or over one."""
        crops = range(len(images) // views.batch_size) if crop is None else [crop]
        tower = there(self.student.image)
        branches = drawn_branches(tower, view, views, crops, images)
        return encode_images(tower, images, mask, kept, branches)[0]

    def _update(self, clock: Clock, scalars: Scalars) -> None:
        """Clip each parameter by itself, forget the gradients of what is frozen, AdamW."""
        c = self.config.optimizer
        if c.clip == "parameter" and c.clip_grad:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None and (not c.clip_only or name.startswith(tuple(c.clip_only))):
                    factor = c.clip_grad / (parameter.grad.norm(2) + 1e-6)
                    if factor < 1:
                        parameter.grad.mul_(factor)
        elif c.clip_grad:
            nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_grad)
        for parameters, epochs in self.model.frozen_parameters():
            for parameter in parameters if clock.epoch < epochs else ():
                parameter.grad = None
        for group, decay in zip(self.optimizer.param_groups, (scalars.weight_decay, 0.0), strict=True):
            group["lr"], group["weight_decay"] = scalars.lr, decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for objective in self.model.objectives.values():
                for parameter, bound in objective.upper_bounds():
                    parameter.clamp_(max=bound)


def drawn_branches(
    tower: ImageEncoder, view: View, views: Views, crops: Sequence[int], like: Tensor
) -> Branches | None:
    """The draws of stochastic depth that the packed pass makes, as factors: what is dropped is computed and multiplied
    with 0. A masked crop of which nothing is masked has the draw of the plain one."""
    rate, depth = tower.config.drop_path, len(tower.blocks)
    if not rate:
        return None
    by_view = dict(zip(View, split(views.drop_keys, len(View)).unbind(-1), strict=True))
    keys = {v: split(k, max(crops) + 1).T[list(crops)].flatten() for v, k in by_view.items()}
    if view is View.GLOBAL_MASKED:
        hidden = torch.zeros(views.block_mask.shape[:2], dtype=torch.bool)
        hidden.view(-1)[views.hidden_crops] = True
        keys[view] = torch.where(hidden[list(crops)].flatten(), keys[view], keys[View.GLOBAL_PLAIN])
    drawn = uniform(keys[view], 2 * depth).unflatten(-1, (depth, 2))
    rates = [rate * i / max(depth - 1, 1) for i in range(depth)]
    factors = [((drawn[:, i] >= r) / (1 - r)).to(like)[..., None, None] for i, r in enumerate(rates)]
    return [(f[:, 0], f[:, 1]) for f in factors]


def there(part: T | None) -> T:
    """A part of a branch, which has what its objectives ask for."""
    assert part is not None
    return part


def head_of(branch: Branch, objective: str) -> ProjectionHead:
    """The head of an objective that distils."""
    return cast(ProjectionHead, branch.heads[objective])


def added(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one term at least."""
    return cast(Tensor, sum(terms))


def cross_entropy(q: Tensor, z: Tensor) -> Tensor:
    """-sum_k q_k log softmax(z)_k over the last dimension."""
    return -(q * z.log_softmax(-1)).sum(-1)


def move(center: Center, mean: Tensor) -> None:
    """Move a center towards what was seen, right after it was used."""
    center.value.mul_(center.momentum).add_(mean.to(center.value.dtype), alpha=1 - center.momentum)


def _normalised(images: Tensor, patch_size: int) -> Tensor:
    """Pixels of each patch in (row, column, channel) order, standardised: [B, 3, S p, S p] -> [B, P, 3 p p]."""
    x = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, 3, S, S, p, p]
    x = x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def _check(config: RunConfig) -> None:
    """Raise UserError for objectives and kinds that the authors' code does not have."""
    ours, theirs = config.objectives.active(), {name for names in PASSES.values() for name in names}
    unknown = sorted(set(ours) - theirs)
    if unknown:
        raise UserError(f"the four-pass baseline has no objective {', '.join(unknown)}; it has {', '.join(theirs)}")
    if "contrastive" in ours and cast(ContrastiveConfig, ours["contrastive"]).kind != "softmax":
        raise UserError("the four-pass baseline has no contrastive kind sigmoid; set it to softmax")
