"""Our schedules and block masks against a JSON file of the authors' ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from golden_file import Report, decay_and_momentum, hard_labels, mask_ratio, temperatures
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.optimizer import scalars_at
from harmony_fast.harmony.model import Harmony
from harmony_fast.harmony.schedules import Clock
from harmony_fast.harmony.views import block_masks, pixel_ratio


def check_schedules(path: Path) -> int:
    """Every array of a schedules file at every iteration; returns how many fail."""
    content, report = json.loads(path.read_text()), Report("schedule")
    for i, entry in enumerate(content.get("schedules", [])):
        for name, error in schedule_errors(entry):
            report.line(f"{i}.{name}", error, 1e-9)
    for i, entry in enumerate(content.get("block_masks", [])):
        for name, error, tolerance in mask_errors(entry):
            report.line(f"block_masks.{i}.{name}", error, tolerance)
    for name in content:
        if name not in ("schedules", "block_masks"):
            report.unchecked(name)
    return report.failed


def schedule_errors(entry: dict) -> Iterator[tuple[str, float]]:
    """The largest relative error of each array."""
    s = entry["settings"]
    small = {"prototypes": 8, "hidden": 8, "bottleneck": 8}
    raw = {
        "reference_compat": True, "epochs": s["epochs"],
        "data": {"train": "none.beton", "batch_size": s["batch_per_gpu"] * s["world_size"]},
        "model": {"image": {"width": 16, "depth": 1, "heads": 1, "patch_size": 8},
                  "text": {"width": 16, "depth": 1, "heads": 1, "context": 8, "vocabulary": 16}},
        "views": {"global_size": 16, "local_size": 8, **mask_ratio(s)},
        "objectives": {
            "contrastive": hard_labels(s),
            "self_distillation": {**small, **temperatures(s)},
            "text_distillation": {**small, "teacher_temperature_start": s["warmup_teacher_patch_temp"],
                                  "teacher_temperature": s["teacher_patch_temp"],
                                  "temperature_epochs": s["warmup_teacher_temp_epochs"]}},
        "optimizer": {**decay_and_momentum(s), "lr": s["base_lr"], "min_lr": s["min_lr"],
                      "warmup_epochs": s["lr_warmup_epochs"]},
    }  # fmt: skip
    config = parse_config(raw, "the file's settings")
    by_step = parse_config({**raw, "views": {**raw["views"], "pixel_mask_ratio_by_epoch": False}}, "settings")
    model = Harmony(config)

    def ours(iteration: int) -> dict[str, float]:
        clock = Clock(iteration, s["niter_per_epoch"], s["epochs"])
        values = scheduled(config, model, clock)
        values["epoch_of_iteration"] = values.pop("epoch")
        values["iterations"] = values.pop("iteration")
        values["mask_ratio_as_used_by_epoch_index"] = values.pop("mask_ratio")
        values["mask_ratio_array_at_iteration"] = pixel_ratio(by_step.views, clock)
        return values

    found = [ours(i) for i in entry["iterations"]]
    per_epoch = [ours(epoch * s["niter_per_epoch"]) for epoch in range(s["epochs"])]
    for name, expected in entry.items():
        if name == "settings":
            continue
        if name == "soft_labels_ever_used":
            yield name, float(expected != bool(model.objectives["contrastive"].teacher_views))
            continue
        values = [v[name.removesuffix("_per_epoch")] for v in (per_epoch if name.endswith("_per_epoch") else found)]
        errors = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, expected, strict=True)]
        yield name, max(errors)


def mask_errors(entry: dict) -> Iterator[tuple[str, float, float]]:
    """Statistics of as many of our block masks, in standard errors of the difference of two samples."""
    n, side = entry["samples"], entry["grid"][0]
    keys = torch.arange(n, dtype=torch.int64) * 0x9E3779B97F4A7C1 + entry["seed"]
    ratios, spreads = tuple(entry["pred_ratio"]), tuple(entry["pred_ratio_var"])
    masks = block_masks(keys, side, ratios, spreads, entry["aspect_ratio"][0])
    share = masks.double().mean(-1)
    some = share[share > 0]
    error = entry["standard_error_of_mean"] * 2**0.5
    empty = entry["fraction_of_empty_masks"]
    yield "mean_masked_fraction", abs(float(share.mean()) - entry["mean_masked_fraction"]) / error, 4
    yield "std_of_fraction", abs(float(share.std()) - entry["std_of_fraction"]) / error, 4
    spread = (2 * empty * (1 - empty) / n) ** 0.5
    yield "fraction_of_empty_masks", abs(float((share == 0).double().mean()) - empty) / spread, 4
    filled = entry["std_of_fraction_of_nonempty"] * (2 / len(some)) ** 0.5
    yield (
        "mean_masked_fraction_of_nonempty",
        abs(float(some.mean()) - entry["mean_masked_fraction_of_nonempty"]) / filled,
        4,
    )
    yield "std_of_fraction_of_nonempty", abs(float(some.std()) - entry["std_of_fraction_of_nonempty"]) / filled, 4
    yield "max_masked_fraction", abs(float(share.max()) - entry["max_masked_fraction"]) * side**2, 1.01
    yield "min_nonempty_fraction", abs(float(some.min()) - entry["min_nonempty_fraction"]) * side**2, 3.01
    for name, values in (("histogram_all_masks", share), ("histogram_nonempty_masks", some)):
        ours = torch.histogram(values, torch.tensor(entry["histogram_bin_edges"], dtype=torch.float64)).hist
        theirs = torch.tensor(entry[name], dtype=torch.float64)
        yield name, float(((ours - theirs) / (ours + theirs).clamp(min=1).sqrt()).abs().max()), 5
    grid = masks.unflatten(-1, (side, side))
    pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
    expected = entry["mean_side_neighbour_pairs_per_masked_patch"]
    yield "mean_side_neighbour_pairs_per_masked_patch", abs(float(pairs / masks.sum()) / expected - 1), 0.01
    frequency = torch.tensor(entry["per_position_masked_frequency"], dtype=torch.float64)
    deviation = (2 * frequency * (1 - frequency) / n).sqrt()
    yield "per_position_masked_frequency", float(((grid.double().mean(0) - frequency) / deviation).abs().max()), 5.5


def scheduled(config: RunConfig, model: Harmony, clock: Clock) -> dict[str, float]:
    """Every scheduled number under the reference's name."""
    scalars, o = scalars_at(config, clock), model.objectives
    patch = o["self_distillation"].config
    return {
        "epoch": clock.epoch,
        "iteration": clock.step,
        "lr": scalars.lr,
        "weight_decay": scalars.weight_decay,
        "ema_momentum": scalars.ema_momentum,
        "hard_labels_weight": o["contrastive"].hard_weight(clock),
        "teacher_temp": o["self_distillation"].teacher_temperature(clock),
        "teacher_patch_temp": o["self_distillation"].warmed_up(
            clock, patch.patch_temperature_start, patch.patch_temperature
        ),
        "teacher_text_temp": o["text_distillation"].teacher_temperature(clock),
        "mask_ratio": pixel_ratio(config.views, clock),
    }
