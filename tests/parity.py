"""Check the production engine against the authors' numbers: `python tests/parity.py [--mode split] FILE [FILE ...]`.

FILE.safetensors holds a training step of the authors' implementation, FILE.json its schedules (see
tests/golden/README.md for every quantity). The model, its configuration with `reference_compat: true`, the passes, the
optimizer step and the EMA are those of `harmony-fast train`, in float64 and in float32 (ZeRO stage 0, whose weights
have the precision that the model has). One line per quantity: name, error, tolerance, ok or FAIL. A quantity of the
file that nothing here checks is a failure. The exit status is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harmony_fast.engine.accumulate import accumulate
from harmony_fast.engine.authors import our_name
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.distributed import Ranks, join
from harmony_fast.engine.ema import ShardedEma
from harmony_fast.engine.optimizer import is_decayed, scalars_at
from harmony_fast.engine.zero import Zero
from harmony_fast.harmony.model import Harmony, StepOutput
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.objectives.base import Center
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import (
    Masks,
    View,
    Views,
    assemble,
    block_masks,
    caption_lengths,
    pixel_ratio,
    split_by_noise,
    words_only,
)
from harmony_fast.kernels import contrastive_loss
from safetensors import safe_open
from torch import Tensor

NOT_CHECKED = {
    "input.": "goes into the model",
    "format": "the name of the format",
    "file": "the name of the file",
    "provenance": "says where the numbers come from",
    "dims": "goes into the configuration",
    "hyper": "goes into the configuration",
    "float32_": "what the authors' code gives in float32; the tolerances are made from it",
}
"""Parts of a file that are no result, with the reason."""

SOFT_ONLY = ("teacher.image.contrastive_projection", "teacher.text.text_projection", "teacher.text.ln_final",
             "_embed_teacher", "clip_soft")  # fmt: skip
"""What is not built, and so not checked, where the hard labels' weight is 1 from beginning to end"""


@dataclass
class Golden:
    """A file of reference numbers."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Golden:
        """All tensors and the JSON header."""
        with safe_open(path, "pt") as f:
            return cls({name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["json"]))  # noqa: SIM118

    @cached_property
    def config(self) -> RunConfig:
        """Our configuration of the file's model; the slips of the authors' code come from `reference_compat`."""
        d, h = self.meta["dims"], self.meta["hyper"]
        head = {"center_momentum": h["center_momentum"], "student_temperature": h["student_temp"],
                "temperature_epochs": h["warmup_teacher_temp_epochs"]}  # fmt: skip
        patch = h["warmup_teacher_patch_temp"], h["teacher_patch_temp"]
        return parse_config({
            "reference_compat": True,
            "epochs": h["epochs"],
            "zero": {"stage": 0},
            "data": {"train": "none.beton", "batch_size": h["batch_per_gpu"] * h.get("world_size", 1)},
            "model": {
                "image": {"width": d["image_width"], "depth": d["image_depth"], "heads": d["image_heads"],
                          "mlp_ratio": d["image_mlp_ratio"], "patch_size": d["patch_size"]},
                "text": {"width": d["text_width"], "depth": d["text_layers"], "heads": d["text_heads"],
                         "context": d["context"], "vocabulary": d["vocab"]},
            },
            "views": {"global_crops": d["n_global"], "global_size": d["image_size"], "local_crops": d["n_local"],
                      "local_size": d["local_size"], **mask_ratio(h)},
            "objectives": {
                "contrastive": {**hard_labels(h), "soft_temperature": h["soft_temp"], "embed_dim": d["joint_dim"]},
                "self_distillation": {
                    **head, "weight": h["disc_weight"], "class_weight": h["lambda1"], "patch_weight": h["lambda2"],
                    "prototypes": d["out_dim"], "patch_prototypes": None if d["shared_head"] else d["patch_out_dim"],
                    "hidden": d["head_hidden"], "bottleneck": d["head_bottleneck"], **temperatures(h),
                    "freeze_last_layer": h["freeze_last_layer"]},
                "reconstruction": {"weight": h["gen_weight"], "width": d["mae_width"], "depth": d["mae_depth"],
                                   "heads": d["mae_heads"]},
                "masked_language": {"weight": h["mlm_weight"], "depth": d["mlm_layers"]},
                "text_distillation": {
                    **head, "weight": h["text_dist_weight"], "prototypes": d["text_out_dim"],
                    "hidden": d["text_head_hidden"], "bottleneck": d["text_head_bottleneck"],
                    "teacher_temperature_start": patch[0], "teacher_temperature": patch[1]},
            },
            "optimizer": {**decay_and_momentum(h), "lr": h["base_lr"], "min_lr": h["min_lr"], "betas": h["betas"],
                          "warmup_epochs": h["warmup_epochs"], "eps": h["adam_eps"], "clip_grad": h["clip_grad"]},
        }, "the file's header")  # fmt: skip

    def views(self, dtype: torch.dtype, ratio: float) -> Views:
        """The file's inputs and masks."""
        t = self.tensors
        kept, removed = split_by_noise(t["input.mae_noise"], ratio)
        words = words_only(t["input.mlm_mask_raw"], caption_lengths(t["input.captions"]))
        keys = torch.zeros(len(words), dtype=torch.int64)
        masks = Masks(t["input.captions"], t["input.ibot_masks"].flatten(2), kept, removed, words, keys)
        return assemble(t["input.global_crops"].to(dtype), t["input.local_crops"].to(dtype), masks)

    def clock(self, when: str) -> Clock:
        """The clock of `step1`, `step2` or `epoch0`."""
        h = self.meta["hyper"]
        return Clock(self.meta[when]["iteration"], h["niter_per_epoch"], h["epochs"])


def hard_labels(h: dict) -> dict:
    """Our keys of the hard-label schedule."""
    return {"hard_weight": h["hard_labels_weight"], "hard_weight_end": h["hard_labels_weight_end"],
            "hard_weight_epochs": h["hard_labels_weight_epochs"]}  # fmt: skip


def temperatures(h: dict) -> dict:
    """Our keys of the image side's temperature schedules."""
    return {"teacher_temperature_start": h["warmup_teacher_temp"], "teacher_temperature": h["teacher_temp"],
            "patch_temperature_start": h["warmup_teacher_patch_temp"], "patch_temperature": h["teacher_patch_temp"],
            "temperature_epochs": h["warmup_teacher_temp_epochs"]}  # fmt: skip


def decay_and_momentum(h: dict) -> dict:
    """Our keys of the weight-decay and EMA schedules."""
    return {"weight_decay": h["weight_decay"], "weight_decay_end": h["weight_decay_end"],
            "ema_momentum": h["momentum_teacher"]}  # fmt: skip


def mask_ratio(h: dict) -> dict:
    """Our keys of the mask-ratio schedule."""
    return {"pixel_mask_ratio": h["mask_ratio"], "pixel_mask_ratio_end": h.get("mask_ratio_end"),
            "pixel_mask_ratio_epochs": h.get("mask_ratio_epochs", 10)}  # fmt: skip


@dataclass
class Report:
    """The lines, and what has been checked."""

    prefix: str
    failed: int = 0
    checked: set[str] = field(default_factory=set)

    def line(self, name: str, error: float, tolerance: float) -> None:
        """One quantity."""
        self.checked.add(name)
        ok = error <= tolerance  # not a number is no success
        self.failed += not ok
        print(f"{self.prefix:8} {name:75} {error:9.2e}  (<= {tolerance:.0e})  {'ok' if ok else 'FAIL'}")

    def unchecked(self, name: str) -> None:
        """One quantity that nothing checks: excused, or a failure."""
        reason = next((reason for part, reason in NOT_CHECKED.items() if name.startswith(part)), None)
        self.failed += reason is None
        print(f"{self.prefix:8} {name:75} not checked: {reason or 'FAIL'}")


def relative(ours: Tensor, expected: Tensor) -> float:
    """||ours - expected|| / ||expected||; the absolute error where nothing is expected; inf if the shapes differ."""
    ours, expected = ours.detach().double().flatten(), expected.double().flatten()
    if ours.shape != expected.shape:
        return math.inf
    norm = float(expected.norm())
    return float((ours - expected).norm()) / (norm if norm > 0 else 1.0)


class Engine:
    """The production engine with a file's weights."""

    def __init__(self, golden: Golden, dtype: torch.dtype, ranks: Ranks, split: bool) -> None:
        self.golden, self.ranks, self.split, self.dtype = golden, ranks, split, dtype
        self.model = Harmony(golden.config).to(dtype)
        self.loaded = self._load()
        self.zero = Zero(self.model, golden.config, ranks)
        self.zero.engine.communication_data_type = dtype
        self.ema = ShardedEma(self.zero, self.model)
        self.clipped: dict[str, Tensor] = {}
        self.zero.optimizer.register_step_pre_hook(self._keep_clipped)

    def _load(self) -> set[str]:
        """Put the file's weights and centers in; returns the names of those that have a place."""
        own, loaded = self.model.state_dict(), set()
        for name, value in self.golden.tensors.items():
            if our_name(name) in own:
                own[our_name(name)].copy_(value.reshape(own[our_name(name)].shape))
                loaded.add(name)
        return loaded

    def _keep_clipped(self, *_: Any) -> None:
        """Between clipping and AdamW."""
        self.clipped = {n: p.grad.norm() for n, p in self.model.named_parameters() if p.grad is not None}

    def views(self, clock: Clock) -> Views:
        """The file's views at this time."""
        return self.golden.views(self.dtype, pixel_ratio(self.golden.config.views, clock))

    def gradient(self, clock: Clock) -> StepOutput:
        """Forward and backward passes."""
        return accumulate(self.zero, [self.views(clock)], clock, self.ranks, self.split)

    def update(self, clock: Clock) -> None:
        """Clipping, AdamW, EMA, centers."""
        scalars = scalars_at(self.golden.config, clock)
        self.zero.step(scalars, clock)
        self.ema.update(scalars.ema_momentum)
        self.model.end_step(self.ranks)

    def state(self) -> dict[str, Tensor]:
        """Weights, teacher and centers now."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def losses_of(engine: Engine, output: StepOutput, clock: Clock, embedded: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Our losses under the reference's names. embedded: the student's image and text embeddings [B, E]."""
    h, m, losses = engine.golden.meta["hyper"], output.metrics, output.losses
    cls, patch = m["self_distillation/class"], m["self_distillation/patch"]
    named = {
        "ibot_cls": cls, "ibot_patch": patch,
        "ibot_cls_weighted": h["lambda1"] * cls, "ibot_patch_weighted": h["lambda2"] * patch,
        "discriminative": h["disc_weight"] * losses["self_distillation"],
        "clip_hard": m["contrastive/hard"], "clip_total": losses["contrastive"],
        "mae_sum": losses["reconstruction"], "generative": h["gen_weight"] * losses["reconstruction"],
        "mlm": losses["masked_language"], "text_distill": losses["text_distillation"],
        "text": h["mlm_weight"] * losses["masked_language"] + h["text_dist_weight"] * losses["text_distillation"],
        "total": output.loss,
    }  # fmt: skip
    named.update(
        {f"mae_global_{i}": m[f"reconstruction/crop_{i}"] for i in range(engine.golden.meta["dims"]["n_global"])}
    )
    if "contrastive/soft" in m:
        named["clip_soft"] = m["contrastive/soft"]
    unit = [torch.nn.functional.normalize(e, dim=-1) for e in embedded]
    named["siglip_hard"] = contrastive_loss(*unit, 10.0, kind="sigmoid", logit_bias=-10.0)
    return named


@torch.no_grad()
def features_of(engine: Engine, clock: Clock) -> dict[str, Tensor]:
    """Intermediate quantities under the reference's names, by the production towers and heads."""
    model, views = engine.model, engine.views(clock)
    student, teacher = model.student, model.teacher
    images, words = student.encode(views, model.student_views)
    taught, said = teacher.encode(views, model.teacher_views)
    head, twin = student.heads["self_distillation"], teacher.heads["self_distillation"]
    masked, plain = images[View.GLOBAL_MASKED], taught[View.GLOBAL_PLAIN]

    def scores(of: Any, tokens: Tensor) -> Tensor:
        return (of.bottleneck(tokens) @ of.directions()[1].T).flatten(0, 1)

    def text_embedding(encoder: Any, caption: Any) -> Tensor:
        return encoder.project(caption.tokens[caption.last])

    everywhere = student.text(views, {View.CAPTION_MASKED: 1}, whole_context=True)[View.CAPTION_MASKED]
    batch, context = views.tokens.shape
    places = everywhere.places(torch.arange(batch * context), context)
    learned = everywhere.tokens[places].unflatten(0, (batch, context))
    clean = teacher.text(views, {View.CAPTION: 1}, whole_context=True)[View.CAPTION]
    known = clean.tokens[clean.places(torch.arange(batch * context), context)].unflatten(0, (batch, context))
    logits = model.objectives["masked_language"].decoder(everywhere.tokens, everywhere.layout, places)
    text_head, text_twin = student.heads["text_distillation"], teacher.heads["text_distillation"]
    removed = torch.zeros(views.block_mask.shape, dtype=torch.bool).scatter_(2, views.removed, True)
    found = {}
    if View.LOCAL in images:
        found["ibot.student_cls_local"] = head(images[View.LOCAL][:, :, 0]).flatten(0, 1)
    if teacher.text.text_projection is not None:
        found["clip.image_embed_teacher"] = teacher.image.project(plain[0, :, 0])
        found["clip.text_embed_teacher"] = text_embedding(teacher.text, said[View.CAPTION])
    return {
        **found,
        "ibot.student_cls_global": head(masked[:, :, 0]).flatten(0, 1),
        "ibot.student_patch": scores(head, masked[:, :, 1:]),
        "ibot.teacher_cls": twin(plain[:, :, 0]).flatten(0, 1),
        "ibot.teacher_patch": scores(twin, plain[:, :, 1:]),
        "clip.image_embed": student.image.project(images[View.GLOBAL_PLAIN][0, :, 0]),
        "clip.text_embed": text_embedding(student.text, words[View.CAPTION]),
        "mlm.mask": views.caption_mask,
        "mlm.masked_captions": views.tokens.masked_fill(views.caption_mask, engine.golden.meta["dims"]["vocab"]),
        "mlm.text_features": learned,
        "mlm.logits": logits.unflatten(0, (batch, context)),
        "text_distill.student_logits": text_head(learned),
        "text_distill.teacher_logits": text_twin(known),
        "mae.removed_mask": removed,
    }


def check_file(path: Path, dtype: torch.dtype, ranks: Ranks, split: bool) -> int:
    """Every quantity of a file in one precision; returns how many fail."""
    golden = Golden.read(path)
    report = Report(str(dtype)[6:])
    double, t = dtype == torch.float64, golden.tensors
    fine, coarse = (1e-9, 1e-8) if double else (2e-5, 2e-5)

    def losses(prefix: str, when: str, tolerance: float, output: StepOutput, embedded: tuple[Tensor, Tensor]) -> None:
        for name, value in losses_of(engine, output, golden.clock(when), embedded).items():
            if f"{prefix}loss.{name}" in t:
                report.line(f"{prefix}loss.{name}", relative(value, t[f"{prefix}loss.{name}"]), tolerance)

    def state(prefix: str, when: str) -> None:
        now, lr = engine.state(), golden.meta[when]["lr"]
        for name in t:
            if name.startswith(f"{prefix}after."):
                ours = now[our_name(name.removeprefix(f"{prefix}after."))].reshape(t[name].shape)
                error = relative(ours, t[name]) if double else float((ours.double() - t[name]).abs().max())
                report.line(name, error, 1e-8 if double else 0.1 * lr)
        for which in ("cls", "patch", "text"):
            if (name := f"{prefix}center_after.{which}") in t:
                report.line(name, relative(now[our_name(f"center.{which}")], t[name]), 1e-9 if double else 5e-6)

    engine = Engine(golden, dtype, ranks, split)
    for name in engine.loaded:
        report.line(name, relative(engine.state()[our_name(name)], t[name]), 0.0)
    for name in [n for n in t if n.endswith("weight_g")]:  # the gain that our prototypes do not have
        report.line(name, relative(torch.ones_like(t[name]), t[name]), 0.0)
    check_header(golden, engine.model, report)

    clock = golden.clock("step1")
    features = features_of(engine, clock)
    for name, value in features.items():
        if f"inter.{name}" in t:
            report.line(f"inter.{name}", relative(value, t[f"inter.{name}"]), fine)
    embedded = features["clip.image_embed"], features["clip.text_embed"]
    if "center_after.text_from_logits" in t:
        report.line(*center_of_logits(engine, features["text_distill.teacher_logits"], t), 1e-9 if double else 5e-6)
    check_paths(golden, engine, report, coarse)
    losses("", "step1", 1e-9 if double else 5e-6, engine.gradient(clock), embedded)
    gradients = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    for name in t:
        if name.startswith("grad."):
            ours = gradients.get(our_name(name[5:]), torch.zeros_like(t[name])).reshape(t[name].shape)
            report.line(name, relative(ours, t[name]), coarse)
    engine.update(clock)
    for name in t:
        if name.startswith("clipped_norm."):
            report.line(name, relative(engine.clipped[our_name(name[13:])], t[name]), coarse)
    for name, (_, after) in golden.meta["clipped_parameters_norm_before_after"].items():
        error = abs(float(engine.clipped[our_name(name)]) - after) / after
        report.line(f"clipped_parameters_norm_before_after.{name}", error, coarse)
    state("", "step1")

    clock = golden.clock("step2")
    features = features_of(engine, clock)
    embedded = features["clip.image_embed"], features["clip.text_embed"]
    losses("step2.", "step2", 1e-9 if double else 2e-5, engine.gradient(clock), embedded)
    engine.update(clock)
    state("step2.", "step2")

    engine = Engine(golden, dtype, ranks, split)
    clock = golden.clock("epoch0")
    features = features_of(engine, clock)
    embedded = features["clip.image_embed"], features["clip.text_embed"]
    losses("epoch0.", "epoch0", 1e-9 if double else 5e-6, engine.gradient(clock), embedded)
    engine.update(clock)
    state("epoch0.", "epoch0")

    hard_only = engine.model.teacher.text.text_projection is None
    for name in [*t, *golden.meta]:
        if hard_only and any(part in name for part in SOFT_ONLY):
            report.checked.add(name)
        if golden.meta.get(name) in ({}, []):  # nothing was clipped, say
            report.checked.add(name)
        if name not in report.checked and not any(c.startswith(f"{name}.") for c in report.checked):
            report.unchecked(name)
    return report.failed


def center_of_logits(engine: Engine, logits: Tensor, t: dict[str, Tensor]) -> tuple[str, float]:
    """What our center becomes where it averages logits, over all positions as in the file."""
    center = Center(logits.shape[-1], engine.golden.meta["hyper"]["center_momentum"]).to(logits.dtype)
    center.value.copy_(t["center.text"].flatten())
    center.add(logits.sum((0, 1)), logits.shape[:2].numel())
    center.move(Collectives())
    return "center_after.text_from_logits", relative(center.value, t["center_after.text_from_logits"])


def check_header(golden: Golden, model: Harmony, report: Report) -> None:
    """The schedules' values at the steps, which parameters train, and which of them decay."""
    for when in ("step1", "step2", "epoch0"):
        ours = scheduled(golden.config, model, golden.clock(when))
        for name, expected in golden.meta[when].items():
            report.line(f"{when}.{name}", abs(ours[name] - expected) / max(abs(expected), 1e-12), 1e-9)
    theirs = {our_name(name) for name in golden.meta["trainable_parameters"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    report.line("trainable_parameters", len(theirs ^ set(trained)), 0)
    decayed = {our_name(name) for name in golden.meta["decayed_parameters"]}
    report.line("decayed_parameters", len(decayed ^ {n for n, p in trained.items() if is_decayed(n, p)}), 0)


def check_paths(golden: Golden, engine: Engine, report: Report, tolerance: float) -> None:
    """The norm of what each group of objectives by itself adds to each gradient."""
    paths = {"discriminative": ["self_distillation"], "contrastive": ["contrastive"],
             "text": ["masked_language", "text_distillation"], "generative": ["reconstruction"]}  # fmt: skip
    model, clock = engine.model, golden.clock("step1")
    views = engine.views(clock)
    for path, expected in golden.meta["gradient_norm_by_path"].items():
        loss = model.losses(views, model.teach(views), clock, engine.ranks, paths[path]).loss
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        found = dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
        for name, norm in expected.items():
            gradient = found[our_name(name)]
            error = math.inf if gradient is None else abs(float(gradient.double().norm()) - norm) / norm
            report.line(f"gradient_norm_by_path.{path}.{name}", error, tolerance)
    for center in model.modules():  # these passes were no part of the step
        if isinstance(center, Center):
            center.total.zero_()
            center.count.zero_()


def scheduled(config: RunConfig, model: Harmony, clock: Clock) -> dict[str, float]:
    """Every scheduled number under the reference's name."""
    scalars, o = scalars_at(config, clock), model.objectives
    patch = o["self_distillation"].config
    return {
        "epoch": clock.epoch,
        "iteration": clock.step,
        "lr": scalars.lr,
        "weight_decay": scalars.weight_decay,
        "ema_momentum": scalars.ema_momentum,
        "hard_labels_weight": o["contrastive"].hard_weight(clock),
        "teacher_temp": o["self_distillation"].teacher_temperature(clock),
        "teacher_patch_temp": o["self_distillation"].warmed_up(
            clock, patch.patch_temperature_start, patch.patch_temperature
        ),
        "teacher_text_temp": o["text_distillation"].teacher_temperature(clock),
        "mask_ratio": pixel_ratio(config.views, clock),
    }


def check_schedules(path: Path) -> int:
    """Every array of a schedules file at every iteration; returns how many fail."""
    content, report = json.loads(path.read_text()), Report("schedule")
    for i, entry in enumerate(content.get("schedules", [])):
        for name, error in schedule_errors(entry):
            report.line(f"{i}.{name}", error, 1e-9)
    for i, entry in enumerate(content.get("block_masks", [])):
        for name, error, tolerance in mask_errors(entry):
            report.line(f"block_masks.{i}.{name}", error, tolerance)
    for name in content:
        if name not in ("schedules", "block_masks"):
            report.unchecked(name)
    return report.failed


def schedule_errors(entry: dict) -> Iterator[tuple[str, float]]:
    """The largest relative error of each array."""
    s = entry["settings"]
    small = {"prototypes": 8, "hidden": 8, "bottleneck": 8}
    raw = {
        "reference_compat": True, "epochs": s["epochs"],
        "data": {"train": "none.beton", "batch_size": s["batch_per_gpu"] * s["world_size"]},
        "model": {"image": {"width": 16, "depth": 1, "heads": 1, "patch_size": 8},
                  "text": {"width": 16, "depth": 1, "heads": 1, "context": 8, "vocabulary": 16}},
        "views": {"global_size": 16, "local_size": 8, **mask_ratio(s)},
        "objectives": {
            "contrastive": hard_labels(s),
            "self_distillation": {**small, **temperatures(s)},
            "text_distillation": {**small, "teacher_temperature_start": s["warmup_teacher_patch_temp"],
                                  "teacher_temperature": s["teacher_patch_temp"],
                                  "temperature_epochs": s["warmup_teacher_temp_epochs"]}},
        "optimizer": {**decay_and_momentum(s), "lr": s["base_lr"], "min_lr": s["min_lr"],
                      "warmup_epochs": s["lr_warmup_epochs"]},
    }  # fmt: skip
    config = parse_config(raw, "the file's settings")
    by_step = parse_config({**raw, "views": {**raw["views"], "pixel_mask_ratio_by_epoch": False}}, "settings")
    model = Harmony(config)

    def ours(iteration: int) -> dict[str, float]:
        clock = Clock(iteration, s["niter_per_epoch"], s["epochs"])
        values = scheduled(config, model, clock)
        values["epoch_of_iteration"] = values.pop("epoch")
        values["iterations"] = values.pop("iteration")
        values["mask_ratio_as_used_by_epoch_index"] = values.pop("mask_ratio")
        values["mask_ratio_array_at_iteration"] = pixel_ratio(by_step.views, clock)
        return values

    found = [ours(i) for i in entry["iterations"]]
    per_epoch = [ours(epoch * s["niter_per_epoch"]) for epoch in range(s["epochs"])]
    for name, expected in entry.items():
        if name == "settings":
            continue
        if name == "soft_labels_ever_used":
            yield name, float(expected != bool(model.objectives["contrastive"].teacher_views))
            continue
        values = [v[name.removesuffix("_per_epoch")] for v in (per_epoch if name.endswith("_per_epoch") else found)]
        errors = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, expected, strict=True)]
        yield name, max(errors)


def mask_errors(entry: dict) -> Iterator[tuple[str, float, float]]:
    """Statistics of as many of our block masks, in standard errors of the difference of two samples."""
    n, side = entry["samples"], entry["grid"][0]
    keys = torch.arange(n, dtype=torch.int64) * 0x9E3779B97F4A7C1 + entry["seed"]
    ratios, spreads = tuple(entry["pred_ratio"]), tuple(entry["pred_ratio_var"])
    masks = block_masks(keys, side, ratios, spreads, entry["aspect_ratio"][0])
    share = masks.double().mean(-1)
    some = share[share > 0]
    error = entry["standard_error_of_mean"] * 2**0.5
    empty = entry["fraction_of_empty_masks"]
    yield "mean_masked_fraction", abs(float(share.mean()) - entry["mean_masked_fraction"]) / error, 4
    yield "std_of_fraction", abs(float(share.std()) - entry["std_of_fraction"]) / error, 4
    spread = (2 * empty * (1 - empty) / n) ** 0.5
    yield "fraction_of_empty_masks", abs(float((share == 0).double().mean()) - empty) / spread, 4
    filled = entry["std_of_fraction_of_nonempty"] * (2 / len(some)) ** 0.5
    yield (
        "mean_masked_fraction_of_nonempty",
        abs(float(some.mean()) - entry["mean_masked_fraction_of_nonempty"]) / filled,
        4,
    )
    yield "std_of_fraction_of_nonempty", abs(float(some.std()) - entry["std_of_fraction_of_nonempty"]) / filled, 4
    yield "max_masked_fraction", abs(float(share.max()) - entry["max_masked_fraction"]) * side**2, 1.01
    yield "min_nonempty_fraction", abs(float(some.min()) - entry["min_nonempty_fraction"]) * side**2, 3.01
    for name, values in (("histogram_all_masks", share), ("histogram_nonempty_masks", some)):
        ours = torch.histogram(values, torch.tensor(entry["histogram_bin_edges"], dtype=torch.float64)).hist
        theirs = torch.tensor(entry[name], dtype=torch.float64)
        yield name, float(((ours - theirs) / (ours + theirs).clamp(min=1).sqrt()).abs().max()), 5
    grid = masks.unflatten(-1, (side, side))
    pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
    expected = entry["mean_side_neighbour_pairs_per_masked_patch"]
    yield "mean_side_neighbour_pairs_per_masked_patch", abs(float(pairs / masks.sum()) / expected - 1), 0.01
    frequency = torch.tensor(entry["per_position_masked_frequency"], dtype=torch.float64)
    deviation = (2 * frequency * (1 - frequency) / n).sqrt()
    yield "per_position_masked_frequency", float(((grid.double().mean(0) - frequency) / deviation).abs().max()), 5.5


def allow_float64() -> None:
    """DeepSpeed reduces float64 gradients rightly, but does not list the type among the supported ones."""
    from deepspeed.accelerator import get_accelerator

    supported = [*get_accelerator().supported_dtypes(), torch.float64]
    get_accelerator().supported_dtypes = lambda: supported


def main(arguments: list[str]) -> int:
    """Print one line per quantity; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--mode", choices=["packed", "split"], default="packed")
    given = parser.parse_args(arguments)
    ranks, failed = join(), 0
    allow_float64()
    for path in given.files:
        if path.suffix == ".json":
            failed += check_schedules(path)
        else:
            for dtype in (torch.float64, torch.float32):
                failed += check_file(path, dtype, ranks, given.mode == "split")
    print(f"{failed} failed" if failed else "all ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
