"""The EMA teacher under ZeRO: each rank keeps and moves the fp32 shard that lines up with its optimizer partition."""

from __future__ import annotations

from torch import Tensor

from ..harmony.model import Harmony
from ..harmony.teacher import twins
from ..kernels import ema_update_
from .partition import Shard
from .zero import Zero


class ShardedEma:
    """fp32 EMA shards and this rank's part of the teacher's compute copy.

    teacher <- m teacher + (1 - m) student. A rank updates 1 / world_size of it (stages 1 to 3) and writes its part of
    the compute copy in the same pass; then the partition lets the teacher's parameters follow. At fp32 the shard is
    that part itself.
    """

    def __init__(self, zero: Zero, model: Harmony) -> None:
        self._partition = zero.partition
        teacher_of = {id(student): teacher for teacher, student in twins(model.teacher, model.student)}
        names = {id(parameter): f"teacher.{name}" for name, parameter in model.teacher.named_parameters()}
        self._students: list[Shard] = [shard for shard in zero.partition.shards() if shard.group["twin"]]
        self._names: list[list[str]] = []
        self._copies: list[Tensor] = []
        self.shards: list[Tensor] = []
        for student in self._students:
            targets = [teacher_of[id(p)] for p in student.parameters]
            self._names.append([names[id(t)] for t in targets])
            copy = zero.partition.adopt(targets, student, zero.dtype)
            shared = copy.dtype == student.master.dtype and copy.device == student.master.device
            self._copies.append(copy)
            self.shards.append(copy if shared else copy.to(student.master, copy=True))
        self._take_precise_start()

    def _take_precise_start(self) -> None:
        """The compute copy has been rounded by now: the fp32 shard starts as the student's master weights."""
        for shard, copy, student in zip(self.shards, self._copies, self._students, strict=True):
            if shard is not copy:
                shard.copy_(student.master)

    def update(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        for shard, copy, student in zip(self.shards, self._copies, self._students, strict=True):
            beside = copy if shard is not copy and copy.device == shard.device else None
            ema_update_(shard, student.master, momentum, beside)
            if copy.device != shard.device:  # the optimizer, and the EMA with it, is offloaded to the host
                copy.copy_(shard, non_blocking=True)
        self._partition.refresh()

    def load(self, shards: list[Tensor]) -> None:
        """Take over this rank's saved shards."""
        for shard, copy, saved in zip(self.shards, self._copies, shards, strict=True):
            shard.copy_(saved)
            copy.copy_(shard)
        self._partition.refresh()

    def full_precision(self) -> dict[str, Tensor]:
        """The whole teacher in fp32 on the host, by parameter name; all ranks must call."""
        state: dict[str, Tensor] = {}
        for shard, student, names in zip(self.shards, self._students, self._names, strict=True):
            state.update(zip(names, self._partition.whole(shard, student), strict=True))
        return state
