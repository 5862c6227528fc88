"""What a recipe becomes under a sweep's budget: its own objectives and views, everybody's towers, data and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harmony.objectives import REGISTRY
from .config import RunConfig, load_config, parse_config
from .data import ensure_data
from .data.beton_set import BetonSet
from .errors import UserError
from .nested import merged, read_yaml
from .shipped import CONFIGS, find_config, nearest_configs, shipped_configs

DEMO = CONFIGS / "demo.yaml"
OBJECTIVE_SIZES = frozenset(
    {"prototypes", "patch_prototypes", "hidden", "bottleneck", "layers", "embed_dim", "width", "depth", "heads"}
)
VIEW_SIZES = frozenset({"global_size", "local_size"})
LOGGED = 40
"""Lines of the log that a run has at least, if it has so many steps."""

Raw = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What all recipes of a sweep share."""

    name: str
    """Of the data, as it was given."""
    raw: Raw
    """The keys of the shared configuration that somebody set."""
    config: RunConfig
    samples: int
    """In the training data."""
    steps: int
    """Optimizer steps of every run."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data."""
        return self.samples // self.config.data.batch_size

    @property
    def share(self) -> float:
        """Of the length that the shared configuration has itself."""
        return self.steps / (self.config.epochs * self.steps_per_epoch)

    def described(self) -> Raw:
        """What makes two budgets different, as plain data; the shared configuration without its objectives."""
        shared = {key: value for key, value in self.raw.items() if key not in ("run_dir", "evaluate", "objectives")}
        sizes = {"steps": self.steps, "batch_size": self.config.data.batch_size, "samples": self.samples}
        return {"data": self.name, **sizes, "shared": shared}


def settle_budget(data: str, overrides: list[str], steps: int | None) -> Budget:
    """The shared configuration, with its training file made where it can be.

    data: `demo` or another of the project's own configurations, a configuration file, or a `.beton` file (with the
    demo's towers and settings). steps: None takes the configuration's own length. Raises UserError.
    """
    if data.endswith(".beton"):
        context = BetonSet([Path(data)]).context
        own = [f"data.train={data}", "data.prepare_from=[]", f"model.text.context={context}"]
        config = load_config(DEMO, [*own, "evaluate.data=[]", "evaluate.bank=[]", *overrides])
    elif data.endswith((".yaml", ".yml")) or data in shipped_configs():
        config = load_config(Path(data), overrides)
    else:
        meant = "give demo, a .beton file, or a configuration (.yaml, or its name) that all recipes share"
        raise UserError(f"--data {data}: {meant}; {nearest_configs(data)}")
    ensure_data(config)
    samples = count_samples(config)
    if samples < config.data.batch_size:
        raise UserError(f"{data}: has {samples} samples, less than one batch of {config.data.batch_size}")
    own_length = min(config.epochs * (samples // config.data.batch_size), config.max_steps or math.inf)
    raw = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return Budget(data, raw, config, samples, steps or int(own_length))


def count_samples(config: RunConfig) -> int:
    """Samples of the training data. Raises UserError where only reading all of it would tell."""
    if config.data.loader == "ffcv":
        return len(BetonSet(config.data.sources))
    if config.data.samples is None:
        raise UserError("data.samples is not set: say how many samples the shards hold")
    return config.data.samples


def under_budget(recipe: Path, budget: Budget, seed: int, run_dir: Path) -> RunConfig:
    """The configuration of one run. Raises UserError if the recipe is none, or cannot be had with the shared sizes.

    From the recipe: which objectives are on, and the keys of `objectives` and `views` that it sets, sizes excepted.
    From the shared configuration: all else. Lengths in epochs shrink with the budget, so that schedules keep their
    shape; the epochs themselves are whole, so a budget of whole epochs sees its schedules to the end.
    """
    active = load_config(recipe).objectives.active()
    own = recipe_keys(recipe)
    views = {key: value for key, value in own.get("views", {}).items() if key not in VIEW_SIZES}
    objectives = {name: _objective(name, own.get("objectives", {}).get(name) or {}, budget) for name in active}
    raw = {
        **budget.raw,
        "run_dir": str(run_dir),
        "seed": seed,
        "epochs": math.ceil(budget.steps / budget.steps_per_epoch),
        "max_steps": budget.steps,
        "log_every": min(budget.config.log_every, max(budget.steps // LOGGED, 1)),
        "keep_checkpoints": 1,
        "views": _shortened({**budget.raw.get("views", {}), **views}, budget.config.views, budget.share),
        "objectives": objectives,
        "optimizer": _shortened(budget.raw.get("optimizer", {}), budget.config.optimizer, budget.share),
    }
    return parse_config(raw, str(recipe))


def recipe_keys(path: Path) -> Raw:
    """What a configuration sets itself, on its way from the base that it and its relatives have in common.

    Without a base: everything. The file at the root of the chain of bases gives towers, data and schedule, which a
    sweep takes from elsewhere.
    """
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    above = find_config(base, path.parent)
    return merged(recipe_keys(above) if "base" in read_yaml(above) else {}, raw)


def _objective(name: str, own: Raw, budget: Budget) -> Raw:
    """Keys of one objective. One that the shared configuration does not have takes the sizes of its relatives there."""
    shared = budget.raw.get("objectives", {})
    known = shared.get(name)
    if known is None:
        sizes: Raw = {}
        for other in shared.values():
            sizes = {**(other or {}), **sizes}
        known = {key: sizes[key] for key in OBJECTIVE_SIZES & sizes.keys() & REGISTRY[name].Config.model_fields.keys()}
    keys = {**known, **{key: value for key, value in own.items() if key not in OBJECTIVE_SIZES}}
    return _shortened(keys, REGISTRY[name].Config(**keys), budget.share)


def _shortened(keys: Raw, config: Any, share: float) -> Raw:
    """The keys, with every length in epochs, given or by default, multiplied by `share`."""
    out = dict(keys)
    for key, field in type(config).model_fields.items():
        if key.endswith("_epochs") or key == "freeze_last_layer":
            length = getattr(config, key) * share
            out[key] = round(length) if field.annotation is int else length
    return out
