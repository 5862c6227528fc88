"""`harmony-fast report`: one self-contained HTML page on a run, from its log, its metrics and its newest checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console

from ..harmony.image_encoder import ImageEncoder
from ..harmony.model import Branch, Harmony
from .checkpoint import load_run
from .config import RunConfig, dump_config
from .errors import UserError
from .evaluate import choose_branch
from .report_curves import Entry, loss_panels, objective_name, read_log, run_panels
from .report_html import Child, Markup, lead, page, section, tag
from .report_neighbours import nearest_neighbours, random_levels, zero_shot_examples
from .report_pictures import attention_maps, reconstructions, views_of_samples
from .report_samples import Gallery, HeldOut, gather, licence_note
from .report_summary import facts, metrics_cards, read_metrics


@dataclass
class Run:
    """A run folder, read. What several parts of the page need is made when first asked for."""

    folder: Path
    config: RunConfig
    model: Harmony
    log: list[Entry]
    held: HeldOut

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @cached_property
    def gallery(self) -> Gallery:
        """The samples shown."""
        return gather(self.config, self.held)

    @property
    def branch(self) -> Branch:
        """The branch that is evaluated."""
        return choose_branch(self.config, self.model)

    @property
    def branch_name(self) -> str:
        """In words."""
        return "EMA teacher" if self.branch is self.model.teacher else "student"

    @property
    def image_encoder(self) -> ImageEncoder:
        """Of the evaluated branch; choosing that makes sure that it has one."""
        return self.branch.image


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    A part of the page that this run has nothing for says so in one line. Raises UserError if the folder is not a run.
    """
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with console.status("report: reading the run") as status:
        config, model = load_run(run_dir, "cuda" if torch.cuda.is_available() else "cpu")
        run = Run(run_dir, config, model, read_log(run_dir / "log.jsonl"), HeldOut(config))
        sections = []
        for part in PARTS:
            status.update(f"report: {part.title.lower()}")
            sections.append((part.anchor, part.short, section(part.anchor, part.title, partial(part.build, run))))
        content = page(f"{run.name} · harmony-fast", _header(run), sections, _footer(run))
    path = run_dir / "report.html"
    _write(path, content)
    return path


def _write(path: Path, content: str) -> None:
    """All or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(content, encoding="utf-8", errors="replace")  # JSON labels may hold lone surrogates
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _header(run: Run) -> Markup:
    names = [objective_name(name) for name in run.model.objectives]
    count = f"{len(names)} objectives at once" if len(names) > 1 else "one objective"
    what = f"A run of harmony-fast, trained by {count}: {', '.join(names)}."
    config = tag("details", tag("summary", "Resolved configuration"), tag("pre", dump_config(run.config)))
    return tag("header", tag("h1", run.name), lead(what), facts(run.config, run.model, run.log), config)


def _footer(run: Run) -> Child:
    checkpoint = (run.folder / "checkpoints" / "latest").read_text().strip()
    sources = [*run.config.evaluate.data, *run.config.evaluate.bank]
    pictures = f" Pictures: {', '.join(sources)}." if sources else ""
    return tag("p", f"Made by harmony-fast report from checkpoint {checkpoint}.{pictures}{licence_note(sources)}")


def _metrics(run: Run) -> list[Child]:
    metrics = read_metrics(run.folder)
    text = "Measured by harmony-fast evaluate on held-out samples. The tick on each bar is what guessing would score."
    return [lead(text), metrics_cards(metrics, random_levels(run.config, run.held))]


def _curves(run: Run) -> list[Child]:
    text = "As logged on training batches, before weighting; first logged value → last one."
    return [lead(text), loss_panels(run.log, list(run.model.objectives))]


def _schedules(run: Run) -> list[Child]:
    text = "Schedules, speed, and what the objectives report beside their loss."
    return [lead(text), run_panels(run.log, list(run.model.objectives))]


def _views(run: Run) -> list[Child]:
    text = (
        f"Samples of {run.gallery.source}, drawn by the seed, as the first epoch would cut, augment and mask them. "
        "Violet patches are mask tokens, whose content the student must infer (some crops draw none); hatched patches "
        "are not given to the encoder at all; marked words are masked in the caption."
    )
    return [lead(text), views_of_samples(run.config, run.model, run.gallery)]


def _reconstructions(run: Run) -> list[Child]:
    text = (
        "Crop, what the student sees of it, and what its decoder makes of the rest. The decoder predicts each patch's "
        "pixels standardised; to be seen, they get the true patch's mean and deviation back: brightness and "
        "contrast are given, colour and structure are what is learned. The error is the mean square in standardised "
        "pixels: 1 is no better than a flat patch."
    )
    return [lead(text), reconstructions(run.config, run.model, run.gallery)]


def _attention(run: Run) -> list[Child]:
    encoder = run.image_encoder
    text = (
        f"Where the class token of the {run.branch_name} looks in the last block: the image, the mean over its "
        f"{encoder.config.heads} heads (framed), and each head; from the map's smallest weight (dark) to its largest "
        "(bright)."
    )
    return [lead(text), attention_maps(run.config, encoder, run.gallery)]


def _neighbours(run: Run) -> list[Child]:
    space = "the class token" if run.image_encoder.contrastive_projection is None else "the joint embedding"
    text = (
        f"Queries from evaluate.data (framed, drawn by the seed) and their nearest samples of evaluate.bank by cosine "
        f"similarity of {space}, {run.branch_name}. Green: the same {run.config.evaluate.class_key}. "
        f"Blue: the same {run.config.evaluate.group_key}."
    )
    return [lead(text), nearest_neighbours(run.config, run.branch, run.held)]


def _zero_shot(run: Run) -> list[Child]:
    text = (
        "Held-out images, drawn by the seed, with the names that the model finds most probable among all that occur; "
        "the right one in green."
    )
    return [lead(text), zero_shot_examples(run.config, run.model, run.branch, run.held)]


@dataclass(frozen=True)
class Part:
    """A section of the page. build raises UserError where the run lacks what it needs."""

    anchor: str
    short: str
    title: str
    build: Callable[[Run], Child]


PARTS = (
    Part("metrics", "Metrics", "What was learned", _metrics),
    Part("losses", "Losses", "Losses", _curves),
    Part("zero-shot", "Zero-shot", "Naming images it has never seen", _zero_shot),
    Part("neighbours", "Neighbours", "Nearest neighbours", _neighbours),
    Part("attention", "Attention", "Attention of the class token", _attention),
    Part("reconstructions", "Reconstructions", "Reconstructions", _reconstructions),
    Part("views", "Views", "What the model is given", _views),
    Part("training", "Training", "Schedules and speed", _schedules),
)
