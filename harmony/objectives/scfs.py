"""Semantics-consistent feature search between views (SCFS, Song et al. 2023, arXiv 2212.06486), on ViT patch tokens.

Two crops of an image need not show the same things, so a patch of one view is not compared with the other view as a
whole, but with what is found there for it: a mean of the teacher's patches, weighted by their similarity to it.

The paper searches the feature maps of a ResNet with the mean feature of a local crop; here every patch of a student
view searches for itself, and the weights are a softmax, which needs no rectified features. Its first loss, between the
data augmentations, is `self_distillation` with `patch_weight: null`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from ..schedules import Clock
from ..views import Request, View, Views, ViewsConfig
from .base import (
    Collectives,
    Distillation,
    DistillationConfig,
    Features,
    Outcome,
    Surroundings,
    at_least_float,
    register,
    require_pairs,
)


class FeatureSearchConfig(DistillationConfig):
    """The head of the searched features, and how sharply they are searched."""

    prototypes: PositiveInt = 1024
    """Outputs K of the head. Every patch of every view has a row of them: keep it small."""
    search_temperature: PositiveFloat = 0.07
    """Of the softmax over the cosine similarities; 0.04 to 0.1: the smaller, the fewer patches are found."""
    freeze_last_layer: int = Field(1, ge=0)
    """Epochs during which the student's prototypes stay fixed."""

    def require(self, views: ViewsConfig) -> None:
        """Two crops."""
        require_pairs("scfs", views)


@register("scfs")
class FeatureSearch(Distillation):
    """Cross-entropy between the teacher's prototype scores of what a patch finds in another view and the student's
    scores of the patch. Letters in shapes, beside base.py's: P patches of a global crop, Q patches of the student's
    view."""

    Config = FeatureSearchConfig
    config: FeatureSearchConfig

    def __init__(self, config: FeatureSearchConfig, around: Surroundings) -> None:
        super().__init__(config, around.image_width)
        self.crops, self.local_crops = around.views.global_crops, around.views.local_crops
        self.center = self.new_center(config.prototypes)

    @property
    def student_views(self) -> Request:
        """Global crops, unmasked, and local crops."""
        return {View.GLOBAL_PLAIN: self.crops, View.LOCAL: self.local_crops}

    @property
    def teacher_views(self) -> Request:
        """Global crops: where the patches search."""
        return {View.GLOBAL_PLAIN: self.crops}

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """Mean of H(q, z) over the patches of a view and the batch, then over the ordered pairs of different views."""
        places = teacher.images[View.GLOBAL_PLAIN][:, :, 1:]
        crops = student.images[View.GLOBAL_PLAIN][:, :, 1:]
        searches = [(crops[v : v + 1], [a for a in range(self.crops) if a != v]) for v in range(self.crops)]
        if View.LOCAL in student.images:
            searches.append((student.images[View.LOCAL][:, :, 1:], list(range(self.crops))))
        with torch.no_grad():
            theirs = teacher.head.last_layer()
        directions, tau = (student.head.last_layer(), theirs), self.teacher_temperature(clock)
        total = sharpness = places.new_zeros((), dtype=torch.float32)
        pairs = 0
        for query, others in searches:
            if not others:
                continue
            found, weights = self.teacher_vectors(teacher, query, places[others], theirs)
            u = student.head.bottleneck(query).expand_as(found)
            count = len(others) * len(query)
            rows = u.flatten(0, -2), found.flatten(0, -2)
            total = total + count * self.cross_entropy(*rows, directions, self.center, tau)
            sharpness = sharpness + count * weights.amax(-1).mean()
            pairs += count
        return Outcome(total / pairs, {"sharpness": sharpness / pairs})

    @torch.no_grad()
    def teacher_vectors(
        self, teacher: Features, query: Tensor, places: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors of what [V, B, Q, D] finds in each of the other views [A, B, P, D]: [A, V, B, Q, d], and the
        search's weights [A, V, B, Q, P]. Feeds the center with their scores on prototypes [K, d]."""
        found, weights = search(query, places, self.config.search_temperature)
        u = teacher.head.bottleneck(found)
        self.center.add_scores(u.flatten(0, -2), directions)
        return u, weights


def search(query: Tensor, places: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What each query finds: f_i = sum_j w_ij t_j with w_ij = softmax_j(cos(s_i, t_j) / temperature).

    query s: [V, B, Q, D]; places t: [A, B, P, D]. Returns f [A, V, B, Q, D], in the dtype of t, and w [A, V, B, Q, P].
    """
    s, t = (F.normalize(at_least_float(x), dim=-1) for x in (query, places))
    weights = (s @ t[:, None].mT / temperature).softmax(-1)
    return weights.to(places.dtype) @ places[:, None], weights
