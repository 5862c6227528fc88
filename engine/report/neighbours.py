"""What the embedding has learned: nearest images, captions of images and images of captions, names of images."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...harmony.model import Branch
from ...harmony.objectives.contrastive import Contrastive
from ..config import RunConfig
from ..data.labelled import LabelledSample
from ..errors import UserError
from ..evaluate.classes import class_names
from ..evaluate.features import class_tokens, image_embeddings, image_tower, text_embeddings
from ..evaluate.zero_shot import class_weights
from .markup import SHOWN_SIDE, Child, Markup, foreign, picture, tag
from .run import Run
from .samples import display_name, pick, sample_labels

NEIGHBOURS = 6
ANSWERS = 5
"""Names or captions listed for an image."""
SEARCHED = 2048
"""Samples searched at most: a report is a look, not a measurement."""


@dataclass(frozen=True)
class Comparison:
    """How a neighbour relates to the query."""

    label: str
    class_: str


SAME, RELATED, OTHER = Comparison("same", "same"), Comparison("related", "related"), Comparison("", "other")


def nearest_images(run: Run) -> Markup:
    """A few queries, each with its nearest other images by cosine similarity."""
    queries, bank = choose_queries(run)
    similarity = embeddings(run.branch, queries, run.config) @ embeddings(run.branch, bank, run.config).T
    cards = []
    for query, row in zip(queries, similarity, strict=True):
        order = [j for j in row.argsort(descending=True, stable=True).tolist() if bank[j] is not query]
        found = [_neighbour(run.config, query, bank[j], float(row[j])) for j in order[:NEIGHBOURS]]
        place = next((n for n, j in enumerate(order) if compare(run.config, query, bank[j]) is SAME), None)
        beyond = None if place is None or place < NEIGHBOURS else f"the same one is nearest no. {place + 1:,}"
        cards.append(_row(display_name(query, run.config), beyond, thumbnail(query, run.config), found))
    return tag("div", cards, class_="cards wide")


def choose_queries(run: Run) -> tuple[list[LabelledSample], list[LabelledSample]]:
    """Queries drawn by the seed, and the samples searched: of `evaluate.bank`, or else of where the queries are from.

    Queries are samples that the bank has one of the same for, if there are any; the bank is bounded, but keeps those.
    """
    config = run.config
    samples = bank = run.held.pool[1]
    with suppress(UserError):
        bank = run.held.bank
    known = {concept(config, sample) for sample in bank}
    paired = [sample for sample in samples if concept(config, sample) in known] or samples
    queries = [paired[i] for i in pick(len(paired), run.count, config.seed)]
    asked = {concept(config, sample) for sample in queries}
    ordered = sorted(bank, key=lambda sample: concept(config, sample) not in asked)  # stable: those, then the rest
    return queries, ordered[:SEARCHED]


def concept(config: RunConfig, sample: LabelledSample) -> tuple[str, str]:
    """What it shows: its class or, where that is not known, its key: sets that number their samples have keys in
    common which mean nothing."""
    label = sample.labels.get(config.evaluate.class_key)
    return ("key", sample.key) if label is None else ("class", str(label))


def compare(config: RunConfig, query: LabelledSample, other: LabelledSample) -> Comparison:
    """Same concept, same group, or neither."""
    if concept(config, query) == concept(config, other):
        return SAME
    group = query.labels.get(config.evaluate.group_key)
    return RELATED if group is not None and group == other.labels.get(config.evaluate.group_key) else OTHER


def _neighbour(config: RunConfig, query: LabelledSample, other: LabelledSample, similarity: float) -> Markup:
    relation = compare(config, query, other)
    name = foreign(display_name(other, config))
    score = tag("span", f"{similarity:.2f}".replace("-", "−"), class_="score")
    note = tag("span", relation.label, class_="relation") if relation.label else None
    return tag("figure", thumbnail(other, config), tag("figcaption", name, score, note), class_=relation.class_)


def embeddings(branch: Branch, samples: list[LabelledSample], config: RunConfig) -> Tensor:
    """Unit vectors on the host [n, .]: in the joint space where there is one, else of the class token."""
    tokens = class_tokens(branch, samples, config)
    if image_tower(branch).contrastive_projection is None:
        return F.normalize(tokens, dim=-1)
    return image_embeddings(branch, tokens)


def images_and_captions(run: Run) -> Child:
    """A few samples: the captions nearest to each image, then the images nearest to each caption."""
    config, branch = run.config, run.branch
    samples = run.held.pool[1]
    chosen = pick(len(samples), run.count, config.seed)
    searched = [samples[i] for i in sorted({*range(min(SEARCHED, len(samples))), *chosen})]
    places = [next(n for n, sample in enumerate(searched) if sample is samples[i]) for i in chosen]
    images = image_embeddings(branch, class_tokens(branch, searched, config))
    texts = text_embeddings(branch, [sample.caption for sample in searched], config)
    to_captions = [_captions_of(run, searched, place, texts @ images[place]) for place in places]
    to_images = [_images_of(run, searched, place, images @ texts[place]) for place in places]
    return [
        tag("h3", f"From an image to {len(searched):,} captions", class_="group"),
        tag("div", to_captions, class_="cards"),
        tag("h3", f"From a caption to {len(searched):,} images", class_="group"),
        tag("div", to_images, class_="cards wide"),
    ]


def _captions_of(run: Run, samples: list[LabelledSample], place: int, scores: Tensor) -> Markup:
    """An image with the captions nearest to it; equal captions of other samples are right as well."""
    truth, captions = samples[place].caption, [sample.caption for sample in samples]
    order = list(dict.fromkeys(captions[j] for j in scores.argsort(descending=True, stable=True).tolist()))
    best = {caption: float(scores[captions.index(caption)]) for caption in order[:ANSWERS]}
    bars = [bar(caption, f"{score:.2f}", max(score, 0), caption == truth) for caption, score in best.items()]
    return answer(display_name(samples[place], run.config), thumbnail(samples[place], run.config), bars,
                  order.index(truth), len(order), "caption")  # fmt: skip


def _images_of(run: Run, samples: list[LabelledSample], place: int, scores: Tensor) -> Markup:
    """A caption with the images nearest to it."""
    query, order = samples[place], scores.argsort(descending=True, stable=True).tolist()
    right = [samples[j].caption == query.caption for j in order]
    found = []
    for j, own in list(zip(order, right, strict=True))[:NEIGHBOURS]:
        score = tag("span", f"{float(scores[j]):.2f}".replace("-", "−"), class_="score")
        note = tag("span", "its own", class_="relation") if own else None
        name = foreign(display_name(samples[j], run.config))
        picture = thumbnail(samples[j], run.config)
        found.append(tag("figure", picture, tag("figcaption", name, score, note), class_="same" if own else "other"))
    rank = right.index(True)
    return _row(query.caption, f"its own image is no. {rank + 1:,}" if rank >= NEIGHBOURS else None, None, found)


def names_of_images(run: Run) -> Markup:
    """A few held-out images with their most probable class names."""
    config, held, branch = run.config, run.held, run.branch
    labels = sample_labels(held.queries, config.evaluate.class_key)
    by_label = class_names(held.classes, config.evaluate.classes)
    names = list(dict.fromkeys(by_label[label] for label in labels))
    places = pick(len(labels), run.count, config.seed)
    weights = class_weights(partial(text_embeddings, branch, config=config), names, config.evaluate.templates)
    images = image_embeddings(branch, class_tokens(branch, [held.queries[i] for i in places], config))
    contrastive = cast(Contrastive, run.model.objectives["contrastive"])
    scale = float(contrastive.logit_scale.detach().exp())
    cards = []
    for i, row in zip(places, (scale * images @ weights.T).softmax(-1), strict=True):
        truth, order = names.index(by_label[labels[i]]), row.argsort(descending=True, stable=True).tolist()
        bars = [bar(names[j], _percent(float(row[j])), float(row[j]), j == truth) for j in order[:ANSWERS]]
        thumb = thumbnail(held.queries[i], config)
        cards.append(answer(names[truth], thumb, bars, order.index(truth), len(names), "name"))
    return tag("div", cards, class_="cards")


def answer(title: str, image: Child, bars: list[Markup], rank: int, of: int, what: str) -> Markup:
    """An image with its best answers, and the place of the right one if it is not among them."""
    if rank >= ANSWERS:
        bars = [*bars, tag("p", f"right {what}: no. {rank + 1:,} of {of:,}", class_="aside")]
    content = tag("div", tag("figure", image), tag("div", bars, class_="bars"), class_="answer")
    return tag("article", tag("p", foreign(title), class_="caption"), content, class_="card")


def bar(name: str, value: str, share: float, right: bool) -> Markup:
    """An answer over a bar as long as its share."""
    fill = tag("span", style=f"width:{100 * share:.1f}%", class_="fill")
    mark = tag("span", "✓ ", aria_label="right") if right else None
    return tag("div", fill, tag("span", mark, foreign(name), class_="name"), tag("span", value, class_="value"),
               class_="bar right" if right else "bar")  # fmt: skip


def _row(title: str, aside: str | None, query: Child, found: list[Markup]) -> Markup:
    """A query and what was found for it."""
    name = tag("p", foreign(title), tag("span", aside, class_="aside") if aside else None, class_="caption")
    first = tag("figure", query, class_="query") if query else None
    return tag("article", name, tag("div", first, found, class_="strip"), class_="card")


def _percent(probability: float) -> str:
    return f"{100 * probability:.0f} %" if probability >= 0.01 else "< 1 %"


def thumbnail(sample: LabelledSample, config: RunConfig) -> Markup:
    """The image within a square of the shown size, twice as fine for screens with small pixels."""
    small: Image.Image = sample.image.copy()
    small.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
    return picture(np.asarray(small), display_name(sample, config), class_="thumbnail")
