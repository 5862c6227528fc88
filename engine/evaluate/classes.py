"""Labels and the names of classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

IMAGENET = "imagenet"
"""What `evaluate.classes` calls open_clip's 1,000 names."""
Labelled = Iterable[tuple[str, Mapping[str, Any]]]
"""Samples: the name of each, and its labels by key."""


def labels_of(samples: Labelled, key: str) -> list[str]:
    """One label of every sample, as text. Raises UserError, naming the sample, where it has none."""
    found = []
    for name, known in samples:
        if known.get(key) is None:
            raise UserError(
                f"{name} has no label '{key}'; it has: {', '.join(known) or 'none'} (evaluate.class_key and "
                "evaluate.group_key say which is meant)"
            )
        found.append(str(known[key]))
    return found


def require_several(classes: Iterable[str], task: str, key: str) -> None:
    """Raises UserError where all samples are of one class."""
    different = set(classes)
    if len(different) < 2:
        raise UserError(f"{task} needs at least two classes; all samples have the {key} '{different.pop()}'")


def in_order(labels: list[str]) -> list[str]:
    """Each label once: numbers by their value, others as text."""
    found = set(labels)
    return sorted(found, key=int) if all(_is_number(label) for label in found) else sorted(found)


def class_names(labels: list[str], given: str | None) -> dict[str, str]:
    """Names by label: of all classes that `given` names (see `evaluate.classes`), whether they occur or not; None: of
    the labels that occur, which are names. Raises UserError where names are missing or their number does not fit.
    """
    classes = in_order(labels)
    if given is None:
        return {label: label for label in classes}
    names = _read_names(given)
    if isinstance(names, dict):
        missing = [label for label in classes if label not in names]
        if missing:
            raise UserError(f"{given}: has no name for the class {missing[0]!r} ({len(missing)} such classes)")
        return {label: str(name) for label, name in names.items()}
    if all(_is_number(label) for label in classes):
        if int(classes[-1]) >= len(names):
            raise UserError(f"{given}: holds {len(names)} names, and there is a class number {classes[-1]}")
        written = {int(label): label for label in classes}  # perhaps with zeros in front
        return {written.get(i, str(i)): name for i, name in enumerate(names)}
    if len(classes) != len(names):
        raise UserError(f"{given}: holds {len(names)} names, the set has {len(classes)} classes; give names by label")
    return dict(zip(classes, names, strict=True))


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _read_names(given: str) -> list[str] | dict[str, Any]:
    if given == IMAGENET:
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    lines = read_lines(Path(given), "evaluate.classes")
    if not given.endswith(".json"):
        return lines
    try:
        content = json.loads("\n".join(lines))
    except ValueError:
        raise UserError(f"{given}: not valid JSON") from None
    if isinstance(content, list) and content:
        return [str(name) for name in content]
    if isinstance(content, dict) and content:
        return content
    raise UserError(f"{given}: expected a list of names, or names by label")


def read_lines(path: Path, key: str) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path}: not UTF-8 text") from None
    if not any(lines):
        raise UserError(f"{key}: {path}: is empty")
    return [line for line in lines if line]
