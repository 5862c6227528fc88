"""Check the production engine against the authors' numbers: `python tests/parity.py [--mode split] FILE [FILE ...]`.

FILE.safetensors holds a training step of the authors' implementation, FILE.json its schedules (see
tests/golden/README.md for every quantity). The model, its configuration with `reference_compat: true`, the passes, the
optimizer step and the EMA are those of `harmony-fast train`, in float64 and in float32 (ZeRO stage 0, whose weights
have the precision that the model has). One line per quantity: name, error, tolerance, ok or FAIL. A quantity of the
file that nothing here checks is a failure. The exit status is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from golden_file import Golden, Report, relative
from harmony_fast.engine.accumulate import accumulate
from harmony_fast.engine.authors import our_name
from harmony_fast.engine.distributed import Ranks, join
from harmony_fast.engine.ema import ShardedEma
from harmony_fast.engine.optimizer import is_decayed, scalars_at
from harmony_fast.engine.zero import Zero
from harmony_fast.harmony.model import Harmony, StepOutput
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.objectives.base import Center
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import View, Views, pixel_ratio
from harmony_fast.kernels import contrastive_loss
from parity_schedules import check_schedules, scheduled
from torch import Tensor

SOFT_ONLY = ("teacher.image.contrastive_projection", "teacher.text.text_projection", "teacher.text.ln_final",
             "_embed_teacher", "clip_soft")  # fmt: skip
"""What is not built, and so not checked, where the hard labels' weight is 1 from beginning to end"""


def check_file(path: Path, dtype: torch.dtype, ranks: Ranks, split: bool) -> int:
    """Every quantity of a file in one precision; returns how many fail."""
    golden, report = Golden.read(path), Report(str(dtype)[6:])
    tight, fine, coarse = (1e-9, 1e-9, 1e-8) if dtype == torch.float64 else (5e-6, 2e-5, 2e-5)
    engine = Engine(golden, dtype, ranks, split)
    check_weights(engine, report)
    check_header(golden, engine.model, report)
    check_features(engine, report, fine, tight)
    check_paths(golden, engine, report, coarse)
    check_step(engine, report, "", "step1", tight)
    for name, (_, after) in golden.meta["clipped_parameters_norm_before_after"].items():
        error = abs(float(engine.clipped[our_name(name)]) - after) / after
        report.line(f"clipped_parameters_norm_before_after.{name}", error, coarse)
    check_step(engine, report, "step2.", "step2", fine)
    check_step(Engine(golden, dtype, ranks, split), report, "epoch0.", "epoch0", tight)

    hard_only = engine.model.teacher.text.text_projection is None
    for name in [*golden.tensors, *golden.meta]:
        if hard_only and any(part in name for part in SOFT_ONLY):
            report.checked.add(name)
        if golden.meta.get(name) in ({}, []):  # nothing was clipped, say
            report.checked.add(name)
        if name not in report.checked and not any(c.startswith(f"{name}.") for c in report.checked):
            report.unchecked(name)
    return report.failed


def check_weights(engine: Engine, report: Report) -> None:
    """That what the file begins with is in the model."""
    t, now = engine.golden.tensors, engine.state()
    for name in engine.loaded:
        report.line(name, relative(now[our_name(name)], t[name]), 0.0)
    for name in [n for n in t if n.endswith("weight_g")]:  # the gain that our prototypes do not have
        report.line(name, relative(torch.ones_like(t[name]), t[name]), 0.0)


def check_features(engine: Engine, report: Report, tolerance: float, of_centers: float) -> None:
    """What the towers and heads make of the first step's inputs."""
    t, features = engine.golden.tensors, features_of(engine, engine.golden.clock("step1"))
    for name, value in features.items():
        if f"inter.{name}" in t:
            report.line(f"inter.{name}", relative(value, t[f"inter.{name}"]), tolerance)
    if "center_after.text_from_logits" in t:
        report.line(*center_of_logits(engine, features["text_distill.teacher_logits"], t), of_centers)


def check_step(engine: Engine, report: Report, prefix: str, when: str, of_losses: float) -> None:
    """One step: losses, gradients before and after clipping, then weights, teacher and centers. prefix: of its names in
    the file."""
    golden, clock = engine.golden, engine.golden.clock(when)
    double, t, lr = engine.dtype == torch.float64, golden.tensors, golden.meta[when]["lr"]
    coarse = 1e-8 if double else 2e-5
    features = features_of(engine, clock)
    output = engine.gradient(clock)
    gradients = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    engine.update(clock)
    now = engine.state()

    def named(part: str) -> list[tuple[str, str]]:
        """The file's names of such quantities, and ours of the parameters or buffers."""
        return [(name, our_name(name.removeprefix(prefix + part))) for name in t if name.startswith(prefix + part)]

    embedded = features["clip.image_embed"], features["clip.text_embed"]
    for name, value in losses_of(engine, output, embedded).items():
        if f"{prefix}loss.{name}" in t:
            report.line(f"{prefix}loss.{name}", relative(value, t[f"{prefix}loss.{name}"]), of_losses)
    for name, own in named("grad."):
        ours = gradients.get(own, torch.zeros_like(t[name])).reshape(t[name].shape)
        report.line(name, relative(ours, t[name]), coarse)
    for name, own in named("clipped_norm."):
        report.line(name, relative(engine.clipped[own], t[name]), coarse)
    for name, own in named("after."):
        ours = now[own].reshape(t[name].shape)
        error = relative(ours, t[name]) if double else float((ours.double() - t[name]).abs().max())
        report.line(name, error, 1e-8 if double else 0.1 * lr)
    for which in ("cls", "patch", "text"):
        if (name := f"{prefix}center_after.{which}") in t:
            report.line(name, relative(now[our_name(f"center.{which}")], t[name]), 1e-9 if double else 5e-6)


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


def losses_of(engine: Engine, output: StepOutput, embedded: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
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
