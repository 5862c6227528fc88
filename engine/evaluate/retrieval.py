"""Image-text retrieval: recall at 1, 5 and 10 in both directions, with one caption or several for an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chance import CHANCE
from .ranking import chance_within, ranks_of_best, share_within

ROWS = 1024
"""Queries compared at once."""
KS = (1, 5, 10)


def retrieval(
    images: Tensor, texts: Tensor, captions: list[str], owners: list[int] | None = None, own_only: bool = False
) -> dict[str, dict[str, Any]]:
    """Share of queries with a right answer among the first k, both ways; and what guessing would score.

    images, texts: unit vectors [n, E] and [m, E]; captions: the m texts; owners: the image of each (None: text i is of
    image i). Equal captions answer each other's images, unless own_only: then only an image's own do (as papers on
    COCO and Flickr30k count).
    """
    owner = torch.arange(len(images)) if owners is None else torch.tensor(owners)
    places = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    text = torch.arange(len(captions)) if own_only else torch.tensor([places[caption] for caption in captions])
    # Which texts (counted once where they are equal) each image has.
    has = torch.zeros(len(images), int(text.max()) + 1, dtype=torch.bool)
    has[owner, text] = True
    to_text = [
        ranks_of_best(images[rows] @ texts.T, has[rows][:, text]) for rows in torch.arange(len(images)).split(ROWS)
    ]
    to_image = [
        ranks_of_best(texts[rows] @ images.T, has[:, text[rows]].T) for rows in torch.arange(len(texts)).split(ROWS)
    ]
    ranks = {"image_to_text": torch.cat(to_text), "text_to_image": torch.cat(to_image)}
    found: dict[str, dict[str, Any]] = {name: {f"r{k}": share_within(r, k) for k in KS} for name, r in ranks.items()}
    image, caption = has.nonzero().T
    right_texts = torch.zeros(len(images), dtype=torch.int64).index_add_(0, image, text.bincount()[caption])
    right = {"image_to_text": (right_texts, len(texts)), "text_to_image": (has.sum(0)[text], len(images))}
    found[CHANCE] = {name: {f"r{k}": chance_within(*of, k) for k in KS} for name, of in right.items()}
    return found
