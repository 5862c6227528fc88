"""The configuration of a run: typed, from YAML and `key=value` overrides; an unknown key is refused with the nearest
valid one."""

from __future__ import annotations

import copy
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
    field_validator,
    model_validator,
)

from ..harmony.config import Config, Fraction
from ..harmony.model import MethodConfig
from .data_config import DataConfig
from .errors import UserError
from .evaluate_config import EvaluateConfig
from .nested import apply_override, dotted, merged, read_yaml
from .shipped import find_config
from .sizes import size_of
from .stopping import seconds_of

# What `reference_compat: true` sets where the configuration says nothing: the authors' code, not its intention.
REFERENCE_COMPAT = {
    "optimizer.clip": "parameter",
    "optimizer.clip_only": ["student.image.", "student.heads.self_distillation."],
    "views.pixel_mask_ratio_by_epoch": True,
    "objectives.contrastive.max_logit_scale": None,
    "objectives.self_distillation.temperature_by_epoch": True,
    "objectives.self_distillation.patch_center": "all",
    "objectives.text_distillation.temperature_by_epoch": True,
    "objectives.text_distillation.center_of": "probabilities",
    "objectives.reconstruction.position_embedding": "zeros",
}


class OptimizerConfig(Config):
    """AdamW, its schedules, and the EMA teacher's (Harmony, section 4)."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate per 256 samples of the batch."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: NonNegativeFloat = 3
    """Epochs of linear warm-up from 0; may be a fraction."""
    weight_decay: NonNegativeFloat = 0.04
    """At the start."""
    weight_decay_end: NonNegativeFloat = 0.4
    """Weight decay moves from the one to the other along a cosine."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """Decay rates of AdamW's two moments."""
    eps: PositiveFloat = 1e-6
    """Added to the root of AdamW's second moment."""
    states: Literal["fp32", "8bit"] = "fp32"
    """Precision of AdamW's moments; 8bit: bitsandbytes' block-wise quantised AdamW."""
    clip_grad: NonNegativeFloat = 3.0
    """Largest norm of the gradient; 0: no clipping."""
    clip: Literal["global", "parameter"] = "global"
    """Whose norm: all parameters' together, or each parameter's by itself (the authors' code; ZeRO stages 0 to 2)."""
    clip_only: list[str] = Field(default=[])
    """With `clip: parameter`: clip only parameters whose names begin with one of these; none: all."""
    ema_momentum: Fraction = 0.996
    """At the start."""
    ema_momentum_end: Fraction = 1.0
    """Momentum of the EMA teacher moves from the one to the other along a cosine."""


class ZeroConfig(Config):
    """What DeepSpeed shards over the ranks, and what it keeps in host memory."""

    stage: Literal[0, 1, 2, 3] = 1
    """0: nothing is sharded; 1: optimizer states and EMA; 2: gradients too; 3: parameters too, also the teacher's."""
    offload_optimizer: bool = False
    """Keep optimizer states and fp32 weights in host memory and step there; stages 1 to 3."""
    offload_parameters: bool = False
    """Keep the parameters in host memory between uses; stage 3."""


class KernelsConfig(Config):
    """Which backend computes each kernel; HARMONY_FAST_KERNELS overrides all of them. `harmony-fast doctor` explains.

    auto: triton where it can (NVIDIA GPUs), else torch. triton, xformers: an error where they cannot.
    """

    attention: Literal["auto", "triton", "torch", "xformers"] = "auto"
    """Attention over packed sequences."""
    contrastive: Literal["auto", "triton", "torch"] = "auto"
    """The CLIP loss with hard and soft targets."""
    prototype_ce: Literal["auto", "triton", "torch"] = "auto"
    """Last layer and cross-entropy of the self-distillation heads."""
    ema: Literal["auto", "triton", "torch"] = "auto"
    """Moving average of the teacher with its low-precision copy."""


class CheckpointingConfig(Config):
    """Activation checkpointing: which blocks keep only their input and run again in the backward pass."""

    image: int = Field(0, ge=0)
    """Every how many blocks of the image tower and of the pixel decoder; 0: none, 1: all."""
    text: int = Field(0, ge=0)
    """Every how many blocks of the text tower and of the masked-word decoder."""


class RunConfig(MethodConfig):
    """Everything a run depends on."""

    run_dir: Path = Path("runs/default")
    """Folder of checkpoints, logs, metrics and the report."""
    seed: int = Field(0, ge=0)
    """Of the initial weights and of every draw: order, crops, masks, augmentation, stochastic depth."""
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
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides stay for ever."""
    max_time: str | PositiveInt | None = None
    """Save and stop in time for this much time to have passed: 23:50:00, 1-12:00:00 (days-hours:...); or seconds."""
    max_skipped_steps: int = Field(5, ge=0)
    """Steps in a row that are left out because their gradient is not finite; one more, and `on_divergence` comes."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """stop: end the run; rollback: go back to the last checkpoint and go on with the data in another order."""
    max_rollbacks: PositiveInt = 3
    """In all of the run."""
    watchdog: NonNegativeFloat = 10.0
    """A step that takes so many times the median is taken to hang: every rank's stacks are written to the run folder,
    and the run ends. 0: it never is."""
    watchdog_seconds: PositiveFloat = 300.0
    """It may take that long at any rate; the first step 15 times that."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of forward and backward passes; optimizer and EMA are fp32 always. auto: bf16 on GPUs that have it, else fp32.
    fp16 overflows sooner or later on millions of web images: its loss scaling then skips steps."""
    memory: str | None = None
    """auto: the fastest settings that fit the memory found, as `harmony-fast plan` chooses them, in place of those of
    micro-batch, passes, checkpointing, ZeRO stage, optimizer states and offload; or as if there were so much: 20GiB."""
    tf32: bool = True
    """On GPUs with `precision: fp32`: products with TensorFloat-32's ten bits of fraction, several times faster. With
    half precision, the little that is computed in fp32 (the contrast's logits) is so to the full."""
    compile: bool = False
    """torch.compile for the transformer blocks, meant for GPUs: it fuses what lies between the products. The first step
    takes a minute or so longer. Not in ZeRO stage 3."""
    pass_mode: Literal["packed", "split"] = Field("packed", alias="pass")
    """packed: one student pass for all objectives; split: one for each group of objectives that share no view, each
    with its own backward pass, so that less is held at a time. The gradients are the same."""
    kept_graphs: int = Field(1, ge=0)
    """Of how many micro-batches, in packed passes, the graph of the views that samples are compared by (those of
    `contrastive`) is kept until all are compared. Of the others these views go forward twice: a third more for CLIP
    alone, far less beside other objectives."""
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    reference_compat: bool = False
    """Do what the authors' code does wherever that differs from what was meant (see REFERENCE_COMPAT)."""
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    deepspeed: dict[str, Any] = Field(default={})
    """Merged into the generated DeepSpeed configuration, for experts; the result is written to the run folder."""
    evaluate: EvaluateConfig = EvaluateConfig()
    evaluate_every: PositiveInt | None = None
    """Steps between two evaluations while the run trains, logged as evaluate/...; null: none."""
    evaluate_tasks: list[Literal["zero-shot", "retrieval", "knn"]] = Field(default=[])
    """What is then evaluated; none: all of these that the run can do."""
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="before")
    @classmethod
    def _reference_compat(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("reference_compat") is True:
            given = copy.deepcopy(given)
            for key, value in REFERENCE_COMPAT.items():
                *path, last = key.split(".")
                node: Any = given
                for part in path:
                    if isinstance(node, dict) and path[0] != "objectives":
                        node.setdefault(part, {})
                    node = node.get(part) if isinstance(node, dict) else None  # an objective that is off stays off
                if isinstance(node, dict):
                    node.setdefault(last, value)
        return given

    @field_validator("max_time")
    @classmethod
    def _max_time_is_a_time(cls, given: str | int | None) -> str | int | None:
        if given is not None:
            try:
                seconds_of(given, "max_time")
            except UserError as error:
                raise ValueError(str(error)) from None
        return given

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_has_a_unit(cls, given: Any) -> Any:
        if given not in (None, "auto"):
            try:
                size_of(str(given), "memory")
            except UserError as error:
                raise ValueError(str(error)) from None
        return given

    @model_validator(mode="after")
    def _combination_works(self) -> RunConfig:
        stage, offload = self.zero.stage, self.zero.offload_optimizer
        refused = {
            "zero.offload_optimizer needs zero.stage 1, 2 or 3": offload and stage == 0,
            "zero.offload_parameters needs zero.stage 3": self.zero.offload_parameters and stage != 3,
            "optimizer.states 8bit has no host version: set zero.offload_optimizer false or states fp32": (
                offload and self.optimizer.states == "8bit"
            ),
            "optimizer.clip parameter needs zero.stage 0, 1 or 2: stage 3 gives no access to whole gradients": (
                self.optimizer.clip == "parameter" and stage == 3
            ),
            "optimizer.clip parameter cannot be used with zero.offload_optimizer": (
                self.optimizer.clip == "parameter" and offload
            ),
            "compile needs zero.stage 0, 1 or 2: stage 3 gathers parameters in the middle of what would be compiled": (
                self.compile and stage == 3
            ),
            "evaluate_every needs evaluate.data: what to evaluate on": (
                self.evaluate_every is not None and not self.evaluate.data
            ),
            "deepspeed.zero_optimization must be keys and values": (
                not isinstance(self.deepspeed.get("zero_optimization", {}), dict)
            ),
            "precision fp16 needs zero.stage 1, 2 or 3 for its loss scaling": self.precision == "fp16" and stage == 0,
        }
        for message, applies in refused.items():
            if applies:
                raise ValueError(message)
        return self


def load_config(path: Path, overrides: list[str] = []) -> RunConfig:  # noqa: B006 - never changed
    """Read a YAML file, apply `a.b=value` overrides, check everything. Raises UserError with one line per problem.

    path: or the name of one of the project's own. The file may name another one to start from (`base: ../cc3m.yaml`,
    seen from its own folder, or `base: cc3m`): its keys replace the base's one by one, null included, which switches
    an objective off.
    """
    raw = _read_with_base(find_config(path))
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, str(path))


def with_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A copy with `a.b=value` settings applied and checked. Raises UserError."""
    raw = plain(config)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, "settings")


def parse_config(raw: dict[str, Any], origin: str) -> RunConfig:
    """Typed configuration from plain data. origin: what messages call it."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for e in error.errors():
            problems.setdefault(_place(dict(e)), []).append(dict(e))
        raise UserError(f"{origin}: " + "; ".join(map(_explain, problems, problems.values()))) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as `parse_config` takes it."""
    return config.model_dump(mode="json", by_alias=True)


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Keys (dotted) whose values differ."""
    left, right = dotted(plain(one)), dotted(plain(other))
    return [key for key in left | right if left.get(key) != right.get(key)]


def _read_with_base(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's keys on top of those of its base. above: the files that led here."""
    if path.resolve() in above:
        raise UserError(f"{path}: is its own base ({' -> '.join(p.name for p in above)})")
    raw = read_yaml(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise UserError(f"{path}: 'base' must be the path of a configuration file (given: {base!r})")
    return merged(_read_with_base(find_config(base, path.parent), (*above, path.resolve())), raw)


def _place(error: dict[str, Any]) -> tuple[str, ...]:
    """The parts of the key that an error is about, without pydantic's names for the alternatives of a union."""
    place: list[str] = []
    for part in error["loc"]:
        unknown = isinstance(part, str) and place and part not in _valid_keys(tuple(place))
        if not unknown or error["type"] == "extra_forbidden":
            place.append(str(part))
    return tuple(place)


def _explain(location: tuple[str, ...], errors: list[dict[str, Any]]) -> str:
    """One problem in words, with the nearest valid key for one that is unknown.

    errors: pydantic's, of which there are several where a value is none of several types.
    """
    key, error = ".".join(location), errors[0]
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, 1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        hint = f"did you mean '{prefix + '.' if prefix else ''}{near[0]}'?" if near else f"valid: {', '.join(valid)}"
        return f"unknown key '{key}'; {hint}"
    if error["type"] == "missing":
        return f"'{key}' is missing"
    messages = [e["msg"].removeprefix("Value error, ") for e in errors]
    message = ", or ".join(m[:1].lower() + m[1:] for m in messages)
    shown = f" (given: {error['input']!r})" if location and not isinstance(error["input"], dict) else ""
    return f"'{key}': {message}{shown}" if location else message


def _valid_keys(location: tuple[str, ...]) -> list[str]:
    """The keys of the configuration part at this place."""
    model: Any = RunConfig
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        candidates = _members(field.annotation) if field else []
        model = next((c for c in candidates if hasattr(c, "model_fields")), None)
    return sorted(field.alias or name for name, field in model.model_fields.items()) if model is not None else []


def _members(annotation: Any) -> list[Any]:
    """The alternatives of `X | None`, or the annotation itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if union else [annotation]
