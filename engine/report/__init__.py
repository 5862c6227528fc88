"""`harmony-fast report`: one self-contained HTML page on one run or several, from their folders alone.

A part that does not belong to a run (reconstructions without MAE) is left out; one that misses something (a checkpoint,
data) says so in a line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from ..errors import UserError
from .curves import objective_name
from .markup import Child, Markup, Section, absent, attempt, lead, page, run_name, tag
from .metrics import measured
from .neighbours import images_and_captions, names_of_images, nearest_images
from .patches import attention_maps, patch_colours
from .reconstructions import reconstructions
from .run import Run, read_runs
from .samples import licence_note
from .summary import facts, overview
from .targets import has_soft_targets, soft_targets
from .training import losses, others, planned, speed
from .views import views_of_samples


def write_report(*folders: Path, out: Path | None = None) -> Path:
    """Write the page on these run folders and return its path.

    out: by default `report.html` in the run folder, of several runs in the folder that holds them all. Raises UserError
    if a folder is not a run, or nothing can be written.
    """
    runs = read_runs(list(dict.fromkeys(folders)))
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    with console.status("report: reading") as status:
        sections = [*_numbers(runs), *_pictures(runs, status)]
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
        content = page(f"{title} · harmony-fast", _header(runs), sections, _footer(runs), [run.name for run in runs])
    path = out or Path(os.path.commonpath([folder.absolute() for folder in folders])) / "report.html"
    if out is None and len(runs) == 1:
        path = runs[0].folder / "report.html"
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


def _header(runs: list[Run]) -> Markup:
    if len(runs) > 1:
        title = f"{len(runs)} runs side by side"
        same = "Numbers of all runs over the same axes; of the pictures, choose below whose are shown."
        return tag("header", tag("h1", title), lead(same), overview(runs))
    names = [objective_name(name) for name in runs[0].objectives]
    count = f"{len(names)} objectives at once" if len(names) > 1 else "one objective"
    what = f"A run of harmony-fast, trained by {count}: {', '.join(names)}."
    return tag("header", tag("h1", runs[0].name), lead(what), facts(runs[0]))


def _footer(runs: list[Run]) -> Child:
    sources = list(dict.fromkeys(s for run in runs for s in [*run.config.evaluate.data, *run.config.evaluate.bank]))
    pictures = f" Pictures: {', '.join(sources)}." if sources else ""
    checkpoints = [f"{run.name} ({run.checkpoint})" for run in runs]
    return tag("p", f"Made by harmony-fast report from: {', '.join(checkpoints)}.{pictures}{licence_note(sources)}")


def _numbers(runs: list[Run]) -> list[Section]:
    """The parts that show all runs together."""
    smooth = "thin lines as logged, thick ones smoothed over a tenth of the curve"
    several = "; by run, with the last value" if len(runs) > 1 else "; first logged value → last one"
    leads = {
        "metrics": "Measured by harmony-fast evaluate on held-out samples. "
        + ("The tick on each bar is what guessing would score." if len(runs) == 1 else "The best of each in bold."),
        "losses": f"On training batches, before weighting: {smooth}{several}.",
        "schedules": "What follows from the step alone. Faint: still to come.",
        "speed": "As logged. Memory: at the fullest moment so far.",
        "others": f"What the objectives and the optimizer report beside the losses: {smooth}.",
    }
    parts = [
        ("metrics", "Metrics", "What was learned", measured),
        ("losses", "Losses", "Learning curves", losses),
        ("schedules", "Schedules", "Schedules", planned),
        ("speed", "Speed", "Speed and memory", speed),
        ("others", "More curves", "Beside the losses", others),
    ]
    return [
        Section(anchor, short, title, [lead(leads[anchor]), attempt(partial(build, runs))])
        for anchor, short, title, build in parts
    ]


@dataclass(frozen=True)
class Part:
    """Pictures of one run. build raises UserError where the run lacks something that it could have."""

    anchor: str
    short: str
    title: str
    explain: Callable[[Run], str]
    build: Callable[[Run], Child]
    fits: Callable[[Run], bool]
    """Whether a run of these objectives can have it at all."""


def _pictures(runs: list[Run], status: Status) -> list[Section]:
    """The parts with pictures: of several runs one at a time is shown."""
    found: dict[str, list[tuple[Run, Child]]] = {part.anchor: [] for part in PARTS}
    for run in runs:
        said: set[str] = set()
        for part in (part for part in PARTS if part.fits(run)):
            status.update(f"report: {run.name}: {part.title.lower()}")
            try:
                content: Child = [part.build(run)]
                found[part.anchor].append((run, [lead(part.explain(run)), content]))
            except UserError as error:
                if str(error) not in said:  # once is enough for what all parts miss
                    found[part.anchor].append((run, absent(error)))
                said.add(str(error))
        run.forget_weights()
    return [
        Section(part.anchor, part.short, part.title, _by_run(runs, found[part.anchor]))
        for part in PARTS
        if found[part.anchor]
    ]


def _by_run(runs: list[Run], found: list[tuple[Run, Child]]) -> Child:
    if len(runs) == 1:
        return found[0][1]
    contents = {run.place: content for run, content in found}
    nothing = tag("p", "Nothing to show of this run.", class_="absent")
    return [
        tag("div", tag("h3", run_name(run.name, run.place), class_="group"), contents.get(run.place, nothing),
            class_=f"of of-{run.place}")
        for run in runs
    ]  # fmt: skip


def _explain_views(run: Run) -> str:
    return (
        f"Samples of {run.gallery.source}, drawn by the seed, as the first epoch would cut, augment and mask them. "
        "Violet patches are mask tokens, whose content the student must infer (some crops draw none); hatched patches "
        "are not given to the encoder at all; marked words are masked in the caption."
    )


def _explain_reconstructions(_: Run) -> str:
    return (
        "Crop, what the student sees of it, and what its decoder makes of the rest. The decoder predicts each patch's "
        "pixels standardised; to be seen, they get the true patch's mean and deviation back: brightness and "
        "contrast are given, colour and structure are what is learned. The error is the mean square in standardised "
        "pixels: 1 is no better than a flat patch."
    )


def _explain_attention(run: Run) -> str:
    return (
        f"Where the class token of the {run.branch_name} looks in the last block: the image, the mean over its "
        f"{run.image_encoder.config.heads} heads (framed), and each head; from the map's smallest weight (dark) to its "
        "largest (bright)."
    )


def _explain_patches(run: Run) -> str:
    return (
        f"Patch tokens of the {run.branch_name}: the first principal component of what varies within these "
        "images parts foreground from background (darkened); the first three of the foreground are shown as red, "
        "green and blue. The same colour means a similar token, in every image."
    )


def _explain_neighbours(run: Run) -> str:
    space = "the class token" if run.image_encoder.contrastive_projection is None else "the joint embedding"
    return (
        f"Queries (framed, drawn by the seed) and the nearest other images by cosine similarity of {space}, "
        f"{run.branch_name}. Same: the same {run.config.evaluate.class_key}; related: the same "
        f"{run.config.evaluate.group_key}."
    )


def _explain_pairs(run: Run) -> str:
    return (
        f"Samples of {run.held.pool[0]}, drawn by the seed, and what the {run.branch_name} finds nearest by cosine "
        "similarity in the joint embedding; a sample's own caption or image is marked."
    )


def _explain_names(_: Run) -> str:
    return (
        "Held-out images, drawn by the seed, with the names that the model finds most probable among all that occur; "
        "the right one is marked."
    )


def _explain_targets(run: Run) -> str:
    return (
        "What the teacher asks the student to predict: not one right answer, the diagonal, but how well each would fit."
    )


def _sees(run: Run) -> bool:
    return run.outline.student.image is not None


def _pairs(run: Run) -> bool:
    return "contrastive" in run.objectives


PARTS = (
    Part("names", "Names", "Naming images it has never seen", _explain_names, names_of_images,
         lambda run: _pairs(run) and bool(run.config.evaluate.data)),
    Part("pairs", "Images and captions", "From images to captions and back", _explain_pairs, images_and_captions,
         _pairs),
    Part("neighbours", "Neighbours", "Nearest images", _explain_neighbours, nearest_images, _sees),
    Part("patches", "Patches", "Patches as colours", _explain_patches, patch_colours, _sees),
    Part("attention", "Attention", "Attention of the class token", _explain_attention, attention_maps, _sees),
    Part("reconstructions", "Reconstructions", "Reconstructions", _explain_reconstructions, reconstructions,
         lambda run: "reconstruction" in run.objectives),
    Part("targets", "Soft targets", "Soft targets of the teacher", _explain_targets, soft_targets,
         has_soft_targets),
    Part("views", "Views", "What the model is given", _explain_views, views_of_samples, lambda run: True),
)  # fmt: skip
