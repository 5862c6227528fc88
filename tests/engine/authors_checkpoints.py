"""The weights of the golden fixture as checkpoints of the authors' code."""

import argparse
from functools import cache
from pathlib import Path

import numpy as np
import torch
from commands import ROOT
from safetensors import safe_open
from torch import Tensor

# What the weights of the fixture do not tell.
HEADS = ["model.image.heads=3", "model.text.heads=2", "objectives.reconstruction.heads=2"]
Weights = dict[str, Tensor]


@cache
def fixture_weights() -> Weights:
    """Under the fixture's names."""
    with safe_open(ROOT / "tests" / "golden" / "tiny_a.safetensors", "pt") as f:
        parts = ("student.", "teacher.", "mlm.", "mae_decoder.", "logit_scale", "center.")
        return {name: f.get_tensor(name) for name in f.keys() if name.startswith(parts)}  # noqa: SIM118


def text_names(name: str) -> str:
    """open_clip's names to the authors'."""
    for ours, theirs in (
        ("transformer.", "backbone."), ("token_embedding.", "text_embedding."), ("ln_final.", "text_norm."),
        ("positional_embedding", "text_positional_embedding"),
    ):  # fmt: skip
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


# Where the authors' model registers the parts of the fixture; the same tensor under each name, as in their state dict.
PLACES = {
    "student.image.": [
        "image_encoder.", "student.backbone.", "discriminative_path.image_encoder.",
        "discriminative_path.student.backbone.", "generative_path.backbone.", "contrastive_path.image_backbone.",
    ],
    "teacher.image.": ["teacher.backbone.", "discriminative_path.teacher.backbone."],
    "student.head.": ["student.head.", "discriminative_path.student_head.", "discriminative_path.student.head."],
    "teacher.head.": ["teacher.head.", "discriminative_path.teacher_head.", "discriminative_path.teacher.head."],
    "student.text.": [
        "contrastive_path.text_backbone.", "text_student.backbone.",
        "text_distillation_path.text_dist_student.backbone.",
    ],
    "teacher.text.": [
        "contrastive_path.text_backbone_teacher.", "text_teacher.backbone.",
        "text_distillation_path.text_dist_teacher.backbone.",
    ],
    "student.text_head.": [
        "text_student.distillation_head.", "text_distillation_path.text_dist_student.distillation_head.",
    ],
    "teacher.text_head.": [
        "text_teacher.distillation_head.", "text_distillation_path.text_dist_teacher.distillation_head.",
    ],
    "mlm.": ["mlm_head."],
    "mae_decoder.mask_token": ["generative_path.mask_token"],
    "mae_decoder.": ["generative_path.decoder_"],
    "logit_scale": ["contrastive_path.logit_scale"],
    "center.cls": ["discriminative_path.loss.center"],
    "center.patch": ["discriminative_path.loss.center2"],
    "center.text": ["text_distillation_path.text_distillation_loss.center"],
}  # fmt: skip


def authors_state(golden: Weights) -> Weights:
    """The fixture's weights as the authors' model names them."""
    state: Weights = {}
    for name, value in golden.items():
        start = next(start for start in PLACES if name.startswith(start))
        inner = name[len(start) :]
        inner = text_names(inner) if ".text." in start or start == "mlm." else inner
        for place in PLACES[start]:
            state[place + inner] = value
            if "last_layer." in inner and ".head." in place:  # a shared head has its output layer twice
                state[(place + inner).replace("last_layer", "last_layer2")] = value
        if start == "student.image." and inner.startswith("patch_embed."):
            state[f"generative_path.{inner}"] = value
    return state


def checkpoint(golden: Weights, **args: object) -> dict:
    """What the authors' code saves, with the NumPy numbers that its schedules leave in the optimizer."""
    rate = np.linspace(0, 1, 5)[3]
    return {
        "model": authors_state(golden),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": rate, "params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", **args),
        "disc_loss": {"center": golden["center.cls"], "center2": golden["center.patch"]},
    }


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def assert_same(one: Weights, other: Weights) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
