"""DeepSpeed: precision, sharding, the passes and the optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..harmony.model import Harmony
from ..harmony.objectives.base import Center
from ..harmony.schedules import Clock
from .config import RunConfig
from .distributed import Ranks
from .errors import UserError
from .half_on_cpu import products_for
from .nested import merged
from .optimizer import Scalars, build_optimizer, parameter_groups
from .partition import PARTITIONS

if TYPE_CHECKING:
    from .snapshots import Writer

T = TypeVar("T")
BUCKET = 2**25
"""Elements of a communication bucket, two of which are held: 128 MiB in bf16. DeepSpeed's default of 5e8 would take a
gibibyte, even on one GPU"""


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration a run implies, with the user's `deepspeed:` merged into it."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "overlap_comm": world_size > 1 and _may_overlap(config, world_size),
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": 100_000,  # DeepSpeed's default
    }
    if config.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    generated = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size or config.data.samples_per_rank(world_size),
        "gradient_accumulation_steps": 1,  # engine/accumulate.py says which backward pass is the last
        # With offload and in stage 3 DeepSpeed would take along only the gradients of that last pass; in this mode it
        # takes all that were added up when the step comes.
        "managed_gradient_accumulation": config.zero.stage < 3 and not config.zero.offload_optimizer,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad if config.optimizer.clip == "global" else 0.0,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16", "initial_scale_power": 16},
        "steps_per_print": 2**31,
    }
    settings = merged(generated, config.deepspeed)
    if settings["zero_optimization"].get("overlap_comm") and not _may_overlap(config, world_size):
        raise UserError(
            "deepspeed.zero_optimization.overlap_comm: in zero.stage 1 DeepSpeed adds up wrong gradients with it where "
            "a step has several backward passes (micro-batches, pass: split), and refuses it with offload; use stage 2"
        )
    return settings


def _may_overlap(config: RunConfig, world_size: int) -> bool:
    """Whether buckets may be reduced while the backward pass goes on.

    In stage 1 DeepSpeed 0.19.8 gives wrong gradients with it where a step has several: losses were off by 4 % after
    four steps of the layout "split" in tests/engine/test_zero.py. With offload it refuses it by itself.
    """
    size = config.data.samples_per_rank(world_size)
    once = config.pass_mode == "packed" and config.data.micro_batch_size in (None, size)
    return config.zero.stage > 1 or (once and not config.zero.offload_optimizer)


class Zero:
    """The model under DeepSpeed: forward and backward passes, the step, with the schedules applied to every group."""

    def __init__(self, model: Harmony, config: RunConfig, ranks: Ranks) -> None:
        _quiet()
        import deepspeed

        from .snapshots import Snapshots

        # A shared-memory all-reduce for inference that DeepSpeed would compile at the first CPU run; never used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        if ranks.device.type == "cpu" and config.precision == "fp16":
            # DeepSpeed refuses processors without fp16 instructions; torch emulates them, slowly but rightly.
            deepspeed.get_accelerator().is_fp16_supported = lambda: True
        self.model, self.groups, self.config, self._ranks = model, parameter_groups(model), config, ranks
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.order = [self.names[id(parameter)] for group in self.groups for parameter in group["params"]]
        """Names of the trained parameters as the optimizer numbers them"""
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(config, self.groups),
            config=deepspeed_config(config, ranks.world_size),
        )  # fmt: skip
        self._snapshots = self.engine.checkpoint_engine = Snapshots()
        if config.zero.stage == 0 and hasattr(self.optimizer, "optimizer"):
            # In half precision DeepSpeed has taken a step with zeros to make the state: AdamW would count it.
            self.optimizer.optimizer.state.clear()
        if config.precision == "fp16":
            self.optimizer.loss_scaler.raise_error_at_min_scale = False  # the run says what to do then
        self.partition = PARTITIONS[config.zero.stage](self.engine, self.optimizer, self.groups, ranks)
        if config.zero.stage == 0:
            self._reduce_in_buckets()
        self.dtype = next(model.parameters()).dtype
        """Of the compute copy of the parameters"""
        self._products = products_for(ranks.device, self.dtype)
        _restore_precise_state(model)

    def forward(self, call: Callable[[Harmony], T]) -> T:
        """Run something with the model (see `Harmony.forward`)."""
        with self._products:
            return self.engine(call)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a gradient; `last`: the step comes next, so reduce over ranks now."""
        if self.engine.managed_gradient_accumulation():
            self.engine.set_gradient_accumulation_boundary(last)
        with self._products:
            self.engine.backward(loss)
        if last and self.config.zero.stage == 0 and self._ranks.world_size == 1:
            self.partition.complete_gradients()

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, all parameters of a part of the model are there, also in stage 3. All ranks must enter."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters(list(module.parameters())), self._products:
            yield

    def step(self, scalars: Scalars, clock: Clock) -> bool:
        """Clipping and AdamW. Returns whether the step was taken: not where a gradient is not finite."""
        for group, live in zip(self.groups, self.optimizer.param_groups, strict=True):
            frozen = clock.epoch < group["frozen_epochs"]
            live["lr"] = 0.0 if frozen else scalars.lr
            live["weight_decay"] = scalars.weight_decay if group["decayed"] and not frozen else 0.0
        self._forget_thawed(clock)
        if self.config.zero.stage == 0 and not self._finite():  # DeepSpeed looks in stages 1 to 3
            self.engine.optimizer.zero_grad()
            self.partition.clear_gradients()
            return False
        if self.config.optimizer.clip == "parameter" and self.config.optimizer.clip_grad:
            self._clip_each()
        self.engine.step()
        self.partition.clear_gradients()
        for places, bound in self._bounds():
            for place in places:
                place.data.clamp_(max=bound)
        return self.engine.was_step_applied()

    def snapshot(self, folder: Path, beside: dict[str, Any]) -> dict[Path, Writer]:
        """DeepSpeed's checkpoint and more contents by file name, copied to host memory: what writes each file of this
        rank, by path. All ranks must call."""
        return self._snapshots.take(self.engine, folder, beside)

    @property
    def loss_scale(self) -> float:
        """Factor that backward passes multiply the loss with (fp16); 1 otherwise."""
        return float(getattr(self.optimizer, "loss_scale", 1.0)) if self.dtype == torch.float16 else 1.0

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        if self.dtype == torch.float16:
            self.optimizer.loss_scaler.cur_scale = value

    def gradient_norm(self) -> Tensor | float:
        """Global norm of the last step's gradient, before global clipping."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else norm

    def weights(self) -> dict[str, Tensor]:
        """The trained weights in fp32 on the host, by parameter name. All ranks must call."""
        return {
            self.names[id(parameter)]: value
            for shard in self.partition.shards()
            for parameter, value in zip(shard.parameters, self.partition.whole(shard.master, shard), strict=True)
        }

    @property
    def adamw(self) -> torch.optim.Optimizer:
        """What `build_optimizer` made, inside DeepSpeed's own; in stage 0 with fp32 there is nothing around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def step_counts(self) -> dict[str, int]:
        """AdamW's count of the steps of each parameter."""
        return {
            self.names[id(parameter)]: int(self.adamw.state.get(shard.state_key, {}).get("step", 0))
            for shard in self.partition.shards()
            for parameter in shard.parameters
        }

    @torch.no_grad()
    def _clip_each(self) -> None:
        """Scale each gradient by min(1, clip / (its norm + 1e-6)), as the authors' code does for the image side.

        Norms of parameters that are cut over ranks are completed by one all-reduce.
        """
        c = self.config.optimizer
        pieces = [(self.names[id(p)], g) for p, g in self.partition.gradients()]
        pieces = [(n, g) for n, g in pieces if not c.clip_only or n.startswith(tuple(c.clip_only))]
        place, squares = self._squares(pieces)
        factors = (c.clip_grad * self.loss_scale / (squares.sqrt() + 1e-6 * self.loss_scale)).clamp(max=1)
        for name, gradient in pieces:
            gradient.mul_(factors[place[name]].to(gradient.dtype))

    def gradient_norms(self) -> dict[str, float]:
        """By parameter, between the last backward pass and the step; none with offload or in stage 3, which give no
        access to whole gradients. All ranks must call. Reads from the device."""
        if self.config.zero.stage == 3 or self.config.zero.offload_optimizer:
            return {}
        pieces = [(self.names[id(p)], g) for p, g in self.partition.gradients()]
        place, squares = self._squares(pieces)
        norms = (squares.sqrt() / self.loss_scale).tolist()
        return {name: norms[k] for name, k in place.items()}

    def _squares(self, pieces: list[tuple[str, Tensor]]) -> tuple[dict[str, int], Tensor]:
        """Squared norms of gradients by parameter, over all ranks: the place of each name, and the norms."""
        place = {name: i for i, name in enumerate(self.order)}
        squares = torch.zeros(len(place), dtype=torch.float64 if self.dtype == torch.float64 else torch.float32)
        squares = squares.to(self._ranks.device)
        for name, gradient in pieces:
            squares[place[name]] += gradient.to(squares.dtype).square().sum()
        # In stage 0 every rank has the whole gradient.
        return place, self._ranks.sum(squares) if self.config.zero.stage else squares

    def _reduce_in_buckets(self) -> None:
        """In stage 0 DeepSpeed reduces one flat copy of all gradients, and makes it on a single rank as well."""
        zero = deepspeed_config(self.config, self._ranks.world_size)["zero_optimization"]
        engine = self.engine
        engine.enable_backward_allreduce = self._ranks.world_size > 1
        engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=zero["reduce_bucket_size"])

    def _finite(self) -> bool:
        """Whether all gradients of stage 0 are: their sums tell, in a tenth of the time that each number would take."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return bool(torch.stack([g.sum(dtype=wide) for _, g in self.partition.gradients()]).isfinite().all())

    def _forget_thawed(self, clock: Clock) -> None:
        """A group that thaws starts like new: while frozen, AdamW has counted its steps and gathered moments."""
        for shard in self.partition.shards():
            frozen = shard.group["frozen_epochs"]
            if frozen and clock.step == frozen * clock.steps_per_epoch:
                self.adamw.state.pop(shard.state_key, None)

    def _bounds(self) -> list[tuple[list[Tensor], float]]:
        """Every place where a bounded parameter is kept on this rank, with its bound."""
        bounds = {id(p): b for o in self.model.objectives.values() for p, b in o.upper_bounds()}
        places = []
        for shard in self.partition.shards():
            for parameter, part in zip(shard.parameters, self.partition.parts(shard), strict=True):
                if id(parameter) in bounds:
                    scattered = [parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else []
                    places.append(([part, parameter.data, *scattered], bounds[id(parameter)]))
        return places


def _restore_precise_state(model: Harmony) -> None:
    """Centers stay fp32: DeepSpeed casts every buffer to the compute precision, too coarse for a running mean."""
    for module in model.modules():
        if isinstance(module, Center) and module.value.dtype != torch.float64:
            module.float()


def _quiet() -> None:
    """DeepSpeed reports its inner life at INFO; warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("deepspeed").setLevel(logging.WARNING)
