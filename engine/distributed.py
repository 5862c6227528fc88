"""Processes and what they say to each other: starting local ranks, joining those that were started, collectives."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..harmony.objectives import Collectives
from .errors import StartAgain, UserError
from .stopping import BEGAN, SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import RunProcsResult

STORE = "HARMONY_FAST_STORE"
LAUNCHER = "HARMONY_FAST_LAUNCHER"
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent is gone"""
T = TypeVar("T")


class Ranks(Collectives):
    """The process group of a run, and this process's place in it."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        local_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # torchrun's, deepspeed's
        self.local_size = int(local_size or self.world_size)
        """Ranks of this machine"""
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        # Flags that decide what the host does next travel over gloo: they must not wait for the GPU's queue.
        self._host = None if dist.get_backend() == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and checkpoints' common files."""
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate [B, ...] of all ranks in rank order, with gradient."""
        return x if self.world_size == 1 else _Gather.apply(x)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, without gradient."""
        if self.world_size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def stack(self, x: Tensor) -> Tensor:
        """All ranks' tensors [n] of one size, on the device or all on the host: [world_size, n], without gradient."""
        x = x.detach().contiguous()
        if self.world_size == 1:
            return x[None]
        everything = x.new_empty(self.world_size, x.numel())
        dist.all_gather_into_tensor(everything.view(-1), x, group=None if x.is_cuda else self._host)
        return everything

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world_size == 1:
            return flag
        return bool(self.most(torch.tensor(int(flag))))

    def most(self, values: Tensor) -> Tensor:
        """Of each number on the host the largest of all ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._host)
        return values

    def agree(self, value: T) -> T:
        """The main rank's value, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(group=self._host)


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is summed over the ranks that used it and cut to this rank's rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def join() -> Ranks:
    """Join the ranks that were started (by `launch`, torchrun, deepspeed or SLURM), or be a single process."""
    _end_with_launcher()
    _read_slurm()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if STORE in os.environ:
        dist.init_process_group(
            backend, init_method=f"file://{os.environ[STORE]}",
            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
        )  # fmt: skip
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks()


def _end_with_launcher() -> None:
    """Have this process killed when the one that launched it is gone, however that ended: nothing else would."""
    if LAUNCHER not in os.environ or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[LAUNCHER]):  # it went before
        os._exit(1)


def started_by_launcher() -> bool:
    """Whether this process is one rank of several that something else started."""
    _read_slurm()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _read_slurm() -> None:
    """What SLURM says to each task of `srun`, as torch's variables, which win where they are set already.

    The ranks meet at MASTER_ADDR, by default the step's first node, port MASTER_PORT, by default one of the job's own.
    A task that SLURM shows one GPU alone (`--gpus-per-task=1`) uses that one, whatever its number on the node.
    """
    slurm = os.environ
    if "RANK" in slurm or int(slurm.get("SLURM_STEP_NUM_TASKS", 1)) < 2 or "SLURM_PROCID" not in slurm:
        return
    found = {"RANK": slurm["SLURM_PROCID"], "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"]}
    found["LOCAL_RANK"] = "0" if torch.cuda.device_count() == 1 else slurm.get("SLURM_LOCALID", "0")
    found["LOCAL_WORLD_SIZE"] = str(most_tasks(slurm.get("SLURM_STEP_TASKS_PER_NODE", found["WORLD_SIZE"])))
    found["MASTER_ADDR"] = first_host(slurm.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    found["MASTER_PORT"] = str(20000 + int(slurm.get("SLURM_JOB_ID", 0)) % 20000)
    os.environ.update({name: value for name, value in found.items() if name not in os.environ})


def first_host(hosts: str) -> str:
    """The first of SLURM's list of hosts: gpu[07-09,12],login -> gpu07."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", hosts)
    assert found is not None  # each part of the pattern may be empty
    return "".join(found.groups(""))


def most_tasks(per_node: str) -> int:
    """The largest number in SLURM's list of tasks on each node: 4(x2),3 -> 4."""
    return max(int(number) for number in re.findall(r"(?:^|,)(\d+)", per_node))


def launch(ranks: int, arguments: list[str]) -> None:
    """Run `harmony-fast ARGUMENTS` in `ranks` local processes; if one fails, end all of them; start again if one asks.

    The ranks meet in a file and talk over the loopback device. Signals that ask to stop are passed on, so that ranks
    can save. Raises UserError if a rank failed (it has printed why).
    """
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise UserError(f"{ranks} GPUs asked for, {torch.cuda.device_count()} found")
    _end_with_launcher()
    began = time.monotonic()
    while True:
        result = _run_ranks(ranks, arguments, began)
        if result is not None and not result.is_failed():
            return
        failures = list(result.failures.values()) if result else []
        if not any(failure.exitcode == StartAgain.STATUS for failure in failures):  # others fail because of that one
            first = min(failures, key=lambda failure: failure.timestamp, default=None)
            status = first.exitcode if first else "unknown"
            which = f"rank {first.local_rank}" if first else "a rank"
            raise UserError(f"{which} of {ranks} ended with exit status {status}; its message is above")


def _run_ranks(ranks: int, arguments: list[str], began: float) -> RunProcsResult | None:
    """One start of all ranks; returns when all have ended. began: when the first start was."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    with tempfile.TemporaryDirectory(prefix="harmony-fast-") as folder, _same_handlers_afterwards():
        context = start_processes(
            name="rank",
            entrypoint=sys.executable,
            args={rank: ("-m", "harmony_fast.engine.cli", *arguments) for rank in range(ranks)},
            envs={rank: _environment(rank, ranks, Path(folder), began) for rank in range(ranks)},
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "logs")),
        )
        _pass_signals_to(context.pids())
        try:
            return context.wait()
        finally:
            context.close()


@contextmanager
def _same_handlers_afterwards() -> Iterator[None]:
    """Signals are handled afterwards as they are now: torch's `start_processes` has handlers of its own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_signals_to(pids: dict[int, int]) -> None:
    """From now on, what asks this process to stop reaches the ranks, which are sessions of their own."""

    def forward(number: int, _frame: object) -> None:
        for pid in pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    for number in SIGNALS:
        signal.signal(number, forward)


def _environment(rank: int, ranks: int, folder: Path, began: float) -> dict[str, str]:
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        STORE: str(folder / "store"), LAUNCHER: str(os.getpid()), BEGAN: str(began),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }  # fmt: skip


def leave() -> None:
    """End a rank's process at once after its work: libraries' exit handlers are known to abort good runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
