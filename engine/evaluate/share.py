"""How ranks share the work of an evaluation: each encodes every so many-th picture, then all have all features; and the
progress bar, which one of them shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's part of the work: items rank, rank + world_size, ..."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """This rank's items."""
        return islice(iter(items), self.rank, None, self.world_size)

    def count(self, total: int) -> int:
        """How many of `total` items are this rank's."""
        return len(range(self.rank, total, self.world_size))

    def shown(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        """The items as they are, with a progress bar on the main rank's terminal. total: how many; None: not known."""
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not (self.is_main and console.is_terminal)) as bar:
            yield from bar.track(items, total=total, description=what)

    def merged(self, items: list[T]) -> list[T]:
        """The items of all ranks, rank by rank. All ranks must call."""
        if self.world_size == 1:
            return items
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows, float32 [n of this rank, ...], of all ranks on the host, rank by rank. All ranks must call."""
        if self.world_size == 1:
            return rows
        counts = self.merged([len(rows)])
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        padded = torch.zeros(max(counts), *rows.shape[1:], device=device)
        padded[: len(rows)] = rows.to(device)
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks. All ranks must call."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.all_reduce(tensor.data)
            tensor.data /= self.world_size


ALONE = Share()
