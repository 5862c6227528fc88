"""Check the production model against reference numbers: `python tests/parity.py FILE.safetensors [...]`.

The files hold numbers of the authors' implementation (see tests/golden/README.md for every tensor). One line per
quantity: name, relative error, ok or FAIL; exit status 1 if any fails.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from harmony_fast.harmony.model import Harmony, MethodConfig
from harmony_fast.harmony.objectives import Collectives
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Views, assemble, caption_lengths, split_by_noise, words_only
from safetensors import safe_open
from torch import Tensor

PREFIXES = {
    "student.head.": "student.heads.self_distillation.",
    "teacher.head.": "teacher.heads.self_distillation.",
    "student.text_head.": "student.heads.text_distillation.",
    "teacher.text_head.": "teacher.heads.text_distillation.",
    "mlm.": "objectives.masked_language.decoder.",
    "mae_decoder.": "objectives.reconstruction.decoder.",
    "logit_scale": "objectives.contrastive.logit_scale",
    "center.cls": "objectives.self_distillation.class_center.value",
    "center.patch": "objectives.self_distillation.patch_center.value",
    "center.text": "objectives.text_distillation.center.value",
}


def our_name(name: str) -> str:
    """The reference's parameter name in our model."""
    for theirs, ours in PREFIXES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


@dataclass
class Golden:
    """A file of reference numbers."""

    tensors: dict[str, Tensor]
    meta: dict

    @classmethod
    def read(cls, path: Path) -> Golden:
        """All tensors and the JSON header."""
        with safe_open(path, "pt") as f:
            names = list(f.keys())
            return cls({name: f.get_tensor(name) for name in names}, json.loads(f.metadata()["json"]))

    def method(self) -> MethodConfig:
        """Our configuration of the file's model, with everything as the authors' code has it."""
        d, h = self.meta["dims"], self.meta["hyper"]
        patch_prototypes = None if d["shared_head"] else d["patch_out_dim"]
        epochs = h["warmup_teacher_temp_epochs"]
        start, end = h["warmup_teacher_patch_temp"], h["teacher_patch_temp"]
        return MethodConfig.model_validate({
            "model": {
                "image": {"width": d["image_width"], "depth": d["image_depth"], "heads": d["image_heads"],
                          "mlp_ratio": d["image_mlp_ratio"], "patch_size": d["patch_size"]},
                "text": {"width": d["text_width"], "depth": d["text_layers"], "heads": d["text_heads"],
                         "context": d["context"], "vocabulary": d["vocab"]},
            },
            "views": {"global_crops": d["n_global"], "global_size": d["image_size"], "local_crops": d["n_local"],
                      "local_size": d["local_size"], "pixel_mask_ratio": h["mask_ratio"]},
            "objectives": {
                "contrastive": {
                    "hard_weight": h["hard_labels_weight"], "hard_weight_end": h["hard_labels_weight_end"],
                    "hard_weight_epochs": h["hard_labels_weight_epochs"], "soft_temperature": h["soft_temp"],
                    "max_logit_scale": None, "embed_dim": d["joint_dim"]},
                "self_distillation": {
                    "weight": h["disc_weight"], "class_weight": h["lambda1"], "patch_weight": h["lambda2"],
                    "prototypes": d["out_dim"], "patch_prototypes": patch_prototypes, "hidden": d["head_hidden"],
                    "bottleneck": d["head_bottleneck"], "student_temperature": h["student_temp"],
                    "teacher_temperature_start": h["warmup_teacher_temp"], "teacher_temperature": h["teacher_temp"],
                    "patch_temperature_start": start, "patch_temperature": end,
                    "temperature_epochs": epochs, "temperature_by_epoch": True, "patch_center": "all",
                    "center_momentum": h["center_momentum"], "freeze_last_layer": h["freeze_last_layer"]},
                "reconstruction": {"weight": h["gen_weight"], "width": d["mae_width"], "depth": d["mae_depth"],
                                   "heads": d["mae_heads"], "position_embedding": "zeros"},
                "masked_language": {"weight": h["mlm_weight"], "depth": d["mlm_layers"]},
                "text_distillation": {
                    "weight": h["text_dist_weight"], "prototypes": d["text_out_dim"], "hidden": d["text_head_hidden"],
                    "bottleneck": d["text_head_bottleneck"], "student_temperature": h["student_temp"],
                    "teacher_temperature_start": start, "teacher_temperature": end,
                    "temperature_epochs": epochs, "temperature_by_epoch": True, "center_of": "probabilities",
                    "center_momentum": h["center_momentum"]},
            },
        })  # fmt: skip

    def model(self, dtype: torch.dtype) -> Harmony:
        """Our model with the file's weights and centers."""
        model = Harmony(self.method()).to(dtype)
        own = model.state_dict()
        for name, value in self.tensors.items():
            if our_name(name) in own:
                own[our_name(name)].copy_(value.reshape(own[our_name(name)].shape))
        return model

    def views(self, dtype: torch.dtype) -> Views:
        """The file's inputs and masks."""
        t = self.tensors
        kept, removed = split_by_noise(t["input.mae_noise"], self.meta["hyper"]["mask_ratio"])
        words = words_only(t["input.mlm_mask_raw"], caption_lengths(t["input.captions"]))
        return assemble(
            t["input.global_crops"].to(dtype), t["input.local_crops"].to(dtype), t["input.captions"],
            t["input.ibot_masks"].flatten(2), kept, removed, words, torch.zeros(len(words), dtype=torch.int64),
        )  # fmt: skip

    def clock(self, when: str) -> Clock:
        """The clock of `step1`, `step2` or `epoch0`."""
        h = self.meta["hyper"]
        return Clock(self.meta[when]["iteration"], h["niter_per_epoch"], h["epochs"])


def relative(ours: Tensor, expected: Tensor) -> float:
    """||ours - expected|| / ||expected||."""
    ours, expected = ours.detach().double().flatten(), expected.double().flatten()
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30))


def losses_of(golden: Golden, output) -> dict[str, Tensor]:
    """Our losses under the reference's names."""
    h, m, losses = golden.meta["hyper"], output.metrics, output.losses
    cls, patch = m["self_distillation/class"], m["self_distillation/patch"]
    named = {
        "ibot_cls": cls, "ibot_patch": patch,
        "ibot_cls_weighted": h["lambda1"] * cls, "ibot_patch_weighted": h["lambda2"] * patch,
        "discriminative": h["disc_weight"] * losses["self_distillation"],
        "clip_hard": m["contrastive/hard"], "clip_total": losses["contrastive"],
        "mae_sum": losses["reconstruction"], "generative": h["gen_weight"] * losses["reconstruction"],
        "mlm": losses["masked_language"], "text_distill": losses["text_distillation"],
        "text": h["mlm_weight"] * losses["masked_language"] + h["text_dist_weight"] * losses["text_distillation"],
        "total": output.loss.detach(),
    }  # fmt: skip
    if "contrastive/soft" in m:
        named["clip_soft"] = m["contrastive/soft"]
    return named


def compare(golden: Golden, dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """(quantity, relative error, tolerance) for the losses, gradients and centers of step 1."""
    double = dtype == torch.float64
    model, expected = golden.model(dtype), golden.tensors
    output = model(golden.views(dtype), golden.clock("step1"), Collectives())
    output.loss.backward()
    model.end_step(Collectives())
    rows = [
        (f"loss.{name}", relative(value, expected[f"loss.{name}"]), 1e-9 if double else 5e-6)
        for name, value in losses_of(golden, output).items()
    ]
    own = model.state_dict()
    for name in ("cls", "patch", "text"):
        center = own[our_name(f"center.{name}")]
        rows.append(
            (f"center_after.{name}", relative(center, expected[f"center_after.{name}"]), 1e-9 if double else 5e-6)
        )
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, value in expected.items():
        if name.startswith("grad."):
            ours = gradients[our_name(name[5:])]
            rows.append((name, relative(ours, value), 1e-8 if double else 2e-5))
    return rows


def main(paths: list[str]) -> int:
    """Print one line per quantity; the exit status."""
    failed = 0
    for path in paths:
        for dtype in (torch.float64, torch.float32):
            for name, error, tolerance in compare(Golden.read(Path(path)), dtype):
                ok = error <= tolerance
                failed += not ok
                print(f"{str(dtype)[6:]:8} {name:70} {error:9.2e} {'ok' if ok else 'FAIL'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
