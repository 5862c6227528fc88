"""Masked-word prediction on captions (MLM; Harmony, section 3.3)."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt

from ..heads import WordDecoder
from ..schedules import Clock
from ..views import Request, View, Views
from .base import Collectives, Features, Objective, ObjectiveConfig, Outcome, Surroundings, at_least_float, register


class MaskedLanguageConfig(ObjectiveConfig):
    """Size of the decoder, which is as wide as the text encoder."""

    depth: PositiveInt = 4
    """Transformer blocks of the decoder."""


@register("masked_language")
class MaskedLanguage(Objective):
    """Mean cross-entropy of the masked words of the global batch, predicted from their left context."""

    Config = MaskedLanguageConfig

    def __init__(self, config: MaskedLanguageConfig, around: Surroundings) -> None:
        super().__init__(config)
        self.decoder = WordDecoder(around.text_width, config.depth, around.text_heads, around.vocabulary + 1)

    @property
    def student_views(self) -> Request:
        """The masked caption."""
        return {View.CAPTION_MASKED: 1}

    def forward(
        self, student: Features, teacher: Features, views: Views, clock: Clock, collectives: Collectives
    ) -> Outcome:
        """The teacher is not asked. Without a masked word the loss is 0."""
        caption, index = student.captions[View.CAPTION_MASKED], views.caption_index
        context = views.tokens.shape[1]
        logits = at_least_float(self.decoder(caption.tokens, caption.layout, caption.places(index, context)))
        words = views.tokens.flatten()[index]
        count = collectives.sum(views.masked_words) / collectives.world_size  # a micro-batch's share may be below 1
        loss = F.cross_entropy(logits, words, reduction="sum") / count.where(count > 0, 1.0)
        accuracy = (logits.detach().argmax(-1) == words).sum() / max(len(index), 1)
        return Outcome(loss, {"accuracy": accuracy})
