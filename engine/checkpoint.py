"""What a checkpoint of a run holds, saved beside training: DeepSpeed's files, the EMA shards, the weights by name.

step-00000200/  DeepSpeed's files, ema-rank-*.pt, progress.json, weights.safetensors (the whole model in fp32), and the
manifest that makes it a checkpoint (see `checkpoint_folder`).

A checkpoint whose progress.json has `"ranks": null` holds weights only: training starts from them on any number of
ranks, with a fresh optimizer.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..harmony.model import Harmony
from .checkpoint_folder import CheckpointFolder, Manifest, describe
from .config import RunConfig, load_config
from .disk import sync_path, write_synced
from .distributed import Ranks
from .ema import ShardedEma
from .errors import UserError
from .resharding import take_moments
from .zero import Zero

if TYPE_CHECKING:
    from .snapshots import Writer

WEIGHTS, PROGRESS = "weights.safetensors", "progress.json"
PATIENCE = 600.0
"""Seconds that the main rank waits for the other ranks' files once its own are written"""


class Checkpoints:
    """The checkpoints of a run: copied while training stands still, written and published while it goes on.

    A save that fails leaves the run and the checkpoints before it as they were.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int, keep_every: int | None = None) -> None:
        self.folder = CheckpointFolder(run_dir)
        self.problem = ""
        """What went wrong with the last save that has ended, in words, or nothing"""
        self.seconds = 0.0
        """That the longest save took, from its start to its end"""
        self._ranks, self._keep, self._keep_every = ranks, keep, keep_every
        self._writer: Thread | None = None

    def save(self, step: int, zero: Zero, ema: ShardedEma, state: dict[str, Any] | None = None) -> None:
        """Start to save, once `wait` has been called. All ranks must call. state: plain data for `load`'s answer."""
        begun = time.monotonic()
        self.problem = self._attempt(lambda: self.folder.begin(step)) if self._ranks.is_main else ""
        if self._ranks.any(bool(self.problem)):
            return
        files = self._files(step, zero, ema, state or {})
        self._writer = Thread(target=self._write, args=(step, files, begun), name="harmony-fast-checkpoint")
        self._writer.start()

    def wait(self) -> str:
        """Until the save under way has ended, on all ranks. All must call. Returns what went wrong, or nothing."""
        if self._writer:
            self._writer.join()
            self._writer = None
        self._ranks.barrier()
        return self._ranks.agree(self.problem)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with newer ones. All ranks must call.

        Raises UserError if there are checkpoints and none is whole.
        """
        found: Any = None
        if self._ranks.is_main:
            try:
                found = self.folder.newest()
            except UserError as error:
                found = error
        found = self._ranks.agree(found)
        if isinstance(found, UserError):
            raise found
        return found

    def load(self, path: Path, zero: Zero, ema: ShardedEma) -> dict[str, Any]:
        """Restore a checkpoint, of any number of ranks and any ZeRO stage; returns its `progress.json`, which has the
        optimizer steps done under "step".

        Raises UserError if its optimizer states cannot be cut for these ranks (8-bit states), or a file holds code.
        """
        try:
            return self._load(path, zero, ema)
        except UnpicklingError as error:  # the files are what the manifest says, but not what this program writes
            raise UserError(f"{path}: holds what no checkpoint does: {str(error).splitlines()[-1][:200]}") from None

    def _load(self, path: Path, zero: Zero, ema: ShardedEma) -> dict[str, Any]:
        progress = json.loads((path / PROGRESS).read_text())
        if progress["ranks"] is None:
            start_from(load_file(path / WEIGHTS), zero, ema)
            return progress
        stage, ranks = zero.config.zero.stage, self._ranks
        replicated = progress["stage"] == stage == 0  # then every rank's files say the same
        if not replicated and (progress["ranks"], progress["stage"]) != (ranks.world_size, stage):
            start_from(load_file(path / WEIGHTS), zero, ema)
            take_moments(path, progress["stage"], progress["adam_steps"], zero, ranks)
            zero.loss_scale = progress["loss_scale"]
            return progress
        zero.engine.load_checkpoint(str(path.parent), tag=path.name)
        file = path / f"ema-rank-{ranks.rank % progress['ranks']}.pt"
        ema.load(torch.load(file, map_location=ranks.device, weights_only=True))
        return progress

    def _files(self, step: int, zero: Zero, ema: ShardedEma, state: dict[str, Any]) -> dict[Path, Writer]:
        """By path, what writes each file of this rank, from copies in host memory."""
        temporary = self.folder.temporary(step)
        files = zero.snapshot(temporary, {f"ema-rank-{self._ranks.rank}.pt": ema.shards})
        weights = consolidated_weights(zero, ema)
        if self._ranks.is_main:
            progress = {
                **state, "step": step, "ranks": self._ranks.world_size, "stage": zero.config.zero.stage,
                "adam_steps": zero.step_counts(), "loss_scale": zero.loss_scale,
            }  # fmt: skip
            files[temporary / WEIGHTS] = lambda path: save_file(weights, path, {"step": str(step)})
            files[temporary / PROGRESS] = lambda path: path.write_text(json.dumps(progress))
        return files

    def _write(self, step: int, files: dict[Path, Writer], begun: float) -> None:
        """In a thread of its own: this rank's files; on the main rank then the checkpoint of all."""
        temporary = self.folder.temporary(step)
        self.problem = self._attempt(lambda: _write_all(files, temporary / f"part-{self._ranks.rank}.json"))
        if self.problem:
            self._attempt((temporary / f"failed-{self._ranks.rank}").touch)
        elif self._ranks.is_main:
            self.problem = self._attempt(lambda: self._publish(step))
        self.seconds = max(self.seconds, time.monotonic() - begun)

    def _publish(self, step: int) -> None:
        temporary = self.folder.temporary(step)
        parts = [temporary / f"part-{rank}.json" for rank in range(self._ranks.world_size)]
        end = time.monotonic() + PATIENCE
        while not all(part.is_file() for part in parts):
            failed = [p.name for p in temporary.glob("failed-*")]
            if failed or time.monotonic() > end:
                raise OSError(f"rank {failed[0].split('-')[1] if failed else 'unknown'} has not written its part")
            time.sleep(0.02)
        manifest: Manifest = {}
        for part in parts:
            manifest |= json.loads(part.read_text())
            part.unlink()
        self.folder.publish(step, manifest)
        self.folder.prune(step, self._keep, self._keep_every)

    def _attempt(self, work: Callable[[], object]) -> str:
        """Do it; what went wrong in words, or nothing."""
        try:
            work()
            return ""
        except Exception as error:  # whatever it is must not harm the run
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            with suppress(OSError):
                reason += f" ({shutil.disk_usage(self.folder.path).free / 2**20:,.0f} MiB free on the disk)"
            return reason


def _write_all(files: dict[Path, Writer], part: Path) -> None:
    """Write and sync the files, then their entries in the manifest."""
    entries = {}
    for path, write in files.items():
        write(path)
        sync_path(path)
        entries[path.name] = describe(path)
    temporary = part.with_suffix(".tmp")
    write_synced(temporary, json.dumps(entries).encode())
    temporary.rename(part)


def write_weights_only(run_dir: Path, step: int, weights: dict[str, Tensor]) -> Path:
    """A checkpoint of weights alone, under the model's state names, for a run that counts `step` steps as done."""
    folder = CheckpointFolder(run_dir)
    temporary = folder.begin(step)
    save_file(weights, temporary / WEIGHTS, {"step": str(step)})
    (temporary / PROGRESS).write_text(json.dumps({"step": step, "ranks": None}))
    for file in temporary.iterdir():
        sync_path(file)
    return folder.publish(step, {file.name: describe(file) for file in temporary.iterdir()})


@torch.no_grad()
def start_from(weights: dict[str, Tensor], zero: Zero, ema: ShardedEma) -> None:
    """Put whole weights into the compute copies, and unrounded into this rank's fp32 master and EMA shards."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(list(zero.model.parameters()), modifier_rank=0):
        zero.model.load_state_dict(weights)
    teacher = []
    for shard in zero.partition.shards():
        own = [zero.names[id(parameter)] for parameter in shard.parameters]
        shard.master.copy_(zero.partition.cut([weights[name] for name in own], shard))
        if shard.group["twin"]:
            twins = [weights[name.replace("student.", "teacher.", 1)] for name in own]
            teacher.append(zero.partition.cut(twins, shard))
    ema.load(teacher)


def consolidated_weights(zero: Zero, ema: ShardedEma) -> dict[str, Tensor]:
    """The whole model in fp32 on the host, under the model's state names. All ranks must call."""
    state = {name: value.detach().float().cpu() for name, value in zero.model.state_dict().items()}
    state.update(zero.weights())
    state.update(ema.full_precision())
    return {name: value.clone() for name, value in state.items()}


class LoadedRun(NamedTuple):
    """A run as it is at one of its checkpoints."""

    config: RunConfig
    model: Harmony
    """fp32, evaluation mode"""
    checkpoint: Path
    """The folder `step-00000200` it comes from"""


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> LoadedRun:
    """A run's newest checkpoint with whole weights, for everything but training.

    Raises UserError if the folder is not a run, has no checkpoint, or its weights do not fit its configuration.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run folder (no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    found, problems = CheckpointFolder(run_dir).newest([WEIGHTS])
    if found is None:
        raise UserError(f"{run_dir}: no checkpoint yet")
    for problem in problems:
        print(f"warning: {problem}; using {found.name}", file=sys.stderr)
    path = found / WEIGHTS
    model = Harmony(config)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(
            f"{path}: does not fit {run_dir / 'config.yaml'}: {' '.join(str(error).split())[:300]}"
        ) from None
    return LoadedRun(config, model.to(device).eval(), found)
