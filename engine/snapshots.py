"""DeepSpeed's checkpoints as copies in host memory that are written later, and read without running any code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.utils._pytree import tree_map_only

Writer = Callable[[Path], object]
KNOWN_TYPES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files contain beside tensors and plain data"""


class Snapshots(TorchCheckpointEngine):
    """In the place of DeepSpeed's own: `save` keeps a copy of what would be written, `load` trusts nothing it reads."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[Path, Any] = {}

    def take(self, engine: DeepSpeedEngine, folder: Path, beside: dict[str, Any]) -> dict[Path, Writer]:
        """Copy what the engine would write into `folder`, and further contents by file name. All ranks must call.

        Returns what writes each file, by path.
        """
        engine._copy_recovery_script = lambda *_: None  # which makes what weights.safetensors has already
        engine.save_checkpoint(str(folder.parent), folder.name, save_latest=False)
        taken = self._taken | {folder / name: _copied(content) for name, content in beside.items()}
        self._taken = {}
        return {path: partial(torch.save, content) for path, content in taken.items()}

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the tensors to host memory."""
        self._taken[Path(path)] = _copied(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Tensors, plain data and `KNOWN_TYPES`; anything else in the file is an error."""
        with torch.serialization.safe_globals(KNOWN_TYPES):
            return torch.load(path, map_location=map_location, weights_only=True)


def _copied(content: Any) -> Any:
    """Nested data with all tensors copied to host memory."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
