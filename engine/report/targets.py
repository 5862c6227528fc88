"""The soft targets of the teacher beside what the student makes of the same samples, as matrices of colours."""

from __future__ import annotations

from typing import cast

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...harmony.heads import ProjectionHead
from ...harmony.model import Branch
from ...harmony.objectives.contrastive import Contrastive
from ...harmony.objectives.self_distillation import SelfDistillation
from ..data.labelled import LabelledSample
from ..evaluate.features import class_tokens, image_embeddings, image_tower, text_embeddings
from .markup import Child, Markup, picture, tag
from .run import Run
from .samples import displayable, pick

SAMPLES = 12
"""Rows and columns of a matrix of images and captions."""
CELL = 36
"""Side of a cell, pixels."""


def has_soft_targets(run: Run) -> bool:
    """Whether a teacher gives targets to choose among: captions, or prototypes."""
    contrastive = run.outline.objectives["contrastive"] if "contrastive" in run.objectives else None
    return bool(contrastive is not None and contrastive.teacher_views) or "self_distillation" in run.objectives


def soft_targets(run: Run) -> Markup:
    """The matrices of the objectives that have them."""
    cards: list[Child] = []
    if "contrastive" in run.objectives and run.model.objectives["contrastive"].teacher_views:
        cards += _captions(run)
    if "self_distillation" in run.objectives:
        cards.append(_prototypes(run))
    return tag("div", cards, class_="cards")


def _captions(run: Run) -> list[Markup]:
    """Image to text: the teacher's targets, and the student's predictions."""
    config, contrastive = run.config, cast(Contrastive, run.model.objectives["contrastive"])
    samples = run.held.pool[1]
    chosen = [samples[i] for i in pick(len(samples), SAMPLES, config.seed)]
    taught = similarities(run, run.model.teacher, chosen) / contrastive.config.soft_temperature
    learned = similarities(run, run.model.student, chosen) * float(contrastive.logit_scale.detach().exp())
    images = [np.asarray(sample.image) for sample in chosen]
    kinds = {
        "Image to captions, the teacher's targets": taught,
        "Image to captions, the student's predictions": learned,
    }
    cards = []
    for title, scores in kinds.items():
        probabilities = scores.softmax(-1)
        own, choices = float(probabilities.diagonal().mean()), spread(probabilities)
        words = (
            "Rows are images, columns the captions of the same samples; a row adds up to 1. On an image's own caption "
            f"{100 * own:.0f} % on average; as spread out as {choices:.1f} equal choices"
        )
        cards.append(_card(title, words, drawn(probabilities, images, images)))
    return cards


@torch.inference_mode()
def similarities(run: Run, branch: Branch, samples: list[LabelledSample]) -> Tensor:
    """Cosine similarities of images (rows) and captions (columns): [n, n]."""
    images = image_embeddings(branch, class_tokens(branch, samples, run.config))
    return images @ text_embeddings(branch, [sample.caption for sample in samples], run.config).T


def _prototypes(run: Run) -> Markup:
    """How far the teacher's targets of one crop agree with the student's predictions for another."""
    views, objective = run.gallery.views, cast(SelfDistillation, run.model.objectives["self_distillation"])
    seen = views.global_crops[0], views.global_crops[1] if len(views.global_crops) > 1 else views.local_crops[0]
    taught = prototype_scores(run.model.teacher, seen[0], objective, objective.config.teacher_temperature)
    learned = prototype_scores(run.model.student, seen[1], objective, objective.config.student_temperature)
    agreement = taught.sqrt() @ learned.sqrt().T
    diagonal = torch.eye(len(agreement), dtype=torch.bool)
    same, others = float(agreement[diagonal].mean()), float(agreement[~diagonal].mean())
    words = (
        "Rows are crops that the teacher sees, columns other crops of the same samples that the student sees; bright "
        "where their shares of the prototypes overlap (Bhattacharyya coefficient): "
        f"{same:.2f} for the same sample, {others:.2f} for two. All bright means collapse. One target is as spread out "
        f"as {spread(taught):.1f} of {taught.shape[1]:,} prototypes, all together as {spread(taught.mean(0)[None]):.1f}"
    )
    shown = [list(displayable(crops, run.config)) for crops in seen]
    return _card("Class tokens: targets and predictions", words, drawn(agreement, *shown))


@torch.inference_mode()
def prototype_scores(branch: Branch, crops: Tensor, objective: SelfDistillation, temperature: float) -> Tensor:
    """Shares of the prototypes [B, K] in the class tokens of crops [B, 3, H, W]; the teacher's are centred."""
    head, encoder = cast(ProjectionHead, branch.heads["self_distillation"]), image_tower(branch)
    u = head.bottleneck(encoder.features(crops.to(encoder.cls_token.device))[:, 0])
    scores = u.float() @ head.last_layer().float().T
    if not encoder.cls_token.requires_grad:  # only the teacher's never learn
        scores = scores - objective.class_center.value
    return (scores / temperature).softmax(-1).cpu()


def spread(probabilities: Tensor) -> float:
    """How many equal choices would be as uncertain: exp of the mean entropy of rows [n, K]."""
    return float((-(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)).mean().exp())


def _card(title: str, words: str, pixels: np.ndarray) -> Markup:
    image = picture(pixels, f"{title}. {words}", class_="matrix", exact=True)
    return tag("article", tag("h3", title), tag("figure", image), tag("p", f"{words}.", class_="note"), class_="card")


def drawn(values: Tensor, rows: list[np.ndarray], columns: list[np.ndarray]) -> np.ndarray:
    """Images along both sides, a cell per pair from black (0) to bright (the largest value): uint8 [S, S, 3].

    values: [n, n]; rows, columns: n images each, uint8 [h, w, 3].
    """
    level = (values / values.max().clamp(min=1e-12)).numpy()
    cells = (255 * matplotlib.colormaps["inferno"](level)[..., :3]).astype(np.uint8)
    side = (len(rows) + 1) * CELL
    out = np.full((side, side, 3), 255, np.uint8)
    out[CELL:, CELL:] = cells.repeat(CELL, 0).repeat(CELL, 1)
    for i, (row, column) in enumerate(zip(rows, columns, strict=True), 1):
        for image, top, left in ((row, i * CELL + 2, 2), (column, 2, i * CELL + 2)):
            small = Image.fromarray(image)
            small.thumbnail((CELL - 4, CELL - 4))
            out[top : top + small.height, left : left + small.width] = np.asarray(small)
    return out
