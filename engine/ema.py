"""The EMA teacher under ZeRO: each rank keeps and moves the fp32 shard that lines up with its optimizer partition."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..harmony.model import Harmony
from ..harmony.teacher import twins
from ..kernels import ema_update_
from .distributed import Ranks
from .zero import Zero


class ShardedEma:
    """fp32 EMA shards, and the teacher's compute copy as one flat buffer per parameter group.

    teacher <- m teacher + (1 - m) student. A rank updates 1 / world_size of it and writes its part of the compute
    copy in the same pass; one all-gather per group refreshes the rest. At fp32 the shard is that part itself.
    """

    def __init__(self, zero: Zero, model: Harmony, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._layouts: list[list[tuple[str, torch.Size]]] = []
        self.shards: list[Tensor] = []
        teacher_of = {id(student): teacher for teacher, student in twins(model.teacher, model.student)}
        names = {id(parameter): f"teacher.{name}" for name, parameter in model.teacher.named_parameters()}
        for group, parameters, source in zero.shards():
            if group["twin"]:
                targets = [teacher_of[id(p)] for p in parameters]
                self._layouts.append([(names[id(t)], t.shape) for t in targets])
                self._adopt(targets, source, zero.dtype)

    def update(self, momentum: float) -> None:
        """Move the teacher towards the student."""
        for shard, source, copy in zip(self.shards, self._sources, self._copies, strict=True):
            part = self._part(copy)
            ema_update_(shard, source.detach(), momentum, None if shard.data_ptr() == part.data_ptr() else part)
        self._refresh()

    def load(self, shards: list[Tensor]) -> None:
        """Take over this rank's saved shards."""
        for shard, copy, saved in zip(self.shards, self._copies, shards, strict=True):
            shard.copy_(saved)
            self._part(copy).copy_(shard)
        self._refresh()

    def full_precision(self) -> dict[str, Tensor]:
        """The whole teacher in fp32 on the host, by parameter name; all ranks must call."""
        state = {}
        for shard, layout in zip(self.shards, self._layouts, strict=True):
            flat = gather_shards(shard, self._ranks)
            state.update(unflatten(flat, layout))
        return state

    def _adopt(self, targets: list[torch.nn.Parameter], source: Tensor, dtype: torch.dtype) -> None:
        """Make teacher parameters views of one flat buffer in the order of the optimizer's partition."""
        flat = torch.zeros(source.numel() * self._ranks.world_size, dtype=dtype, device=source.device)
        place = 0
        for target in targets:
            part = flat[place : place + target.numel()]
            part.copy_(target.data.flatten())
            target.data = part.view_as(target)
            place += target.numel()
        self._copies.append(flat)
        self._sources.append(source)
        own = self._part(flat)
        self.shards.append(own if dtype == torch.float32 else source.detach().clone())

    def _part(self, flat: Tensor) -> Tensor:
        """This rank's part of a flat buffer."""
        return flat.chunk(self._ranks.world_size)[self._ranks.rank]

    def _refresh(self) -> None:
        """Bring the other ranks' parts of the compute copy here."""
        if self._ranks.world_size > 1:
            for copy in self._copies:
                dist.all_gather_into_tensor(copy, self._part(copy).clone())


def gather_shards(shard: Tensor, ranks: Ranks) -> Tensor:
    """One rank's shards of all ranks, end to end, on the host."""
    if ranks.world_size == 1:
        return shard.detach().cpu()
    flat = shard.new_empty(shard.numel() * ranks.world_size)
    dist.all_gather_into_tensor(flat, shard.detach().contiguous())
    return flat.cpu()


def unflatten(flat: Tensor, layout: list[tuple[str, torch.Size]]) -> dict[str, Tensor]:
    """Cut a flat buffer into named tensors; padding at the end is dropped."""
    named, place = {}, 0
    for name, shape in layout:
        named[name] = flat[place : place + shape.numel()].view(shape)
        place += shape.numel()
    return named
