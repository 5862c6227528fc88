"""The configuration of a run: typed, from YAML and `key=value` overrides; an unknown key is refused with the nearest
valid one."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..harmony.config import Config, Fraction
from ..harmony.model import MethodConfig
from .data.augment import AugmentConfig
from .errors import UserError

# What `reference_compat: true` sets where the configuration says nothing: the authors' code, not its intention.
REFERENCE_COMPAT = {
    "objectives.contrastive.max_logit_scale": None,
    "objectives.self_distillation.temperature_by_epoch": True,
    "objectives.self_distillation.patch_center": "all",
    "objectives.text_distillation.temperature_by_epoch": True,
    "objectives.text_distillation.center_of": "probabilities",
    "objectives.reconstruction.position_embedding": "zeros",
}


class DataConfig(Config):
    """Where the samples come from, and how many make a batch."""

    train: Path
    """The .beton file to train on (made by `harmony-fast prepare`)."""
    prepare_from: list[str] = Field(default=[])
    """Webdataset tars that `train` is made from when it does not exist yet."""
    batch_size: PositiveInt = 768
    """Samples of an optimizer step, over all ranks."""
    workers: PositiveInt | None = None
    """Decoding threads per rank; null: the processor cores divided among the ranks."""
    augment: AugmentConfig = AugmentConfig()


class OptimizerConfig(Config):
    """AdamW, its schedules, and the EMA teacher's (Harmony, section 4)."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate per 256 samples of the batch."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: NonNegativeFloat = 3
    """Epochs of linear warm-up from 0; may be a fraction."""
    weight_decay: NonNegativeFloat = 0.04
    weight_decay_end: NonNegativeFloat = 0.4
    """Weight decay moves from the one to the other along a cosine."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    clip_grad: NonNegativeFloat = 3.0
    """Largest global norm of the gradient; 0: no clipping."""
    ema_momentum: Fraction = 0.996
    ema_momentum_end: Fraction = 1.0
    """Momentum of the EMA teacher moves from the one to the other along a cosine."""


class ZeroConfig(Config):
    """What DeepSpeed shards over the ranks."""

    stage: Literal[1, 2] = 1
    """1: optimizer states and EMA; 2: gradients too."""


class EvaluateConfig(Config):
    """Labelled sets for `harmony-fast evaluate` and the report."""

    data: list[str] = Field(default=[])
    """Webdataset tars with captions and labels: the queries."""
    bank: list[str] = Field(default=[])
    """Webdataset tars: the labelled bank of the nearest-neighbour classifier."""
    class_key: str = "name"
    """Label that zero-shot classification predicts, as text."""
    group_key: str = "subcategory"
    """Label that the nearest-neighbour classifier predicts."""
    templates: list[str] = Field(default=["{}"])
    """Prompts of the zero-shot classifier; {} stands for the class."""
    neighbours: PositiveInt = 10
    branch: Literal["teacher", "student"] = "teacher"
    """Which weights to evaluate: the EMA teacher's, where there is one, or the student's."""


class RunConfig(MethodConfig):
    """Everything a run depends on."""

    run_dir: Path = Path("runs/default")
    """Folder of checkpoints, logs, metrics and the report."""
    seed: int = Field(0, ge=0)
    epochs: PositiveInt = 25
    """Length of all schedules."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; schedules keep their length."""
    log_every: PositiveInt = 10
    """Steps between two lines of the log."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; there is one at the end as well."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward passes; optimizer and EMA are fp32 always."""
    reference_compat: bool = False
    """Do what the authors' code does wherever that differs from what was meant (see REFERENCE_COMPAT)."""
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _reference_compat(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("reference_compat") is True:
            for key, value in REFERENCE_COMPAT.items():
                *path, last = key.split(".")
                node: Any = given
                for part in path:
                    node = node.get(part) if isinstance(node, dict) else None
                if isinstance(node, dict):
                    node.setdefault(last, value)
        return given

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> RunConfig:
        for template in self.evaluate.templates:
            if "{}" not in template:
                raise ValueError(f"evaluate.templates: '{template}' has no {{}} for the class name")
        return self


def load_config(path: Path, overrides: list[str] = []) -> RunConfig:  # noqa: B006 - never changed
    """Read a YAML file, apply `a.b=value` overrides, check everything. Raises UserError with one line per problem."""
    raw = _read_yaml(path)
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, str(path))


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A copy with `a.b=value` settings applied and checked. Raises UserError."""
    raw = config.model_dump(mode="json")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, "settings")


def parse_config(raw: dict[str, Any], origin: str) -> RunConfig:
    """Typed configuration from plain data. origin: what messages call it."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(dict(e)) for e in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(problems)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Keys (dotted) whose values differ."""
    left, right = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return [key for key in left | right if left.get(key) != right.get(key)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values, found {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key in nested plain data."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *path, last = key.split(".")
    node = raw
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value


def _explain(error: dict[str, Any]) -> str:
    """One problem in words, with the nearest valid key for one that is unknown."""
    location = tuple(str(part) for part in error["loc"])
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, 1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        hint = f"did you mean '{prefix + '.' if prefix else ''}{near[0]}'?" if near else f"valid: {', '.join(valid)}"
        return f"unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"'{key}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = f" (given: {error['input']!r})" if location and not isinstance(error["input"], dict) else ""
    return f"'{key}': {message}{shown}" if location else message


def _valid_keys(location: tuple[str, ...]) -> list[str]:
    """The keys of the configuration part at this place."""
    model: Any = RunConfig
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        candidates = _members(field.annotation) if field else []
        model = next((c for c in candidates if hasattr(c, "model_fields")), None)
    return sorted(model.model_fields) if model is not None else []


def _members(annotation: Any) -> list[Any]:
    """The alternatives of `X | None`, or the annotation itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if union else [annotation]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
