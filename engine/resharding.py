"""Optimizer states for another number of ranks, or another ZeRO stage, than they were saved with.

Stage 0 keeps them whole. For the others DeepSpeed's converter to "universal" checkpoints takes the ranks' files apart
into one tensor per parameter and moment. Each rank then takes its own part of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor

from .distributed import Ranks
from .errors import UserError
from .snapshots import KNOWN_TYPES
from .zero import Zero

MOMENTS = ("exp_avg", "exp_avg_sq")
ReadMoment = Callable[[str, str], Tensor]
"""The whole of a moment by the parameter's name and its own"""


@torch.no_grad()
def take_moments(checkpoint: Path, stage: int, steps: dict[str, int], zero: Zero, ranks: Ranks) -> None:
    """Give this rank's shards their AdamW moments from a checkpoint of any number of ranks. All ranks must call.

    stage: the ZeRO stage that saved it. steps: AdamW's count of the steps of each parameter.

    Raises UserError for 8-bit states, whose blocks cannot be cut elsewhere, and if the converter fails.
    """
    if zero.config.optimizer.states == "8bit":
        raise UserError(f"{checkpoint}: 8-bit optimizer states need the ranks and the stage that saved them")
    with _universal(checkpoint, ranks) if stage else contextlib.nullcontext(_replica(checkpoint, zero)) as read:
        for shard in zero.partition.shards():
            names = [zero.names[id(parameter)] for parameter in shard.parameters]
            state: dict[str, Tensor] = {}
            for moment in MOMENTS:
                whole = [read(name, moment).view(zero.shapes[name]) for name in names]
                state[moment] = zero.partition.cut(whole, shard).to(shard.master)
            state["step"] = _step_count(steps[names[0]], shard.master)
            zero.adamw.state[shard.state_key] = state


def _replica(checkpoint: Path, zero: Zero) -> ReadMoment:
    """The moments of a checkpoint of stage 0, where one file has them all, numbered in the optimizer's order."""
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["optimizer"]
    states = saved.get("optimizer_state_dict", saved)["state"]
    place = {name: i for i, name in enumerate(zero.order)}

    def read(name: str, moment: str) -> Tensor:
        """0 for a parameter that never had a gradient."""
        return states[place[name]][moment] if place[name] in states else torch.zeros(zero.shapes[name])

    return read


def _step_count(step: int, weights: Tensor) -> Tensor:
    """AdamW's count of steps, where its fused form reads it: beside the weights."""
    return torch.tensor(float(step), device=weights.device)


@contextlib.contextmanager
def _universal(checkpoint: Path, ranks: Ranks) -> Iterator[ReadMoment]:
    """The moments of a checkpoint of stages 1 to 3; its universal form is a folder for as long as this lasts."""
    folder = checkpoint.parent / f".{checkpoint.name}.universal"
    problem = ""
    if ranks.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _convert(checkpoint, folder)
        except Exception as error:  # whatever DeepSpeed makes of files that were damaged
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        if problem := ranks.agree(problem):
            raise UserError(f"{checkpoint}: cannot be taken apart for another number of ranks: {problem}")

        def read(name: str, moment: str) -> Tensor:
            content = torch.load(folder / "zero" / name / f"{moment}.pt", map_location="cpu", weights_only=True)
            return content["param"] if isinstance(content, dict) else torch.as_tensor(content)

        yield read
        ranks.barrier()  # not where one rank fails alone: it would wait for the others, and they for it
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            (checkpoint.parent / "latest_universal").unlink(missing_ok=True)


def _convert(checkpoint: Path, folder: Path) -> None:
    """DeepSpeed's converter, in silence. It would run code from files it reads: the variable keeps it from that."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    options = argparse.Namespace(
        input_folder=str(checkpoint), output_folder=str(folder), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    before, silence = os.environ.get(variable), io.StringIO()
    os.environ[variable] = "1"
    try:
        with (
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
            torch.serialization.safe_globals(KNOWN_TYPES),
        ):
            ds_to_universal.main(options)
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
