"""A file of the authors' numbers, our configuration of its model, and the lines that a comparison prints."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import Masks, Views, assemble, caption_lengths, split_by_noise, words_only
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
