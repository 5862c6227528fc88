"""The soft targets of the teacher beside what the student makes of the same samples, as matrices of colours."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from torch import Tensor

from ...harmony.model import Branch
from ..data.labelled import LabelledSample
from ..evaluate.features import class_tokens, image_embeddings, text_embeddings
from .markup import Markup, picture, tag
from .run import Run
from .samples import pick

SAMPLES = 12
"""Rows and columns of a matrix."""
CELL = 36
"""Side of a cell, pixels."""


def soft_targets(run: Run) -> Markup:
    """Image to text: the teacher's targets, and the student's predictions, for a few samples."""
    config, contrastive = run.config, run.model.objectives["contrastive"]
    samples = run.held.pool[1]
    chosen = [samples[i] for i in pick(len(samples), SAMPLES, config.seed)]
    taught = similarities(run, run.model.teacher, chosen) / contrastive.config.soft_temperature
    learned = similarities(run, run.model.student, chosen) * float(contrastive.logit_scale.detach().exp())
    cards = [
        _matrix("Targets of the EMA teacher", taught.softmax(-1), chosen),
        _matrix("Predictions of the student", learned.softmax(-1), chosen),
    ]
    return tag("div", cards, class_="cards")


@torch.inference_mode()
def similarities(run: Run, branch: Branch, samples: list[LabelledSample]) -> Tensor:
    """Cosine similarities of images (rows) and captions (columns): [n, n]."""
    images = image_embeddings(branch, class_tokens(branch, samples, run.config))
    return images @ text_embeddings(branch, [sample.caption for sample in samples], run.config).T


def _matrix(title: str, probabilities: Tensor, samples: list[LabelledSample]) -> Markup:
    """One matrix, whose rows add up to 1, with the samples along both sides."""
    own = float(probabilities.diagonal().mean())
    choices = float((-(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)).exp().mean())
    words = f"on an image's own caption {100 * own:.0f} % on average; as spread out as {choices:.1f} equal choices"
    image = picture(drawn(probabilities, samples), f"{title}: {words}", class_="matrix", exact=True)
    return tag("article", tag("h3", title), tag("figure", image), tag("p", words.capitalize(), "."), class_="card")


def drawn(probabilities: Tensor, samples: list[LabelledSample]) -> np.ndarray:
    """Thumbnails along both sides, a cell per pair from black (0) to bright (the largest value): uint8 [S, S, 3]."""
    count = len(samples)
    level = (probabilities / probabilities.max()).numpy()
    cells = (255 * matplotlib.colormaps["inferno"](level)[..., :3]).astype(np.uint8)
    out = np.full(((count + 1) * CELL, (count + 1) * CELL, 3), 255, np.uint8)
    out[CELL:, CELL:] = cells.repeat(CELL, 0).repeat(CELL, 1)
    for i, sample in enumerate(samples, 1):
        small = sample.image.copy()
        small.thumbnail((CELL - 4, CELL - 4))
        pixels = np.asarray(small)
        height, width = pixels.shape[:2]
        for top, left in ((i * CELL + 2, 2), (2, i * CELL + 2)):
            out[top : top + height, left : left + width] = pixels
    return out
