"""What the embedding has learned: nearest neighbours across data sets, and zero-shot classification."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..harmony.model import Branch, Harmony
from .config import RunConfig
from .data.labelled import LabelledSample
from .errors import UserError
from .evaluate import labels
from .evaluate.features import class_tokens, image_embeddings, text_embeddings
from .evaluate.zero_shot import class_weights
from .report_html import SHOWN_SIDE, Child, Markup, foreign, picture, tag
from .report_samples import COUNT, HeldOut, display_name, pick

NEIGHBOURS = 6
CLASSES = 5
"""Class names listed for a query."""
BANK_LIMIT = 4096
"""Largest part of the bank that is searched: a report is a look, not a measurement."""


@dataclass(frozen=True)
class Comparison:
    """How a neighbour relates to the query."""

    label: str
    class_: str


SAME, RELATED, OTHER = Comparison("same", "same"), Comparison("related", "related"), Comparison("", "other")


def nearest_neighbours(config: RunConfig, branch: Branch, held: HeldOut) -> Markup:
    """A few queries, each with its nearest samples of the bank by cosine similarity."""
    queries, bank = choose_queries(config, held)
    similarity = embeddings(branch, queries, config) @ embeddings(branch, bank, config).T
    cards = []
    for query, row in zip(queries, similarity, strict=True):
        order = row.argsort(descending=True, stable=True).tolist()
        found = [_neighbour(config, query, bank[j], float(row[j])) for j in order[:NEIGHBOURS]]
        place = next((n for n, j in enumerate(order) if compare(config, query, bank[j]) is SAME), None)
        beyond = None if place is None or place < NEIGHBOURS else f"the same one is nearest no. {place + 1:,}"
        name = tag("p", foreign(display_name(query, config)), tag("span", beyond, class_="aside"), class_="caption")
        shown = [tag("figure", _thumbnail(query.image), class_="query"), found]
        cards.append(tag("article", name, tag("div", shown, class_="strip"), class_="card"))
    return tag("div", cards, class_="cards wide")


def choose_queries(config: RunConfig, held: HeldOut) -> tuple[list[LabelledSample], list[LabelledSample]]:
    """Queries drawn by the seed, those first whose counterpart is in the bank; and the bank, bounded but with those."""
    known = {sample.key for sample in held.bank}
    paired = [sample for sample in held.queries if sample.key in known] or held.queries
    queries = [paired[i] for i in pick(len(paired), COUNT, config.seed)]
    keys = {sample.key for sample in queries}
    ordered = sorted(held.bank, key=lambda sample: sample.key not in keys)  # stable: counterparts, then the rest
    return queries, ordered[:BANK_LIMIT]


def compare(config: RunConfig, query: LabelledSample, other: LabelledSample) -> Comparison:
    """Same concept (key or class), same group, or neither."""

    def agree(key: str) -> bool:
        return key in query.labels and query.labels[key] == other.labels.get(key)

    if query.key == other.key or agree(config.evaluate.class_key):
        return SAME
    return RELATED if agree(config.evaluate.group_key) else OTHER


def _neighbour(config: RunConfig, query: LabelledSample, other: LabelledSample, similarity: float) -> Markup:
    relation = compare(config, query, other)
    name = foreign(display_name(other, config))
    score = tag("span", f"{similarity:.2f}".replace("-", "−"), class_="score")
    return tag("figure", _thumbnail(other.image), tag("figcaption", name, score), class_=relation.class_)


def embeddings(branch: Branch, samples: list[LabelledSample], config: RunConfig) -> Tensor:
    """Unit vectors on the host [n, .]: in the joint space where there is one, else of the class token."""
    tokens = class_tokens(branch, samples, config)
    if branch.image.contrastive_projection is None:
        return F.normalize(tokens, dim=-1)
    return image_embeddings(branch, tokens)


def zero_shot_examples(config: RunConfig, model: Harmony, branch: Branch, held: HeldOut) -> Markup:
    """A few queries with their most probable class names."""
    if "contrastive" not in model.objectives or branch.text is None or branch.image.contrastive_projection is None:
        raise UserError("this run has no contrastive objective, so no names to compare images with")
    names = labels(held.queries, config.evaluate.class_key)
    places = pick(len(names), COUNT, config.seed)
    queries = [held.queries[i] for i in places]
    classes = list(dict.fromkeys(names))
    weights = class_weights(partial(text_embeddings, branch, config=config), classes, config.evaluate.templates)
    images = image_embeddings(branch, class_tokens(branch, queries, config))
    scale = float(model.objectives["contrastive"].logit_scale.detach().exp())
    probabilities = (scale * images @ weights.T).softmax(-1)
    cards = [_answer(q, names[i], classes, row) for q, i, row in zip(queries, places, probabilities, strict=True)]
    return tag("div", cards, class_="cards")


def _answer(query: LabelledSample, truth: str, classes: list[str], probabilities: Tensor) -> Markup:
    """One query with bars, and the place of the right name if it is not among them."""
    order = probabilities.argsort(descending=True, stable=True).tolist()
    bars = [_bar(classes[j], float(probabilities[j]), classes[j] == truth) for j in order[:CLASSES]]
    place = order.index(classes.index(truth))
    if place >= CLASSES:
        bars.append(tag("p", f"right name: no. {place + 1:,} of {len(classes):,}", class_="aside"))
    right = tag("p", foreign(truth), class_="caption")
    content = tag("div", tag("figure", _thumbnail(query.image)), tag("div", bars, class_="bars"), class_="answer")
    return tag("article", right, content, class_="card")


def _bar(name: str, probability: float, right: bool) -> Markup:
    fill = tag("span", style=f"width:{100 * probability:.1f}%", class_="fill")
    percent = f"{100 * probability:.0f} %" if probability >= 0.01 else "< 1 %"
    return tag("div", fill, tag("span", foreign(name), class_="name"), tag("span", percent, class_="value"),
               class_="bar right" if right else "bar")  # fmt: skip


def _thumbnail(image: Image.Image) -> Child:
    """The image within a square of the shown size, twice as fine for screens with small pixels."""
    small = image.copy()
    small.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
    return picture(np.asarray(small), class_="thumbnail")


def random_levels(config: RunConfig, held: HeldOut) -> dict[str, float]:
    """What guessing would score, by the metric's path, for the held-out samples of this run.

    Nearest neighbours: the chance that a random sample of the bank has the query's group.
    """
    levels: dict[str, float] = {}
    evaluate = config.evaluate
    with suppress(UserError):
        count = len(held.queries)
        for direction in ("image_to_text", "text_to_image"):
            levels.update({f"retrieval/{direction}/r{k}": min(k / count, 1.0) for k in (1, 5, 10)})
    with suppress(UserError):
        classes = len(set(labels(held.queries, evaluate.class_key)))
        levels.update({f"zero_shot/top{k}": min(k / classes, 1.0) for k in (1, 10)})
    with suppress(UserError):
        groups = labels(held.queries, evaluate.group_key), labels(held.bank, evaluate.group_key)
        levels["knn/top1"] = _agreement(*groups)
    return levels


def _agreement(left: list[str], right: list[str]) -> float:
    """The chance that a random label of the one equals a random label of the other."""
    here, there = Counter(left), Counter(right)
    return sum(here[name] * there[name] for name in here) / (len(left) * len(right))
