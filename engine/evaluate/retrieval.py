"""Image-text retrieval: recall at 1, 5 and 10 in both directions."""

from __future__ import annotations

from torch import Tensor

from .ranking import ranks_of_best, same, share_within


def retrieval(images: Tensor, texts: Tensor, captions: list[str]) -> dict[str, dict[str, float]]:
    """images, texts: unit vectors [n, E], row i from sample i. Samples with equal captions answer each other."""
    scores, correct = images @ texts.T, same(captions, captions)
    directions = {"image_to_text": scores, "text_to_image": scores.T}
    ranks = {name: ranks_of_best(matrix, correct) for name, matrix in directions.items()}
    return {name: {f"r{k}": share_within(r, k) for k in (1, 5, 10)} for name, r in ranks.items()}
