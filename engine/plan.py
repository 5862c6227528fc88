"""The fastest setting that fits: micro-batch, passes, checkpointing, ZeRO stage, optimizer states, offload.

The global batch and the mathematics stay. Every setting is estimated from a few passes that were gone through on the
meta device (`memory`); the best ones are then gone through exactly, and only those that fit are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from .config import RunConfig, parse_config, plain
from .errors import UserError
from .live_bytes import GRADIENTS
from .memory import TAUGHT, Device, Memory, Passes, memory_of
from .nested import dotted
from .rates import Rates
from .scaling import sent_bytes
from .sizes import GIB
from .walks import Walks

QUANTISED_MUST_GAIN = 1.03
"""8-bit optimizer states are named before exact ones only where they are faster by this factor"""
ESTIMATED = 1.03
"""Settings that are estimated to exceed the budget by less than this are gone through, too"""


LESS = 0.98
"""If a setting turns out not to fit, the next one of its kind must be estimated to need this much of it at most"""


class Shape(NamedTuple):
    """How a rank's samples go through the model."""

    passes: str
    image: int
    """Every how many blocks of the image tower are computed again"""
    text: int

    @property
    def settings(self) -> dict[str, Any]:
        """Dotted keys."""
        return {"pass": self.passes, "activation_checkpointing.image": self.image,
                "activation_checkpointing.text": self.text}  # fmt: skip


SHAPES = [Shape("packed", 0, 0), Shape("packed", 3, 0), Shape("packed", 2, 0), Shape("packed", 1, 0),
          Shape("packed", 1, 1), Shape("split", 0, 0), Shape("split", 1, 1)]  # fmt: skip


class Sampled(NamedTuple):
    """Passes of one shape that were gone through."""

    micro: int
    one: Passes
    """One micro-batch of `micro` samples"""
    double: Passes
    """One of twice as many"""
    pair: Passes
    """Two of `micro`"""


@dataclass(frozen=True)
class Budget:
    """What a rank may use, bytes."""

    device: float
    host: float

    def fits(self, memory: Memory, doubt: float = 1.0) -> bool:
        """Whether both sides are within `doubt` times the budget."""
        return memory.total <= doubt * self.device and sum(memory.host.values()) <= doubt * self.host


@dataclass(frozen=True)
class Plan:
    """A setting with what it needs."""

    settings: dict[str, Any]
    """Dotted keys of the configuration"""
    memory: Memory
    seconds: dict[str, float]
    """Of an optimizer step, by part"""
    batch: int

    @property
    def samples_per_second(self) -> float:
        """Of all ranks."""
        return self.batch / sum(self.seconds.values())

    @property
    def overrides(self) -> list[str]:
        """`key=value`, as the command line takes them."""
        return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.settings.items()]

    @property
    def cost(self) -> float:
        """Seconds, with what quantisation must gain."""
        quantised = self.settings["optimizer.states"] == "8bit"
        return sum(self.seconds.values()) * (QUANTISED_MUST_GAIN if quantised else 1.0)


class Planner:
    """Plans for one configuration on some ranks; the passes are gone through once, for any number of budgets.

    A context manager: going through passes is shared among processes, which end with it.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: int,
        rates: Rates,
        device: Device = "cuda",
        keep: Collection[str] = (),
        report: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """device: whose memory it is. keep: keys whose value is the configuration's. report: told how many of the first
        passes are done. Raises UserError if the ranks cannot share the batch.
        """
        self.config, self.ranks, self.rates, self.device, self._report = config, ranks, rates, device, report
        self._own = config.data.samples_per_rank(ranks)
        auto = config.precision == "auto"
        self._precisions = ("bf16", "fp32") if auto and device == "cuda" else ("fp32",) if auto else (config.precision,)
        given = dotted(plain(config)) | {"data.micro_batch_size": config.data.micro_batch_size or self._own}
        if unknown := set(keep) - given.keys():
            raise UserError(f"--keep {', '.join(sorted(unknown))}: no such key")
        self._kept = {key: given[key] for key in keep}
        self._walks = Walks(ranks, device)

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self._walks.close()

    def search(self, budget: Budget, count: int = 4) -> list[Plan]:
        """The fastest plans that fit and differ in more than sizes, best first.

        Raises UserError if nothing fits: what the smallest setting needs, and which part of it is the largest.
        """
        found: dict[tuple, Plan] = {}
        bound = dict.fromkeys(map(_kind, self._estimates), ESTIMATED * budget.device)
        while len(found) < count:
            some: dict[tuple, Plan] = {}
            for plan in self._estimates:
                kind = _kind(plan)
                promising = plan.memory.total <= bound[kind] and budget.fits(plan.memory, ESTIMATED)
                if promising and kind not in found and len(some) < self._walks.cores:
                    some.setdefault(kind, plan)
            if not some:
                break
            for kind, exact in zip(some, self.examine(*(plan.settings for plan in some.values())), strict=True):
                if budget.fits(exact.memory):
                    found[kind] = exact
                else:  # others of its kind that are estimated to need as much would not fit either
                    bound[kind] = LESS * some[kind].memory.total
        if not found:
            few = sorted(self._estimates, key=lambda plan: plan.memory.total)[:3]
            smallest = min(self.examine(*(plan.settings for plan in few)), key=lambda plan: plan.memory.total)
            raise UserError(_nothing_fits(smallest, budget))
        return sorted(found.values(), key=lambda plan: plan.cost)[:count]

    def estimate(self, budget: Budget, rates: Rates) -> Plan | None:
        """The fastest plan that is estimated to fit, its passes not gone through; None if nothing does."""
        self.rates = rates
        self.__dict__.pop("_estimates", None)
        return next((plan for plan in self._estimates if budget.fits(plan.memory)), None)

    def examine(self, *choices: dict[str, Any]) -> list[Plan]:
        """Some settings, their passes gone through exactly; of many micro-batches, one more than graphs are kept of."""
        parts = [self._own // settings["data.micro_batch_size"] for settings in choices]
        gone = [min(n, max(self.config.kept_graphs, 1) + 1) for n in parts]
        sizes = [n * s["data.micro_batch_size"] * self.ranks for n, s in zip(gone, choices, strict=True)]
        configs = [self._with({**s, "data.batch_size": size}) for s, size in zip(choices, sizes, strict=True)]
        passes = self._walks(configs)
        return [self._plan(s, _many(p, g, n)) for s, p, g, n in zip(choices, passes, gone, parts, strict=True)]

    @cached_property
    def _estimates(self) -> list[Plan]:
        """Every allowed setting, the fastest first."""
        plans = []
        for (precision, shape), sampled in self._sampled.items():
            for micro in _divisors(self._own):
                expected = _expected(sampled, micro, self._own // micro)
                for layout in _layouts(self.ranks):
                    settings = {"precision": precision, "data.micro_batch_size": micro, **shape.settings, **layout}
                    if self._allows(settings):
                        try:
                            plans.append(self._plan(settings, expected))
                        except UserError:
                            continue  # a combination that the engine refuses
        if not plans:
            raise UserError(f"no setting has {', '.join(f'{k}={v}' for k, v in self._kept.items())}")
        return sorted(plans, key=lambda plan: plan.cost)

    @cached_property
    def _sampled(self) -> dict[tuple[str, Shape], Sampled]:
        """Each precision and shape at two sizes of the micro-batch, and with two micro-batches."""
        micro = max(d for d in _divisors(self._own) if d <= max(8, self._own // 64))
        kinds = [
            (precision, shape)
            for precision, shape in product(self._precisions, SHAPES)
            if self._allows(shape.settings) and self._allows({"precision": precision})
        ]
        configs = []
        for precision, shape in kinds:
            for size, parts in ((micro, 1), (2 * micro, 1), (micro, 2)):
                sizes = {"data.batch_size": size * parts * self.ranks, "data.micro_batch_size": size}
                base = {"zero.stage": 1, "zero.offload_parameters": False, "precision": precision}
                configs.append(self._with({**shape.settings, **sizes, **base}))
        passes = self._walks(configs, self._report)
        found: dict[tuple[str, Shape], Sampled] = {}
        for k, kind in enumerate(kinds):
            sampled = Sampled(micro, *passes[3 * k : 3 * k + 3])
            if sampled not in found.values():  # one objective alone is split into one pass
                found[kind] = sampled
        return found

    def _allows(self, settings: dict[str, Any]) -> bool:
        return all(settings.get(key, value) == value for key, value in self._kept.items())

    def _with(self, settings: dict[str, Any]) -> RunConfig:
        raw = plain(self.config)
        for key, value in settings.items():
            *path, last = key.split(".")
            node = raw
            for part in path:
                node = node[part]
            node[last] = value
        return parse_config(raw, "plan")

    def _plan(self, settings: dict[str, Any], passes: Passes) -> Plan:
        chosen = self._with(settings)
        time = seconds(chosen, self.ranks, passes, self.rates)
        return Plan(settings, memory_of(chosen, self.ranks, passes, self.device), time, self.config.data.batch_size)


def seconds(config: RunConfig, ranks: int, passes: Passes, rates: Rates) -> dict[str, float]:
    """Of an optimizer step, by part.

    compute: products at the rate of products, and what operators write, read twice and written once, at the memory's;
    not less than the time it takes to launch them. communication: what `scaling.sent_bytes` says, of which half of the
    compute hides some, but three quarters at most. optimizer: AdamW and the EMA move eight fp32 numbers a parameter of
    this rank's share, in the device's memory or in the host's. transfer: gradients to the host and weights back.
    """
    element, stage = 4 if config.precision == "fp32" else 2, config.zero.stage
    products = rates.flops if element == 2 else rates.single if config.tf32 else rates.single / 4
    compute = max(passes.flops / products + 3 * passes.written / rates.memory, passes.calls * rates.launch)
    sent = sent_bytes(passes.sizes, stage, ranks, element) / rates.link if ranks > 1 else 0.0
    share = passes.sizes.trained / (ranks if stage else 1)
    host = config.zero.offload_optimizer
    moved = 2 * element * share if host else 0.0
    if config.zero.offload_parameters:
        moved += 3 * element * (passes.sizes.trained + passes.sizes.twins) / ranks
    return {
        "compute": compute,
        "communication": max(sent - compute / 2, sent / 4),
        "optimizer": 32 * share / (rates.host_memory if host else rates.memory),
        "transfer": moved / rates.host_link,
    }


def _layouts(ranks: int) -> Iterator[dict[str, Any]]:
    """ZeRO stages, optimizer states and offload that make sense on so many ranks."""
    for stage, states, host in product((1, 2, 3) if ranks > 1 else (1,), ("fp32", "8bit"), (False, True)):
        yield {"zero.stage": stage, "optimizer.states": states, "zero.offload_optimizer": host,
               "zero.offload_parameters": False}  # fmt: skip
    yield {"zero.stage": 3, "optimizer.states": "fp32", "zero.offload_optimizer": True, "zero.offload_parameters": True}


def _expected(known: Sampled, micro: int, parts: int) -> Passes:
    """Bytes along the line through two sizes; several micro-batches differ from one as two did."""
    t = micro / known.micro - 1

    def line(a: float, b: float) -> float:
        return max(a + (b - a) * t, 0.0)

    one, double, pair = known.one, known.double, known.pair
    peak = {k: line(one.peak.get(k, 0.0), double.peak.get(k, 0.0)) for k in one.peak.keys() | double.peak.keys()}
    # Products are in proportion to the samples, but for what stochastic depth rounds: least with the larger size.
    flops = double.flops * micro / (2 * known.micro)
    single = replace(one, peak=peak, flops=flops, written=line(one.written, double.written))
    if parts == 1:
        return single
    peak = {k: size * pair.peak.get(k, 0.0) / one.peak[k] for k, size in peak.items() if one.peak.get(k)}
    peak[GRADIENTS] = pair.peak.get(GRADIENTS, 0.0)
    both = replace(
        pair, peak=peak, flops=single.flops * pair.flops / one.flops,
        written=single.written * pair.written / one.written,
    )  # fmt: skip
    return _many(both, 2, parts)


def _many(passes: Passes, gone: int, parts: int) -> Passes:
    """Passes of `gone` micro-batches as those of `parts`: as much at a time, but for what the teacher made of each,
    which is kept."""
    ratio = parts / gone
    if ratio == 1:
        return passes
    peak = {**passes.peak, TAUGHT: passes.peak.get(TAUGHT, 0.0) * ratio}
    return replace(
        passes, peak=peak, flops=passes.flops * ratio, written=passes.written * ratio, calls=round(passes.calls * ratio)
    )


def _kind(plan: Plan) -> tuple:
    """What tells plans apart that are worth naming side by side: not sizes, stage or states."""
    same = ("precision", "pass", "activation_checkpointing.image", "zero.offload_optimizer", "zero.offload_parameters")
    return tuple(plan.settings[key] for key in same)


def _nothing_fits(smallest: Plan, budget: Budget) -> str:
    part, size = max(smallest.memory.parts.items(), key=lambda item: item[1])
    host = sum(smallest.memory.host.values())
    needs = f"{_gib_above(smallest.memory.total)} GiB"
    needs += f" and {_gib_above(host)} GiB of host memory a rank" if host else ""
    return (
        f"nothing fits in {budget.device / GIB:.2f} GiB: the smallest setting needs {needs}, the largest part of it "
        f"{part} with {size / GIB:.2f} GiB ({' '.join(smallest.overrides)})"
    )


def _gib_above(size: float) -> float:
    return math.ceil(size / GIB * 100) / 100


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
