"""What a GPU run needs of collectives, time and errors, without a GPU: each rule by itself."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harmony_fast.engine.checkpoint_folder import CheckpointFolder
from harmony_fast.engine.distributed import Ranks
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.measure import is_out_of_memory
from harmony_fast.engine.resharding import _step_count
from harmony_fast.engine.stopping import BEGAN, StopRequest


class Imagined(Ranks):
    """One of two ranks on GPUs."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 2
        self._host = "the group for the host"


def test_what_lies_on_the_host_is_gathered_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded states: NCCL takes tensors of GPUs alone."""
    asked = []
    monkeypatch.setattr(
        dist, "all_gather_into_tensor", lambda out, x, group: asked.append((out.shape, x.device, group))
    )
    assert Imagined().stack(torch.ones(3)).shape == (2, 3)
    assert asked == [((6,), torch.device("cpu"), "the group for the host")]


def test_counts_of_steps_lie_beside_the_weights() -> None:
    """torch's fused AdamW reads them there."""
    assert _step_count(7, torch.zeros(1, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("no such file"), False),
    ],
)
def test_running_out_of_memory_has_many_names(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) == memory


def test_who_takes_over_has_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harmony_fast.engine.stopping.SIGNALS", ())
    monkeypatch.setenv(BEGAN, str(time.monotonic() - 100))
    assert StopRequest("1:30").due(0, 0)
    assert not StopRequest("1:30").due(0, 0)  # said once
    monkeypatch.setenv(BEGAN, str(time.monotonic() - 100))
    assert not StopRequest("2:30").due(0, 0)


def test_what_an_interrupted_process_left_goes(tmp_path: Path) -> None:
    """Half a checkpoint, or one taken apart for another number of ranks."""
    folder = CheckpointFolder(tmp_path)
    for name in (".step-00000003.incomplete", ".step-00000002.universal", "step-00000002"):
        (folder.path / name).mkdir(parents=True)
    folder.begin(4)
    assert sorted(path.name for path in folder.path.iterdir()) == [".step-00000004.incomplete", "step-00000002"]
