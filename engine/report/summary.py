"""What was run: the facts of one run, or several runs side by side with what makes them different."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from torch import nn

from ..config import dump_config
from ..evaluated import known_metrics
from ..nested import dotted
from .curves import number, objective_name, series
from .markup import Child, Markup, foreign, run_name, tag
from .run import Run


def facts(run: Run) -> Markup:
    """What a reader wants to know first of one run. What the run folder does not tell is left out."""
    config, student = run.config, run.outline.student
    image, text, views = config.model.image, config.model.text, config.views
    known = {"Status": status(run), **progress(run)}
    if student.image is not None:
        size = f"width {image.width}, depth {image.depth}, {image.heads} heads, patch {image.patch_size}"
        known["Image tower"] = f"{image.name or 'ViT'}: {size}; {millions(student.image)}"
        known["Crops"] = f"{views.global_crops} × {views.global_size} px, {views.local_crops} × {views.local_size} px"
    if student.text is not None:
        size = f"width {text.width}, depth {text.depth}, context {text.context}"
        known["Text tower"] = f"{size}; {millions(student.text)}"
    known["Heads and decoders"] = millions(student.heads, run.outline.objectives)
    more = f" and {len(config.data.sources) - 1} more" if len(config.data.sources) > 1 else ""
    count = f", {run.samples:,} samples" if run.samples else ""
    known["Data"] = Path(config.data.sources[0]).name + more + count
    known["Batch and precision"] = f"{config.data.batch_size}, {config.precision}, ZeRO stage {config.zero.stage}"
    rows = [tag("div", tag("dt", key), tag("dd", value)) for key, value in known.items()]
    config_text = tag("details", tag("summary", "Resolved configuration"), tag("pre", dump_config(config)))
    return tag("div", tag("dl", rows), config_text)


def overview(runs: list[Run]) -> Child:
    """One row per run, and the configuration keys in which they differ."""
    head = ("Run", "Objectives", "Parameters", "Status", "Steps", "Samples seen", "Samples/s", "Time")
    rows = []
    for run in runs:
        done = progress(run)
        names = ", ".join(objective_name(name) for name in run.objectives)
        cells = [names, millions(run.outline.student, run.outline.objectives).removesuffix(" parameters"), status(run)]
        cells += [done.get(key, "") for key in ("Steps", "Samples seen", "Samples per second", "Training time")]
        rows.append([tag("th", run_name(run.name, run.place), scope="row"), *(tag("td", cell) for cell in cells)])
    return [table(head, rows), differing_keys(runs)]


def differing_keys(runs: list[Run]) -> Markup | None:
    """A table of the configuration keys in which the runs differ."""
    settings = [dotted(run.config.model_dump(mode="json", by_alias=True)) for run in runs]
    keys = [key for key in dict.fromkeys(k for s in settings for k in s) if key != "run_dir"]
    differing = [key for key in keys if len({repr(s.get(key)) for s in settings}) > 1]
    if not differing:
        return None
    head = ("Key", *(run_name(run.name, run.place) for run in runs))
    rows = [
        [tag("th", tag("code", key), scope="row"), *(tag("td", foreign(s[key]) if key in s else "–") for s in settings)]
        for key in differing
    ]
    title = tag("summary", f"What differs between the configurations: {len(differing)} keys")
    return tag("details", title, table(head, rows))


def table(head: tuple[Child, ...], rows: list[list[Markup]]) -> Markup:
    """A table that scrolls by itself where it is wider than the page."""
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head]))
    body = tag("tbody", [tag("tr", row) for row in rows])
    return tag("div", tag("table", top, body), class_="scroll", tabindex=0)


def status(run: Run) -> str:
    """Whether it came to its end. A run that went back and came past the step where it had diverged is well."""
    if run.finished:
        return "finished"
    if (step := diverged_at(run.folder)) is not None and run.steps <= step:
        return "diverged: its loss or gradient was not finite"
    if not run.log:
        return "nothing logged yet"
    if run.total_steps is None:
        counted = run.config.data.loader == "webdataset"
        return f"length unknown: {'data.samples is not set' if counted else 'its training data are gone'}"
    return "finished" if run.steps >= run.total_steps else f"{100 * run.steps / run.total_steps:.0f} % done"


def diverged_at(folder: Path) -> float | None:
    """The last step at which a run diverged, from what its ranks have written of that; None if it never did."""
    reports = map(known_metrics, folder.glob("diverged-rank-*.json"))
    return max((report.get("step", math.inf) for report in reports), default=None)


def progress(run: Run) -> dict[str, str]:
    """How far the run got, and how fast."""
    if not run.log:
        return {}
    batch, of = run.config.data.batch_size, f" of {run.total_steps:,}" if run.total_steps else ""
    known = {"Steps": f"{run.steps:,}{of}", "Samples seen": f"{run.steps * batch:,}"}
    speed = series(run.log, "samples_per_second")
    if speed.values:
        # Each logged rate holds for the steps since the entry before it.
        steps = [b - a for a, b in zip([0.0, *speed.steps[:-1]], speed.steps, strict=True)]
        seconds = sum(n * batch / rate for n, rate in zip(steps, speed.values, strict=True) if rate > 0)
        known["Samples per second"] = number(statistics.median(speed.values))
        known["Training time"] = duration(seconds)
    return known


def millions(*modules: nn.Module) -> str:
    """How many parameters they have, in words."""
    count = sum(p.numel() for module in modules for p in module.parameters())
    return f"{count / 1e6:.3g} M parameters" if count >= 1e5 else f"{count:,} parameters"


def duration(seconds: float) -> str:
    """In two units."""
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600:,} h {int(seconds) % 3600 // 60} min"
