"""DeepSpeed: parameter groups, precision, sharding, the optimizer step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..harmony.model import Harmony, StepOutput
from ..harmony.objectives.base import Center
from ..harmony.schedules import Clock, warmup_cosine
from ..harmony.teacher import twins
from ..harmony.views import Views
from .config import RunConfig
from .distributed import Ranks
from .half_on_cpu import products_for


@dataclass
class Scalars:
    """The optimizer's scalars of one step."""

    lr: float
    weight_decay: float
    ema_momentum: float


def scalars_at(config: RunConfig, clock: Clock) -> Scalars:
    """Learning rate (warm-up, cosine; scaled by batch / 256), weight decay and EMA momentum (cosines) at this step."""
    c, total = config.optimizer, clock.total
    scale = config.data.batch_size / 256
    warmup = round(c.warmup_epochs * clock.steps_per_epoch)
    return Scalars(
        warmup_cosine(clock.step, c.lr * scale, c.min_lr, total, warmup),
        warmup_cosine(clock.step, c.weight_decay, c.weight_decay_end, total),
        warmup_cosine(clock.step, c.ema_momentum, c.ema_momentum_end, total),
    )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices, embeddings, tokens and the logit scale; not for biases and norms.

    As the authors' code has it: there the scale is a tensor without dimensions, and only one dimension is exempt.
    """
    return (parameter.dim() != 1 or parameter.numel() == 1) and not name.endswith(".bias")


def parameter_groups(model: Harmony) -> list[dict[str, Any]]:
    """Trainable parameters by (has a twin, is decayed, epochs frozen): each group is one flat buffer of its own.

    Parameters with a twin must be apart, so that the EMA shard is the group's shard and nothing else.
    """
    twinned = {id(student) for _, student in twins(model.teacher, model.student)}
    frozen = {id(p): epochs for parameters, epochs in model.frozen_parameters() for p in parameters}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (id(parameter) in twinned, is_decayed(name, parameter), frozen.get(id(parameter), 0))
            new = {"params": [], "twin": key[0], "decayed": key[1], "frozen_epochs": key[2]}
            groups.setdefault(key, new)["params"].append(parameter)
    return list(groups.values())


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration a run implies."""
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size // world_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": config.zero.stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "initial_scale_power": 16},
        "steps_per_print": 2**31,
    }


class Zero:
    """The model under DeepSpeed: one backward and one step, with the schedules applied to every group."""

    def __init__(self, model: Harmony, config: RunConfig, ranks: Ranks) -> None:
        _quiet()
        import deepspeed

        # A shared-memory all-reduce for inference that DeepSpeed would compile at the first CPU run; never used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        if ranks.device.type == "cpu" and config.precision == "fp16":
            # DeepSpeed refuses processors without fp16 instructions; torch emulates them, slowly but rightly.
            deepspeed.get_accelerator().is_fp16_supported = lambda: True
        groups = parameter_groups(model)
        optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, ranks.world_size)
        )
        self.model, self.groups = model, groups
        self._products = products_for(ranks.device, self.dtype)
        _restore_precise_state(model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the compute copy of the parameters."""
        return self.optimizer.dtype

    def forward(self, views: Views, clock: Clock, ranks: Ranks) -> StepOutput:
        """The losses of this rank's samples."""
        with self._products:
            return self.engine(views, clock, ranks)

    def step(self, loss: Tensor, scalars: Scalars, clock: Clock) -> bool:
        """Backward, reduction, clipping, AdamW. Returns whether the step was taken (fp16 skips at an overflow)."""
        for group, live in zip(self.groups, self.optimizer.param_groups, strict=True):
            frozen = clock.epoch < group["frozen_epochs"]
            live["lr"] = 0.0 if frozen else scalars.lr
            live["weight_decay"] = scalars.weight_decay if group["decayed"] and not frozen else 0.0
            if group["frozen_epochs"] and not frozen and clock.step == group["frozen_epochs"] * clock.steps_per_epoch:
                self._forget(live)
        with self._products:
            self.engine.backward(loss)
        self.engine.step()
        self._clamp()
        return self.engine.was_step_applied()

    def gradient_norm(self) -> Tensor | float:
        """Global norm of the last step's gradient, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def shards(self) -> list[tuple[dict[str, Any], list[nn.Parameter], Tensor]]:
        """Per group: its settings, its parameters in flat order, this rank's fp32 shard."""
        z = self.optimizer
        return list(zip(self.groups, z.round_robin_bit16_groups, z.single_partition_of_fp32_groups, strict=True))

    def _forget(self, live: dict[str, Any]) -> None:
        """A group that thaws starts like new: while frozen, AdamW has counted its steps and gathered moments."""
        for shard in live["params"]:
            for value in self.optimizer.optimizer.state.get(shard, {}).values():
                value.zero_()

    def _clamp(self) -> None:
        """Keep bounded parameters in bounds, on the fp32 master: the compute copy is overwritten from it."""
        for objective in self.model.objectives.values():
            for parameter, bound in objective.upper_bounds():
                parameter.data.clamp_(max=bound)
                if parameter._hp_mapping is not None:  # this rank's shard holds it
                    parameter._hp_mapping.hp_fragment.data.clamp_(max=bound)


def _restore_precise_state(model: Harmony) -> None:
    """Centers stay fp32: DeepSpeed casts every buffer to the compute precision, too coarse for a running mean."""
    for module in model.modules():
        if isinstance(module, Center):
            module.float()


def _quiet() -> None:
    """DeepSpeed reports its inner life at INFO; warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("deepspeed").setLevel(logging.WARNING)
