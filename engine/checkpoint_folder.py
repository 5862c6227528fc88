"""Where a run's checkpoints lie: complete or invisible, whatever happens while they are written.

checkpoints/latest                          the name of the newest complete checkpoint
checkpoints/step-00000200/manifest.json     sizes and SHA-256 of all its other files
checkpoints/.step-00000300.incomplete/      one that is being written

A checkpoint is written into a folder that counts as nothing, synced, and renamed; `latest` moves last. One whose files
are not what its manifest says is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from .disk import sync_path, write_synced
from .errors import UserError

MANIFEST, LATEST = "manifest.json", "latest"
FINISHED = "finished"
"""File in the run folder that says that all steps are done"""
Manifest = dict[str, dict[str, int | str]]
"""By file name: bytes, sha256"""


class CheckpointFolder:
    """The checkpoints of one run. One process at a time may change it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "checkpoints"

    def begin(self, step: int) -> Path:
        """An empty folder to write into; what an interrupted process left of another one goes."""
        for old in self.path.glob(".step-*"):  # incomplete, or in the form that `resharding` reads
            shutil.rmtree(old, ignore_errors=True)
        temporary = self.temporary(step)
        temporary.mkdir(parents=True)
        return temporary

    def temporary(self, step: int) -> Path:
        """The folder that `begin` makes."""
        return self.path / f".step-{step:08d}.incomplete"

    def publish(self, step: int, manifest: Manifest) -> Path:
        """Make what was written, and synced, the newest checkpoint."""
        temporary, final = self.temporary(step), self.path / f"step-{step:08d}"
        write_synced(temporary / MANIFEST, json.dumps({"files": manifest}, indent=1).encode())
        sync_path(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_path(self.path)
        pointer = self.path / f"{LATEST}.tmp"
        write_synced(pointer, final.name.encode())
        pointer.replace(self.path / LATEST)
        sync_path(self.path)
        return final

    def prune(self, step: int, keep: int, keep_every: int | None) -> None:
        """After publishing `step`, remove all but the newest `keep` and those of every `keep_every` steps.

        Those of later steps go, too: they were damaged, or are of a course that the run has turned away from.
        """
        found = self._by_step()
        later = [path for path in found if step_of(path) > step]
        older = [path for path in found if step_of(path) <= step][:-keep]
        for path in later + [path for path in older if not keep_every or step_of(path) % keep_every]:
            shutil.rmtree(path, ignore_errors=True)

    def newest(self, files: Collection[str] | None = None) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files (all, or these) are whole, and what is wrong with newer ones.

        Raises UserError if there are checkpoints and none is whole.
        """
        problems: list[str] = []
        for path in self._candidates():
            problem = damage(path, files)
            if problem is None:
                return path, problems
            problems.append(problem)
        if problems:
            raise UserError(f"no checkpoint can be used: {'; '.join(problems)}")
        return None, []

    def _candidates(self) -> list[Path]:
        """Newest first: what `latest` names, then all that are older; all, if it names nothing that is there."""
        found = self._by_step()[::-1]
        try:
            named = self.path / (self.path / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return found
        return found[found.index(named) :] if named in found else found

    def _by_step(self) -> list[Path]:
        names = (p for p in self.path.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
        return sorted(names, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint by its name."""
    return int(path.name.removeprefix("step-"))


def damage(path: Path, files: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files (all, or these), or None."""
    try:
        manifest: Manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in manifest.items():
            if files is None or name in files:
                found = describe(path / name)
                if found != expected:
                    return f"{path / name} is damaged ({found['bytes']:,} bytes, {expected['bytes']:,} were written)"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} cannot be read ({type(error).__name__})"
    missing = sorted(set(files or ()) - manifest.keys())
    return f"{path} has no {', '.join(missing)}" if missing else None


def describe(path: Path) -> dict[str, int | str]:
    """A file's entry in a manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: BinaryIO) -> hashlib._Hash:  # Python 3.10
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest
