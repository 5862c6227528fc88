"""The model card: what was trained on what, how, with which result, how to load it, and what is not known."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..config import RunConfig, dump_config
from ..evaluate.chance import with_levels
from .source import Exported, Source, shareable_name

LEARNING = ("knn", "linear", "few_shot", "finetune", "segmentation")
"""Tasks that learn from labelled samples."""
PAPER = "https://arxiv.org/abs/2405.14239"


def model_card(source: Source, form: str, made: Exported, weights: Path) -> str:
    """Markdown with the front matter that model hubs read. weights: where the weights file is going to be."""
    places = {"FOLDER": str(weights.parent), "FILE": str(weights)}
    usage = re.sub("FOLDER|FILE", lambda word: places[word[0]], made.usage)  # in one pass: a path may hold these words
    parts = [
        _front_matter(source, made),
        f"# {source.name}",
        _what(source, form),
        f"## Use\n\n```python{usage}```",
        *(f"Note: {note}" for note in made.notes),
        _preprocessing(source.config),
        _training(source),
        _results(source),
        LICENCE,
        "## Configuration\n\n<details><summary>as resolved</summary>\n\n```yaml\n"
        + _shareable(source)
        + "```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


LICENCE = """## Licence and limits

- **Licence of these weights: not chosen yet.** Whoever publishes them fills it in, here and in the first lines of this
  file.
- **Licence of the training data: not known to the software that wrote this card.** Captioned images from the web mostly
  belong to others; what may be done with weights that were trained on them is for the publisher to find out and to
  say.
- A model learns what its data shows, prejudices and errors included. Nothing here was tested for a particular use."""


def _front_matter(source: Source, made: Exported) -> str:
    task = "zero-shot-image-classification" if source.joint else "image-feature-extraction"
    tags = ["harmony", "vit", *source.config.objectives.active()]
    content = {"library_name": made.library, "pipeline_tag": task, "license": "unknown", "tags": tags}
    return "---\n" + yaml.safe_dump(content, sort_keys=False) + "---"


def _what(source: Source, form: str) -> str:
    image, text = source.config.model.image, source.config.model.text
    size = source.config.views.global_size
    towers = (
        f"Image tower: ViT, width {image.width}, depth {image.depth}, {image.heads} heads, patch {image.patch_size}, "
        f"{size} x {size} pixels."
    )
    if source.text is not None and form != "timm":
        towers += (
            f" Text tower: causal transformer, width {text.width}, depth {text.depth}, {text.heads} heads, "
            f"{text.context} tokens."
        )
    which = "EMA teacher" if source.branch == "teacher" else "student"
    return (
        f"The {which} of a run of harmony-fast, which trains [Harmony]({PAPER}) and its relatives, in the format of "
        f"{form}. {towers}"
    )


def _preprocessing(config: RunConfig) -> str:
    augment = config.data.augment
    return (
        f"Images: RGB, shorter side {config.views.global_size} pixels (bicubic), centre crop, from 0 to 1, mean "
        f"{list(augment.mean)}, deviation {list(augment.std)}."
    )


def _training(source: Source) -> str:
    config = source.config
    rows = {
        "objectives": ", ".join(f"{name} (weight {o.weight:g})" for name, o in config.objectives.active().items()),
        "data": ", ".join(map(shareable_name, config.data.sources)),
        "optimizer steps": f"{source.step:,}" if source.step else "not known",
        "samples per step": f"{config.data.batch_size:,}",
        "schedule": f"{config.epochs} epochs",
        "peak learning rate": f"{config.optimizer.lr:g} per 256 samples",
        "precision": config.precision,
        "seed": str(config.seed),
    }
    return "## Recipe and data\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items())


def _results(source: Source) -> str:
    rows = []
    for path, value, level in with_levels(source.metrics):
        task = path.partition("/")[0]
        of = source.about.get(task, {})
        where = [of.get("data", ""), f"learned from {of['bank']}" if "bank" in of and task in LEARNING else ""]
        where.append(of.get("checkpoint", ""))
        name = path.replace("/", " ").replace("_", " ")
        shown = f"{100 * value:.2f}" if isinstance(value, int | float) else str(value)
        guessed = "" if level is None else f"{100 * level:.2f}"
        rows.append(f"| {name} | {shown} | {guessed} | {'; '.join(filter(None, where))} |")
    if not rows:
        return "## Results\n\nNot evaluated: `harmony-fast evaluate` writes the numbers that belong here."
    head = "| | | chance | on |\n|---|---|---|---|\n"
    return f"## Results\n\nBy `harmony-fast evaluate`, in percent.\n\n{head}" + "\n".join(rows)


def _shareable(source: Source) -> str:
    """The configuration without the places of files."""
    return dump_config(source.shareable())
