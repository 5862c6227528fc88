"""`memory: auto`: a run takes the plan for the memory found, and the next one if memory runs out in its first step.

RUN/plan.json keeps the plans, the best first, and how many of them have failed, so that a run that goes on does not
search again, and a process that starts again after a failure takes the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .backends import has_bf16, settle_precision
from .config import RunConfig, load_config, plain, with_overrides
from .disk import replace_text
from .distributed import Ranks
from .errors import StartAgain, UserError
from .host_memory import host_memory
from .measure import is_out_of_memory, measure_rates
from .memory import CONTEXT, Device
from .nested import dotted
from .plan import Budget, Plan, Planner
from .sizes import GIB, size_of

FILE = "plan.json"
PLANNED = (
    "data.micro_batch_size", "pass", "activation_checkpointing.", "zero.", "optimizer.states", "precision",
)  # fmt: skip
"""Keys that a plan settles; the search does not start from them, but for the precision"""
BESIDE = (
    "run_dir", "max_", "log_every", "checkpoint_every", "keep_", "evaluate", "watchdog", "on_divergence",
    "data.workers",
)  # fmt: skip
"""Beginnings of keys that no plan depends on"""
SMALLER = (0.85, 0.7, 0.5)
"""Parts of what the best plan takes that the next ones may take"""
FIXED = ("optimizer.states", "precision")
"""Keys that stay once a run has a checkpoint"""


@dataclass
class Settled:
    """A configuration whose `memory` and `precision` are settled."""

    config: RunConfig
    predicted: float | None = None
    """Bytes of tensors that a rank is predicted to need, where a plan was made"""
    chosen: tuple[str, ...] = ()
    """What the plan settles, as `key=value`"""
    number: int = 0
    """Which plan this is"""
    more: bool = False
    """Whether there is a next one"""
    stepped: bool = False
    """To be set once a step has been done: from then on memory is not expected to run out"""

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn running out of memory inside into `StartAgain`, if another plan can be tried, or into a UserError."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            if self.more and not self.stepped:
                path = self.config.run_dir / FILE  # written by every rank that fails, but the same
                found = {**json.loads(path.read_text(encoding="utf-8")), "failed": self.number + 1}
                replace_text(path, json.dumps(found, indent=1))
                raise StartAgain(f"memory ran out in the first step ({reason}); going on with the next plan") from None
            raise UserError(
                f"memory ran out: {reason}; `harmony-fast plan` names settings that fit, `memory=auto` takes them"
            ) from None


def settle(config: RunConfig, ranks: Ranks) -> Settled:
    """The configuration to train with on these ranks. All ranks must call. Raises UserError if nothing fits."""
    bf16 = has_bf16(ranks.device)
    if config.memory is None:
        return Settled(settle_precision(config, bf16))
    path, problem = config.run_dir / FILE, None
    found = _known(path, _key(config, ranks)) if ranks.is_main else None
    if ranks.any(ranks.is_main and found is None):
        rates, budget = measure_rates(ranks), _budget(config, ranks)
        if ranks.is_main:
            try:
                base, keep = _as_begun(config if bf16 else settle_precision(config, False))
                if ranks.device.type != "cuda":  # the host's memory is all there is
                    keep |= {"zero.offload_optimizer", "zero.offload_parameters"}
                print("memory: going through the passes to find what fits", flush=True)
                device: Device = "cuda" if ranks.device.type == "cuda" else "cpu"
                with Planner(base, ranks.world_size, rates, device, keep) as planner:
                    plans = _with_less_and_less(planner, budget)
                found = {"for": _key(config, ranks), "failed": 0}
                found["plans"] = [{"overrides": plan.overrides, "tensors": plan.memory.tensors} for plan in plans]
                replace_text(path, json.dumps(found, indent=1))
            except UserError as error:
                problem = error
    if ranks.any(problem is not None):
        raise problem or UserError("no settings that fit were found; the main rank says why")
    return _settled(config, json.loads(path.read_text(encoding="utf-8")))


def _settled(config: RunConfig, found: dict[str, Any]) -> Settled:
    number = found["failed"]
    plan = found["plans"][number]
    more = number + 1 < len(found["plans"])
    return Settled(with_overrides(config, plan["overrides"]), plan["tensors"], tuple(plan["overrides"]), number, more)


def _with_less_and_less(planner: Planner, budget: Budget) -> list[Plan]:
    """The fastest plan within the budget, and those within less: what to go on with if the prediction falls short."""
    plans = planner.search(budget, 1)
    with suppress(UserError):  # nothing fits any more
        for share in SMALLER:
            plans += planner.search(Budget(share * plans[0].memory.total, budget.host), 1)
    return plans


def _as_begun(config: RunConfig) -> tuple[RunConfig, set[str]]:
    """The configuration with what a checkpoint of this run has fixed, and the keys of that."""
    saved = config.run_dir / "config.yaml"
    if not (saved.is_file() and (config.run_dir / "checkpoints" / "latest").is_file()):
        return config, set()
    fixed = dotted(plain(load_config(saved)))
    return with_overrides(config, [f"{key}={fixed[key]}" for key in FIXED]), set(FIXED)


def _budget(config: RunConfig, ranks: Ranks) -> Budget:
    """What each rank may use: of a GPU what others leave, at the least of all ranks; of the host's memory its part."""
    host = host_memory() / ranks.local_size
    if config.memory != "auto":
        return Budget(size_of(str(config.memory), "memory"), host)
    if ranks.device.type != "cuda":
        return Budget(host, host)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(ranks.device)
    least = -ranks.most(-torch.tensor(min(free + CONTEXT, total), dtype=torch.float64))
    return Budget(float(least), host)


def _key(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """What plans depend on, as plain data."""
    apart = (*PLANNED[:-1], *BESIDE)
    given = {key: value for key, value in dotted(plain(config)).items() if not key.startswith(apart)}
    on_gpu = ranks.device.type == "cuda"
    total = torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else host_memory()
    return {"config": given, "ranks": ranks.world_size, "device": ranks.device.type, "memory_gib": total // GIB}


def _known(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["for"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
