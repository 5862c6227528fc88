"""Checkpoints: complete or invisible. DeepSpeed's files, the EMA shards, and the weights in one safetensors file.

checkpoints/latest                    the name of the newest complete checkpoint
checkpoints/step-00000200/            DeepSpeed's files, ema-rank-*.pt, progress.json, weights.safetensors

A checkpoint whose progress.json has `"ranks": null` holds weights only: training starts from them on any number of
ranks, with a fresh optimizer.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..harmony.model import Harmony
from .config import RunConfig, load_config
from .distributed import Ranks
from .ema import ShardedEma
from .errors import UserError
from .resharding import take_moments
from .zero import Zero

WEIGHTS = "weights.safetensors"


class Checkpoints:
    """The checkpoint folder of a run."""

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int) -> None:
        self.folder = run_dir / "checkpoints"
        self._ranks, self._keep = ranks, keep

    def save(self, step: int, zero: Zero, ema: ShardedEma) -> Path:
        """Write everything into a temporary folder, rename it, then point `latest` at it. All ranks must call."""
        name = f"step-{step:08d}"
        temporary, final = self.folder / f".{name}.incomplete", self.folder / name
        if self._ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        zero.engine.save_checkpoint(
            str(self.folder), tag=temporary.name, save_latest=False, client_state={"step": step}
        )
        torch.save(ema.shards, temporary / f"ema-rank-{self._ranks.rank}.pt")
        weights = consolidated_weights(zero, ema)
        self._ranks.barrier()
        if self._ranks.is_main:
            save_file(weights, temporary / WEIGHTS, {"step": str(step)})
            progress = {
                "step": step, "ranks": self._ranks.world_size, "stage": zero.config.zero.stage,
                "adam_steps": zero.step_counts(), "loss_scale": zero.loss_scale,
            }  # fmt: skip
            (temporary / "progress.json").write_text(json.dumps(progress))
            self._publish(temporary, final)
        self._ranks.barrier()
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        found = self.folder / pointer.read_text().strip()
        return found if (found / "progress.json").is_file() else None

    def load(self, path: Path, zero: Zero, ema: ShardedEma) -> int:
        """Restore a checkpoint, of any number of ranks and any ZeRO stage; returns the optimizer steps done.

        Raises UserError if its optimizer states cannot be cut for these ranks (8-bit states).
        """
        progress = json.loads((path / "progress.json").read_text())
        if progress["ranks"] is None:
            start_from(load_file(path / WEIGHTS), zero, ema)
            return progress["step"]
        stage, ranks = zero.config.zero.stage, self._ranks
        replicated = progress["stage"] == stage == 0  # then every rank's files say the same
        if not replicated and (progress["ranks"], progress["stage"]) != (ranks.world_size, stage):
            start_from(load_file(path / WEIGHTS), zero, ema)
            take_moments(path, progress["stage"], progress["adam_steps"], zero, ranks)
            zero.loss_scale = progress["loss_scale"]
            return progress["step"]
        zero.engine.load_checkpoint(str(self.folder), tag=path.name)
        file = path / f"ema-rank-{ranks.rank % progress['ranks']}.pt"
        ema.load(torch.load(file, map_location=ranks.device, weights_only=True))
        return progress["step"]

    def _publish(self, temporary: Path, final: Path) -> None:
        """Sync, rename, point `latest` at it, drop old ones."""
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        pointer = self.folder / "latest.tmp"
        pointer.write_text(final.name)
        pointer.replace(self.folder / "latest")
        complete = sorted(p for p in self.folder.glob("step-*") if p.is_dir())
        for old in complete[: -self._keep]:
            shutil.rmtree(old)


def write_weights_only(run_dir: Path, step: int, weights: dict[str, Tensor]) -> Path:
    """A checkpoint of weights alone, under the model's state names, for a run that counts `step` steps as done."""
    folder = run_dir / "checkpoints"
    temporary, final = folder / f".step-{step:08d}.incomplete", folder / f"step-{step:08d}"
    temporary.mkdir(parents=True)
    save_file(weights, temporary / WEIGHTS, {"step": str(step)})
    (temporary / "progress.json").write_text(json.dumps({"step": step, "ranks": None}))
    temporary.rename(final)
    (folder / "latest").write_text(final.name)
    return final


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


def load_run(run_dir: Path, device: torch.device | str = "cpu") -> tuple[RunConfig, Harmony]:
    """Configuration and model (fp32, evaluation mode) of a run's newest checkpoint, for evaluation and reports.

    Raises UserError if the folder is not a run, has no checkpoint, or its weights do not fit its configuration.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run folder (no config.yaml)")
    config = load_config(run_dir / "config.yaml")
    pointer = run_dir / "checkpoints" / "latest"
    if not pointer.is_file():
        raise UserError(f"{run_dir}: no checkpoint yet")
    path = run_dir / "checkpoints" / pointer.read_text().strip() / WEIGHTS
    model = Harmony(config)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except RuntimeError as error:
        raise UserError(
            f"{path}: does not fit {run_dir / 'config.yaml'}: {' '.join(str(error).split())[:300]}"
        ) from None
    return config, model.to(device).eval()
