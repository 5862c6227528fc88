"""Where DeepSpeed keeps the fp32 master weights of each ZeRO stage, and the EMA teacher's compute copy beside them.

A shard is a run of fp32 master weights on this rank: the whole of one parameter (stage 0), this rank's part of a
group's flat buffer (stages 1, 2), or this rank's parts of a group's parameters, end to end (stage 3). The teacher's
shards lie in the same order, so that the EMA is one elementwise operation per shard whatever the stage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import Ranks


@dataclass
class Shard:
    """A run of fp32 master weights on this rank."""

    group: dict[str, Any]
    """Settings of its parameter group (see `optimizer.parameter_groups`)"""
    parameters: list[nn.Parameter]
    """Those it is of, in its order"""
    state_key: Tensor
    """What the optimizer keeps its moments under"""

    @property
    def master(self) -> Tensor:
        """The weights: fp32 [n]."""
        return self.state_key.detach().view(-1)


class Partition(ABC):
    """Which part of every parameter this rank keeps."""

    def __init__(self, engine: Any, optimizer: Any, groups: list[dict[str, Any]], ranks: Ranks) -> None:
        self.engine, self.optimizer, self.groups, self.ranks = engine, optimizer, groups, ranks

    @abstractmethod
    def shards(self) -> list[Shard]:
        """This rank's master weights."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Between the last backward pass and the step: this rank's part of each averaged gradient, to be changed in
        place. A parameter may come up on several ranks with different parts of it."""

    def complete_gradients(self) -> None:  # noqa: B027 - where ranks are reduced, that does it
        """After the last backward pass: zeros for parameters that it did not reach."""

    def clear_gradients(self) -> None:  # noqa: B027 - most stages have nothing to do
        """After a step: forget the gradients, where DeepSpeed does not do it by itself."""

    @abstractmethod
    def parts(self, shard: Shard) -> list[Tensor]:
        """This rank's part of the master weights of each of the shard's parameters; may be empty."""

    @abstractmethod
    def whole(self, flat: Tensor, shard: Shard) -> list[Tensor]:
        """The full tensors, on the host, of something laid out as a shard, one for each of its parameters. All ranks
        must call."""

    def cut(self, whole: list[Tensor], shard: Shard) -> Tensor:
        """The inverse of `whole`: this rank's part [n] of full tensors, one for each parameter; padding is 0. All ranks
        must call. Where an element lies is found by asking where numbered elements end up."""
        size, rank = shard.master.numel(), self.ranks.rank
        numbered = torch.arange(size, device=shard.master.device) + rank * size
        part = torch.zeros(size, dtype=whole[0].dtype)
        for place, value in zip(self.whole(numbered, shard), whole, strict=True):
            mine = place // size == rank
            part[place[mine] % size] = value.cpu()[mine]
        return part

    @abstractmethod
    def adopt(self, targets: list[nn.Parameter], shard: Shard, dtype: torch.dtype) -> Tensor:
        """Lay the teacher's parameters out as the shard of their twins: this rank's part of the compute copy, flat,
        which the teacher reads from then on (after `refresh`)."""

    @abstractmethod
    def refresh(self) -> None:
        """After the compute copies have changed: let the teacher's parameters follow on all ranks."""


class Replicated(Partition):
    """Stage 0: every rank has everything."""

    def shards(self) -> list[Shard]:
        """One per parameter."""
        masters = getattr(self.optimizer, "fp32_groups", self._parameters())
        return [
            Shard(group, [parameter], master)
            for group, parameters, of_group in zip(self.groups, self._parameters(), masters, strict=True)
            for parameter, master in zip(parameters, of_group, strict=True)
        ]

    def _parameters(self) -> list[list[nn.Parameter]]:
        """By group. In half precision DeepSpeed puts the fp32 weights in the place of the optimizer's parameters."""
        return getattr(self.optimizer, "fp16_groups", [group["params"] for group in self.groups])

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Whole gradients."""
        return ((p, p.grad) for parameters in self._parameters() for p in parameters if p.grad is not None)

    def complete_gradients(self) -> None:
        """As DeepSpeed does where it reduces: AdamW would leave a parameter without a gradient out."""
        for parameter in (p for parameters in self._parameters() for p in parameters if p.grad is None):
            parameter.grad = torch.zeros_like(parameter)

    def parts(self, shard: Shard) -> list[Tensor]:
        """All of the one parameter."""
        return [shard.master]

    def whole(self, flat: Tensor, shard: Shard) -> list[Tensor]:
        """It is whole already."""
        return [flat.detach().cpu().view(shard.parameters[0].shape)]

    def adopt(self, targets: list[nn.Parameter], shard: Shard, dtype: torch.dtype) -> Tensor:
        """The teacher's parameter itself."""
        return targets[0].data.view(-1)

    def refresh(self) -> None:
        """Every rank has moved its own."""


class Flat(Partition):
    """Stages 1 and 2: the parameters of a group end to end, padded, cut in equal parts."""

    def __init__(self, engine: Any, optimizer: Any, groups: list[dict[str, Any]], ranks: Ranks) -> None:
        super().__init__(engine, optimizer, groups, ranks)
        self._copies: list[Tensor] = []

    def shards(self) -> list[Shard]:
        """One per parameter group."""
        z = self.optimizer
        parts = zip(self.groups, z.round_robin_bit16_groups, z.single_partition_of_fp32_groups, strict=True)
        return [Shard(group, list(parameters), part) for group, parameters, part in parts]

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Of the parameters, the first and last perhaps cut, that lie in this rank's part."""
        for i, parameters in enumerate(self.optimizer.params_in_partition):
            # The list of gradients may end with padding.
            yield from zip(parameters, self.optimizer.averaged_gradients[i], strict=False)

    def clear_gradients(self) -> None:
        """With offload DeepSpeed adds up gradients in host buffers, and overwrites only those of parameters that a
        step's first backward pass reaches."""
        for buffer in getattr(self.optimizer, "accumulated_grads_in_cpu", {}).values():
            buffer.zero_()

    def parts(self, shard: Shard) -> list[Tensor]:
        """Where each parameter's run of the group meets this rank's."""
        size = shard.master.numel()
        begin, parts = -self.ranks.rank * size, []
        for parameter in shard.parameters:
            end = begin + parameter.numel()
            parts.append(shard.master[min(max(begin, 0), size) : min(max(end, 0), size)])
            begin = end
        return parts

    def whole(self, flat: Tensor, shard: Shard) -> list[Tensor]:
        """All ranks' parts end to end, cut by parameter."""
        everything = self.ranks.stack(flat).flatten().cpu()
        named, place = [], 0
        for parameter in shard.parameters:
            named.append(everything[place : place + parameter.numel()].view(parameter.shape))
            place += parameter.numel()
        return named

    def adopt(self, targets: list[nn.Parameter], shard: Shard, dtype: torch.dtype) -> Tensor:
        """Teacher parameters become views of one flat buffer over all ranks."""
        flat = torch.zeros(shard.master.numel() * self.ranks.world_size, dtype=dtype, device=targets[0].device)
        place = 0
        for target in targets:
            part = flat[place : place + target.numel()]
            part.copy_(target.data.flatten())
            target.data = part.view_as(target)
            place += target.numel()
        self._copies.append(flat)
        return self._part(flat)

    def refresh(self) -> None:
        """Bring the other ranks' parts here: one all-gather per group."""
        if self.ranks.world_size > 1:
            for flat in self._copies:
                dist.all_gather_into_tensor(flat, self._part(flat).clone())

    def _part(self, flat: Tensor) -> Tensor:
        return flat.chunk(self.ranks.world_size)[self.ranks.rank]


class Scattered(Partition):
    """Stage 3: every parameter cut in equal parts, padded; a rank's parts of a group end to end."""

    def __init__(self, engine: Any, optimizer: Any, groups: list[dict[str, Any]], ranks: Ranks) -> None:
        super().__init__(engine, optimizer, groups, ranks)
        self._kept_whole: list[_CutParameter] = []

    def shards(self) -> list[Shard]:
        """One per group, or more where DeepSpeed cuts a group (`sub_group_size`)."""
        z = self.optimizer
        return [
            Shard(self.groups[z.sub_group_to_group_id[i]], list(parameters), part)
            for i, (parameters, part) in enumerate(zip(z.fp16_groups, z.fp32_partitioned_groups_flat, strict=True))
        ]

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Refused by the configuration: DeepSpeed gives no place to change them in."""
        raise NotImplementedError("gradients cannot be changed under ZeRO stage 3")

    def clear_gradients(self) -> None:
        """DeepSpeed overwrites the gradients of a step's first backward pass and adds those of the others; a parameter
        that the first pass does not reach would add to the last step's gradient."""
        self.optimizer.grad_partitions_flat_buffer.zero_()

    def parts(self, shard: Shard) -> list[Tensor]:
        """The parameters' parts in their order."""
        return list(shard.master.split([p.ds_tensor.ds_numel for p in _as_cut(shard.parameters)]))

    def whole(self, flat: Tensor, shard: Shard) -> list[Tensor]:
        """All ranks' parts of each parameter, joined."""
        everything, named, place = self.ranks.stack(flat).cpu(), [], 0
        for parameter in _as_cut(shard.parameters):
            part = parameter.ds_tensor.ds_numel
            full = everything[:, place : place + part].flatten()[: parameter.ds_numel]
            named.append(full.view(parameter.ds_shape))
            place += part
        return named

    def adopt(self, targets: list[nn.Parameter], shard: Shard, dtype: torch.dtype) -> Tensor:
        """The teacher's own partitioned parts become views of one flat buffer."""
        cut = _as_cut(targets)
        flat = torch.zeros(sum(t.ds_tensor.numel() for t in cut), dtype=dtype, device=cut[0].ds_tensor.device)
        place = 0
        for target in cut:
            part = flat[place : place + target.ds_tensor.numel()]
            part.copy_(target.ds_tensor.data)
            target.ds_tensor.data = part
            place += part.numel()
        self._kept_whole += [target for target in cut if target.ds_persist]
        return flat

    def refresh(self) -> None:
        """Nothing for parameters that are gathered at every use; small ones are kept whole, so gather them again."""
        if self._kept_whole:
            self._kept_whole[0].partition(self._kept_whole)
            self._kept_whole[0].all_gather(self._kept_whole)


if TYPE_CHECKING:  # what DeepSpeed hangs on parameters; nothing is of these classes

    class _Part(Tensor):
        ds_numel: int

    class _CutParameter(nn.Parameter):
        """A parameter in stage 3."""

        ds_tensor: _Part
        """This rank's"""
        ds_numel: int
        ds_shape: torch.Size
        ds_persist: bool
        """Whether it is small, and kept whole"""

        def partition(self, parameters: list[_CutParameter]) -> None: ...

        def all_gather(self, parameters: list[_CutParameter]) -> None: ...


def _as_cut(parameters: list[nn.Parameter]) -> list[_CutParameter]:
    return cast("list[_CutParameter]", parameters)


PARTITIONS: dict[int, type[Partition]] = {0: Replicated, 1: Flat, 2: Flat, 3: Scattered}
"""By ZeRO stage"""
