"""`harmony-fast export`: the towers of a run as timm, open_clip, transformers or plain safetensors files.

Each weights file says in its metadata what it was made of, so that `harmony-fast evaluate` takes it like a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import UserError
from ..evaluated import ABOUT, METRICS
from .card import model_card
from .metadata import FORMATS, KEY, describe, exported_format
from .source import Exported, read_source

__all__ = ["FORMATS", "export"]

TEMPORARY = ".tmp"
"""Ending of a weights file that is not whole yet."""


def export(run_dir: Path, form: str, destination: Path | None = None, branch: str | None = None) -> Path:
    """Write a run's newest weights in another library's format, with a model card; returns the weights file.

    destination: a folder, new or empty or of an earlier export (default: RUN/export/FORMAT); for timm and safetensors
    also a file to write, `x.safetensors`, beside which `x.md` and `x.json` are put. branch: teacher or student
    (default: the one that is evaluated).
    Raises UserError where the format is unknown, cannot hold this run, or nothing can be written there.
    """
    if form not in FORMATS:
        raise UserError(f"unknown format '{form}'; one of {', '.join(FORMATS)}")
    source = read_source(run_dir, branch)
    destination = destination or run_dir / "export" / form
    alone = destination.suffix == ".safetensors"
    if alone and form in ("open_clip", "hf"):
        raise UserError(f"{destination}: {form} needs several files; name a folder")
    folder = destination.parent if alone else destination
    made = FORMATS[form].build(source.at(folder))
    weights = destination if alone else folder / made.weights_name
    beside = {weights.with_suffix(".json") if alone else folder / name: content for name, content in made.files.items()}
    card = weights.with_suffix(".md") if alone else folder / "README.md"
    if alone:
        _check_own(weights, card, list(beside), form)
    else:
        _check_free(folder, made)
    metadata = {"format": "pt", KEY: describe(source, form)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = weights.with_name(weights.name + TEMPORARY)
        save_file({name: value.contiguous().clone() for name, value in made.weights.items()}, temporary, metadata)
        for path, content in beside.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else as_json(content), encoding="utf-8")
        card.write_text(model_card(source, form, made, weights), encoding="utf-8")
        temporary.replace(weights)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"{weights}: cannot be written: {error}") from None
    return weights


def as_json(content: Any) -> str:
    """As a person would write it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _check_free(folder: Path, made: Exported) -> None:
    """Nothing but an earlier export is written over. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is there already and not a folder")
    if not folder.is_dir():
        return
    weights = made.weights_name, made.weights_name + TEMPORARY
    ours = {*weights, "README.md", METRICS, ABOUT, *(name.split("/")[0] for name in made.files)}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise UserError(f"{folder}: holds other files ({', '.join(others[:3])}); choose an empty folder")


def _check_own(weights: Path, card: Path, beside: list[Path], form: str) -> None:
    """The same of a file to write and what is put beside it: the card belongs to every export, the rest to one of the
    same format."""
    earlier = exported_format(weights)
    own = [*([weights, card] if earlier else []), *(beside if earlier == form else [])]
    for path in (weights, card, *beside):
        if path.exists() and path not in own:
            raise UserError(f"{path}: is there already and not of an earlier export; choose another name")
