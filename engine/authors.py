"""Checkpoints of the authors' code (github.com/MohammedSB/Harmony): reading them safely, and their names for weights.

Their `checkpoint.pth` holds a state dict in which most weights appear several times, because modules are registered in
several places (`image_encoder`, `student.backbone`, `generative_path.backbone`, ... are one tower); besides, the
optimizer, the command-line arguments, and the epoch. `main_vit_checkpoint.pth` and `main_text_checkpoint.pth` are the
bare state dicts of one tower, the EMA teacher's where there is one. The short names of the numeric fixtures
(`student.head.*`, `mae_decoder.*`, ...) are understood as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

_VIT = r"(?=cls_token$|pos_embed$|masked_embed$|contrastive_projection$|patch_embed\.|blocks\.|norm\.)"
_TEXT = r"(?=backbone\.|text_embedding\.|text_positional_embedding$|text_norm\.|text_projection$)"
_DISTILLED = r"text_distillation_path\.text_dist"

# The first pattern that matches a name's beginning is replaced.
TO_OURS = [
    (r"(student|teacher)\.(image|text)\.", r"\1.\2."),
    (r"image_encoder\.|(?:discriminative_path\.)?student\.backbone\.", "student.image."),
    (r"discriminative_path\.image_encoder\.|generative_path\.backbone\.", "student.image."),
    (r"contrastive_path\.image_backbone\.|(?:student\.)?" + _VIT, "student.image."),
    (r"generative_path\.patch_embed\.", "student.image.patch_embed."),
    (r"(?:discriminative_path\.)?teacher\.backbone\.|teacher\." + _VIT, "teacher.image."),
    (r"(?:discriminative_path\.)?(student|teacher)[._]head\.", r"\1.heads.self_distillation."),
    (r"discriminative_path\.loss\.center2$|center\.patch$", "objectives.self_distillation.patch_center.value"),
    (r"discriminative_path\.loss\.center$|center\.cls$", "objectives.self_distillation.class_center.value"),
    (r"generative_path\.(?:decoder_|(?=mask_token$))|mae_decoder\.", "objectives.reconstruction.decoder."),
    (r"(?:contrastive_path\.)?(logit_scale|logit_bias)$", r"objectives.contrastive.\1"),
    (r"mlm\.|mlm_head\.", "objectives.masked_language.decoder."),
    (rf"(?:{_DISTILLED}_|text_)(student|teacher)\.distillation_head\.", r"\1.heads.text_distillation."),
    (r"(student|teacher)\.text_head\.", r"\1.heads.text_distillation."),
    (rf"(?:{_DISTILLED}_|text_)(student|teacher)\.backbone\." + _TEXT, r"\1.text."),
    (r"text_(student|teacher)\." + _TEXT, r"\1.text."),
    (r"contrastive_path\.text_backbone_teacher\.", "teacher.text."),
    (r"contrastive_path\.text_backbone\.|" + _TEXT, "student.text."),
    (rf"{_DISTILLED}illation_loss\.center$|center\.text$", "objectives.text_distillation.center.value"),
]

# Inside the text tower and the masked-word decoder.
TEXT_TO_OURS = {
    "backbone.": "transformer.",
    "text_embedding.": "token_embedding.",
    "text_positional_embedding": "positional_embedding",
    "text_norm.": "ln_final.",
}

# One name for each of ours, in a checkpoint made here; the others are the same modules, so that none is missed.
TO_THEIRS = {
    "student.image.": "image_encoder.",
    "teacher.image.": "teacher.",
    "student.text.": "contrastive_path.text_backbone.",
    "teacher.text.": "contrastive_path.text_backbone_teacher.",
    "student.heads.self_distillation.": "discriminative_path.student.head.",
    "teacher.heads.self_distillation.": "discriminative_path.teacher.head.",
    "student.heads.text_distillation.": "text_distillation_path.text_dist_student.distillation_head.",
    "teacher.heads.text_distillation.": "text_distillation_path.text_dist_teacher.distillation_head.",
    "objectives.contrastive.": "contrastive_path.",
    "objectives.reconstruction.decoder.mask_token": "generative_path.mask_token",
    "objectives.reconstruction.decoder.": "generative_path.decoder_",
    "objectives.masked_language.decoder.": "mlm_head.",
    "objectives.self_distillation.class_center.value": "discriminative_path.loss.center",
    "objectives.self_distillation.patch_center.value": "discriminative_path.loss.center2",
    "objectives.text_distillation.center.value": "text_distillation_path.text_distillation_loss.center",
}


def our_name(name: str) -> str | None:
    """The name in our model's state of a weight that the authors' code calls `name`; None if it has no such weight."""
    for pattern, replacement in TO_OURS:
        found, count = re.subn(rf"^(?:{pattern})", replacement, name, count=1)
        if count:
            return _renamed(found, TEXT_TO_OURS)
    return None


def their_name(name: str, objectives: Collection[str]) -> str | None:
    """A name in the authors' checkpoints for a weight of ours; None if they have no such weight.

    objectives: those of the run. A teacher with a head has its tower one level deeper.
    """
    for ours, theirs in TO_THEIRS.items():
        if name.startswith(ours):
            if ours == "teacher.image." and "self_distillation" in objectives:
                theirs = "discriminative_path.teacher.backbone."
            if ours == "teacher.text." and "text_distillation" in objectives:
                theirs = "text_distillation_path.text_dist_teacher.backbone."
            back = {value: key for key, value in TEXT_TO_OURS.items()}
            return theirs + _renamed(ours + name[len(ours) :], back)[len(ours) :]
    return None


def _renamed(name: str, table: dict[str, str]) -> str:
    """With the inner part of a text tower's or masked-word decoder's name replaced by the table."""
    outer = re.match(r"(student\.text|teacher\.text|objectives\.masked_language\.decoder)\.", name)
    if outer:
        for before, after in table.items():
            if name.startswith(before, outer.end()):
                return outer[0] + after + name[outer.end() + len(before) :]
    return name


@dataclass
class Source:
    """One file of the authors' code, read."""

    path: Path
    tensors: dict[str, Tensor]
    """By their names"""
    whole: bool
    """Whether it is a checkpoint, with a state dict under `model`, or a bare state dict"""
    args: dict[str, Any] = field(default_factory=dict)
    """The command line of the run that wrote it"""
    epoch: int | None = None
    left_out: list[str] = field(default_factory=list)
    """What else is in the file"""

    def names(self) -> dict[str, str | None]:
        """Ours for each of theirs, with `module.` (data-parallel wrappers) disregarded."""
        return {name: our_name(re.sub(r"^(module\.)+", "", name)) for name in self.tensors}


class _Settings:
    """Stands in for argparse.Namespace: attributes and nothing else."""


class _Ignored:
    """Stands in for NumPy's scalars (schedules' values in the optimizer's state): takes anything and drops it."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Settings, "argparse.Namespace"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
]
"""What a checkpoint of the authors' code holds beside tensors. Classes of ours are made in their place: nothing that a
file names is ever called."""


def read_source(path: Path) -> Source:
    """Read a file of the authors' code. Raises UserError if it holds anything but tensors and plain data; nothing in it
    is run."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the reader fail in any way
        reason = re.search(r"GLOBAL \S+", str(error))
        what = f"it holds {reason[0][7:]}, which is not a weight" if reason else str(error).split("\n")[0][:200]
        raise UserError(
            f"{path}: refused: {what}; only tensors and plain data are read, since more can run code"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not the weights of a model")
    return _source(path, content)


def _source(path: Path, content: dict[Any, Any]) -> Source:
    """Sort out what a file holds."""
    whole = isinstance(content.get("model"), dict)
    state = content["model"] if whole else content
    tensors = {str(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    source = Source(path, tensors, whole, left_out=[str(k) for k in state if str(k) not in tensors])
    if not any(source.names().values()):
        shown = ", ".join(list(tensors)[:3]) or "no tensors"
        raise UserError(f"{path}: no weight in it has a name that the authors' code uses (found: {shown})")
    if whole:
        args = content.get("args")
        source.args = dict(vars(args)) if isinstance(args, _Settings) else args if isinstance(args, dict) else {}
        source.epoch = content.get("epoch") if isinstance(content.get("epoch"), int) else None
        source.left_out += [str(k) for k in content if k not in ("model", "args", "epoch", "disc_loss")]
    return source
