"""`harmony-fast convert`: checkpoints of the authors' code into a run folder, and back.

A converted run has `config.yaml`, a checkpoint of weights alone, and two files of its own, which let it be converted
back bit for bit: `converted.json` (which of our weights each of theirs is) and `converted.safetensors` (those that have
no place in our model).
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..harmony.model import Harmony
from .authors import TO_THEIRS, Source, our_name, read_source, their_name
from .checkpoint import load_run, write_weights_only
from .config import RunConfig, dump_config, parse_config
from .errors import UserError
from .infer import FIXED, infer_config, missing_heads
from .nested import apply_override

__all__ = ["from_run", "our_name", "to_run"]

RECORD, KEPT = "converted.json", "converted.safetensors"
GAIN = ".weight_g"
MAX_GAIN_ERROR = 1e-3
"""The teacher's gains, an average of ones, are off by rounding."""

# Modules that a file has as a whole or not at all.
WHOLE = re.compile(r"(student|teacher)\.(image|text|heads\.\w+)\.|objectives\.\w+\.decoder\.")
# Of a tower, what only some objectives need.
OPTIONAL = ("masked_embed", "contrastive_projection", "text_projection", "ln_final.weight", "ln_final.bias")


@dataclass
class Report:
    """What became of the weights, to be told."""

    placed: int = 0
    """Weights of our model that came from the files"""
    kept: list[str] = field(default_factory=list)
    """Theirs that have no place in our model"""
    fresh: list[str] = field(default_factory=list)
    """Ours that no file has"""
    left_out: list[str] = field(default_factory=list)
    """What else was in the files"""

    def lines(self, run_dir: Path) -> list[str]:
        """In words."""
        modules: dict[str, int] = {}
        for name in self.fresh:
            found = WHOLE.match(name)
            part = f"{found[0]}*" if found and not name.endswith(OPTIONAL) else name
            modules[part] = modules.get(part, 0) + 1
        start = {True: "a copy of the student's", False: "initialised"}
        return [
            f"{self.placed} weights placed",
            *(f"no place in this run, kept in {run_dir / KEPT}: {name}" for name in self.kept),
            *(f"not given, {start[m.startswith('teacher.')]}: {m} ({n})" for m, n in modules.items()),
            *(f"left out: {name}" for name in self.left_out),
        ]


def to_run(
    paths: list[Path], run_dir: Path, overrides: list[str], heads: int | None = None, step: int = 0
) -> tuple[RunConfig, Report]:
    """Make a run folder of the authors' checkpoints.

    paths: one checkpoint, or the image and the text tower. overrides: `key=value` on top of what the weights imply.
    heads: attention heads of the image tower, where not width / 64. step: optimizer steps that count as done.
    Raises UserError if a file is refused, does not hold one model or does not fit, or the folder cannot be written.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir}: is there already and not empty; choose another folder")
    if len({path.name for path in paths}) < len(paths):
        raise UserError("two files of the same name: rename one")
    sources = [read_source(path) for path in paths]
    weights = collect(sources)
    args = {name: value for source in sources for name, value in source.args.items()}
    overrides = overrides if heads is None else [f"model.image.heads={heads}", *overrides]
    config = configure(weights, args, run_dir, overrides, ", ".join(str(path) for path in paths))
    told = [f"{s.path.name}: {name}" for s in sources for name in s.left_out]
    told += [f"setting {name}={args[name]}" for name, value in FIXED.items() if args.get(name, value) != value]
    report = Report(left_out=told)
    state = fill(config, weights, report)
    record, kept = describe(sources, state, report)
    try:
        write_weights_only(run_dir, step, state)
        (run_dir / RECORD).write_text(json.dumps(record, indent=1))
        save_file(kept, run_dir / KEPT)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{run_dir}: cannot be written: {error}") from None
    return config, report


def from_run(run_dir: Path, out: Path) -> list[str]:
    """Write the newest weights of a run as the authors' code writes them; returns the names that have no place there.

    A run that was converted gets its own file back, with the weights of today. For others `out` tells what it gets: one
    called `main_vit...` or `main_text...` the bare tower (the teacher's, where there is one), else the checkpoint.
    Raises UserError for a folder without a whole checkpoint, or if `out` cannot be written.
    """
    config, model, _ = load_run(run_dir)
    weights = model.state_dict()
    if (run_dir / RECORD).is_file():
        content, missing = restore(run_dir, out, weights)
    else:
        content, missing = compose(config, out, weights)
    temporary = out.with_name(out.name + ".tmp")
    try:
        torch.save(content, temporary)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    return missing


def collect(sources: list[Source]) -> dict[str, Tensor]:
    """Their weights under our names. Raises UserError where two that should be one differ, or gains are not 1."""
    weights: dict[str, Tensor] = {}
    for source in sources:
        for theirs, ours in names_of(source).items():
            value = source.tensors[theirs]
            if ours is None:
                continue
            if ours.endswith(GAIN):
                if (value.double() - 1).abs().max() > MAX_GAIN_ERROR:
                    raise UserError(
                        f"{source.path}: {theirs} is not 1: the output layer was trained with --norm_last_layer false, "
                        "which our heads, whose prototypes are unit vectors, cannot express"
                    )
            elif ours in weights and not same(weights[ours], value):
                raise UserError(f"{source.path}: {theirs} differs from another weight that should be the same ({ours})")
            else:
                weights[ours] = value
        if source.args.get("act_in_head", "gelu") != "gelu":
            raise UserError(f"{source.path}: its heads have the activation {source.args['act_in_head']}, ours GELU")
    if not any(name.startswith(("student.image.", "student.text.")) for name in weights):
        raise UserError(f"{sources[0].path}: holds neither an image nor a text tower")
    return weights


def names_of(source: Source) -> dict[str, str | None]:
    """Ours for each of theirs. `last_layer2` is `last_layer` once more, unless the head has two."""
    names = source.names()
    values = {ours: source.tensors[theirs] for theirs, ours in names.items() if ours}
    for branch in ("student", "teacher"):
        second = f"{branch}.heads.self_distillation.last_layer2.weight_v"
        first = values.get(second.replace("layer2", "layer"))
        if second in values and (first is None or not same(values[second], first)):
            return names
    return {theirs: ours and ours.replace("last_layer2", "last_layer") for theirs, ours in names.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return one.shape == other.shape and torch.equal(one, other)


def configure(
    weights: dict[str, Tensor], args: dict[str, Any], run_dir: Path, overrides: list[str], origin: str
) -> RunConfig:
    """The configuration that the weights, the arguments and the overrides make together."""
    try:
        raw = infer_config(weights, args)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{origin}: the model's sizes cannot be read: {error} is missing or misshapen") from None
    for override in overrides:
        apply_override(raw, override)
    missing = missing_heads(raw)
    if missing:
        raise UserError(f"{origin}: weights do not tell the number of attention heads; say {' '.join(missing)}")
    return parse_config({**raw, "run_dir": str(run_dir)}, origin)


def fill(config: RunConfig, weights: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Our model's state with the given weights in place; the rest is initialised. fp32, on the host.

    Raises UserError for a weight of another shape, and for a module of which only a part is there.
    """
    torch.manual_seed(config.seed)
    state = Harmony(config).state_dict()
    absent = [name for name in state if name not in weights]
    modules = {match[0] for name in weights if name in state and (match := WHOLE.match(name))}
    halves = [n for n in absent if (m := WHOLE.match(n)) and m[0] in modules and not n.endswith(OPTIONAL)]
    if halves:
        raise UserError(f"the file lacks {', '.join(halves)}, but has other weights of the same module")
    for name in [name for name in state if name in weights]:
        if weights[name].squeeze().shape != state[name].squeeze().shape:
            given, needed = (tuple(t.shape) for t in (weights[name], state[name]))
            raise UserError(f"{name}: the file's shape is {given}, the model's {needed}")
        state[name] = weights[name].float().reshape(state[name].shape).clone()
        report.placed += 1
    for name in absent:
        if name.startswith("teacher."):
            state[name] = state[name.replace("teacher.", "student.", 1)].clone()
        report.fresh.append(name)
    return state


def describe(
    sources: list[Source], state: dict[str, Tensor], report: Report
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is needed to write the files again: their keys, and the tensors that our state does not hold exactly."""
    record: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    for source in sources:
        keys = {}
        for theirs, ours in names_of(source).items():
            value = source.tensors[theirs]
            place = ours if ours in state else None
            if place is None or not torch.equal(state[place].to(value.dtype).reshape(value.shape), value):
                kept[f"{source.path.name}/{theirs}"] = value.clone().contiguous()
            if place is None and not (ours or "").endswith(GAIN):
                report.kept.append(theirs)
            keys[theirs] = {"ours": place, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        args = {name: value for name, value in source.args.items() if _plain(value)}
        record[source.path.name] = {"whole": source.whole, "epoch": source.epoch, "args": args, "keys": keys}
    return record, kept


def restore(run_dir: Path, out: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The file that a run was converted from, with the weights of today."""
    record, kept = json.loads((run_dir / RECORD).read_text()), load_file(run_dir / KEPT)
    name = out.name if out.name in record else next(iter(record))
    if len(record) > 1 and out.name not in record:
        raise UserError(f"{run_dir} was made of several files; call the output {' or '.join(record)}")
    state: dict[str, Tensor] = {}
    for theirs, entry in record[name]["keys"].items():
        dtype, original = getattr(torch, entry["dtype"]), kept.get(f"{name}/{theirs}")
        now = weights.get(entry["ours"])
        if now is not None and (original is None or not torch.equal(original.float().reshape(now.shape), now)):
            state[theirs] = now.to(dtype).reshape(entry["shape"])
        elif original is not None:  # rounded to fp32, and not trained since
            state[theirs] = original
        else:
            raise UserError(f"{run_dir}: its checkpoint has no {entry['ours']}, which {name} needs")
    used = {entry["ours"] for file in record.values() for entry in file["keys"].values()}
    missing = [n for n in weights if n not in used]
    return (_checkpoint(state, record[name]) if record[name]["whole"] else state), missing


def compose(config: RunConfig, out: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """A file of the authors' code from a run that did not come from one."""
    for start, tower in (("main_vit", "image"), ("main_text", "text")):
        if out.name.startswith(start):
            return _tower(weights, tower, out), []
    state: dict[str, Tensor] = {}
    missing = []
    for name, value in weights.items():
        theirs = their_name(name, config.objectives.active())
        if theirs is None:
            missing.append(name)
            continue
        if name.endswith("logit_scale") or name.endswith("logit_bias"):
            value = value.reshape(())
        elif name.endswith("center.value"):
            value = value.reshape((1, -1) if "class_center" in name else (1, 1, -1))
        state[theirs] = value
        if name.endswith("weight_v"):
            state[theirs.removesuffix("_v") + "_g"] = torch.ones(len(value), 1)
    return _checkpoint(state, {}), missing


def _tower(weights: dict[str, Tensor], tower: str, out: Path) -> dict[str, Tensor]:
    """The bare state dict of one tower."""
    for branch in ("teacher", "student"):
        prefix = f"{branch}.{tower}."
        found = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        if found:
            outer = TO_THEIRS[f"student.{tower}."]
            theirs = {their_name(f"student.{tower}.{name}", ()): value for name, value in found.items()}
            return {name.removeprefix(outer): value for name, value in theirs.items() if name}
    raise UserError(f"{out}: the run has no {tower} tower")


def _checkpoint(state: dict[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
    """Around the weights, what the authors' code looks for when it goes on; it makes its own optimizer."""
    centers = {n: state[f"discriminative_path.loss.{n}"] for n in ("center", "center2")
               if f"discriminative_path.loss.{n}" in state}  # fmt: skip
    content: dict[str, Any] = {"model": state, "disc_loss": centers or None}
    if record.get("epoch") is not None:
        content["epoch"] = record["epoch"]
    if record.get("args"):
        content["args"] = argparse.Namespace(**record["args"])
    return content


def _plain(value: Any) -> bool:
    """Whether a value goes through JSON and back as it is."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
