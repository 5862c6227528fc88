"""The training loop: views, schedules, step, EMA, log, checkpoint, in that order."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..harmony.heads import PixelDecoder
from ..harmony.image_encoder import ImageEncoder
from ..harmony.model import Harmony, StepOutput
from ..harmony.schedules import Clock
from ..harmony.text_encoder import TextTransformer
from .accumulate import accumulate
from .backends import use_backends
from .checkpoint import Checkpoints
from .compiled import compile_blocks
from .config import RunConfig, differences, dump_config, load_config
from .data.batch import RawBatch
from .data.open_loader import AnyLoader, open_loader
from .data.views import StepViews
from .distributed import Ranks, join
from .ema import ShardedEma
from .errors import UserError
from .log import Log
from .zero import Scalars, Zero, deepspeed_config, scalars_at

# Keys that may change when a run goes on: they do not touch what is computed.
FREE_KEYS = (
    "run_dir", "max_steps", "log_every", "checkpoint_every", "keep_checkpoints", "data.workers", "evaluate.",
    "pass", "zero.", "deepspeed", "tf32", "compile", "activation_checkpointing.", "data.micro_batch_size", "kernels.",
)  # fmt: skip


def train(config: RunConfig) -> None:
    """Train on this process's rank until the configuration's end, or until asked to stop; resumes by itself.

    Raises UserError for anything the user can mend.
    """
    ranks = join()
    stop = StopRequest()
    use_backends(config, ranks.device)
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    prepare_run_folder(config, ranks)
    torch.manual_seed(config.seed)  # initial weights only: all later draws are counter-based
    with open_loader(config, ranks) as loader:
        check_fit(config, loader)
        micro_batches = count_micro_batches(config, ranks)
        model = build_model(config).to(ranks.device)
        zero = Zero(model, config, ranks)
        ema = ShardedEma(zero, model)
        checkpoints = Checkpoints(config.run_dir, ranks, config.keep_checkpoints)
        saved = checkpoints.latest()
        done = checkpoints.load(saved, zero, ema) if saved else 0
        total = config.epochs * loader.steps_per_epoch
        last = min(total, config.max_steps or total)
        log = Log(config.run_dir, last, done, ranks.is_main)
        log.say(f"resumed at step {done} of {last}" if saved else describe(config, model, loader, ranks))

        meter = Meter(done)
        model.train()
        for clock, batch in batches(config, loader, done, last):
            views = StepViews(config, batch, clock, ranks.device, micro_batches)
            scalars = scalars_at(config, clock)

            output = accumulate(zero, views, clock, ranks, split=config.pass_mode == "split")
            if zero.step(scalars, clock):
                ema.update(scalars.ema_momentum)
                model.end_step(ranks)
            done += 1

            stopping = ranks.any(stop.asked)
            saving = stopping or done == last or done % config.checkpoint_every == 0
            log.step(done)
            if saving or done == 1 or done % config.log_every == 0:
                entry = summarise(output, scalars, clock, zero, ranks)
                ensure_finite(entry, batch, loader, config.run_dir, ranks)
                log.record({**entry, "samples_per_second": meter.rate(done, config.data.batch_size)})
            if saving:
                checkpoints.save(done, zero, ema)
            if stopping and done < last:
                log.say(f"stopped at step {done} as asked; start again with the same command to go on")
                break
        log.close()


def batches(config: RunConfig, loader: AnyLoader, done: int, last: int) -> Iterator[tuple[Clock, RawBatch]]:
    """This rank's samples of steps `done` to `last`."""
    while done < last:
        epoch, step = divmod(done, loader.steps_per_epoch)
        for batch in loader.epoch(epoch, start_step=step):
            yield Clock(done, loader.steps_per_epoch, config.epochs), batch
            done += 1
            if done == last:
                return


def build_model(config: RunConfig) -> Harmony:
    """The model with the run's activation checkpointing and compilation."""
    model = Harmony(config)
    every = {
        ImageEncoder: config.activation_checkpointing.image, PixelDecoder: config.activation_checkpointing.image,
        TextTransformer: config.activation_checkpointing.text,
    }  # fmt: skip
    for module in model.modules():
        if type(module) in every:
            module.checkpoint_every = every[type(module)]
    if config.compile:
        compile_blocks(model)
    return model


def count_micro_batches(config: RunConfig, ranks: Ranks) -> int:
    """How many micro-batches make a rank's step. Raises UserError if samples would be left over."""
    own = config.data.batch_size // ranks.world_size
    size = config.data.micro_batch_size or own
    if own % size:
        raise UserError(
            f"data.batch_size {config.data.batch_size} is {own} samples a rank, which data.micro_batch_size {size} "
            "does not divide"
        )
    return own // size


def summarise(output: StepOutput, scalars: Scalars, clock: Clock, zero: Zero, ranks: Ranks) -> dict[str, float]:
    """The numbers of one step, averaged over ranks. Reads from the device, so only logged steps pay for it."""
    named = {"loss": output.loss.detach(), **{f"loss/{n}": v for n, v in output.losses.items()}, **output.metrics}
    values = ranks.sum(torch.stack([v.double().cpu() for v in named.values()]).to(ranks.device)) / ranks.world_size
    entry = {"step": clock.step + 1, "epoch": clock.epoch, **dict(zip(named, values.tolist(), strict=True))}
    entry["gradient_norm"] = float(zero.gradient_norm())
    entry.update(lr=scalars.lr, weight_decay=scalars.weight_decay, ema_momentum=scalars.ema_momentum)
    return entry


def ensure_finite(entry: dict[str, float], batch: RawBatch, loader: AnyLoader, run_dir: Path, ranks: Ranks) -> None:
    """Stop a run whose loss is not finite, with the batch's sample ids on disk and the checkpoints untouched."""
    if not ranks.any(not math.isfinite(entry["loss"])):
        return
    path = run_dir / f"diverged-rank-{ranks.rank}.json"
    path.write_text(json.dumps({"entry": entry, "samples": loader.sample_ids(batch.index)}, indent=1))
    raise UserError(f"the loss is {entry['loss']} at step {entry['step']}; its samples are listed in {path}")


def prepare_run_folder(config: RunConfig, ranks: Ranks) -> None:
    """Create the run folder, or check that the run in it is this one. Raises UserError if it is another."""
    path = config.run_dir / "config.yaml"
    if path.is_file():
        changed = [k for k in differences(load_config(path), config) if not k.startswith(FREE_KEYS)]
        if changed and (config.run_dir / "checkpoints" / "latest").is_file():
            raise UserError(
                f"{config.run_dir} holds a run of another configuration (differs in: {', '.join(changed)}); "
                "choose another run_dir, or delete this one"
            )
    generated = json.dumps(deepspeed_config(config, ranks.world_size), indent=1)
    ranks.barrier()
    if ranks.is_main:
        try:
            config.run_dir.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(dump_config(config), encoding="utf-8")
            temporary.replace(path)
            (config.run_dir / "deepspeed.json").write_text(generated, encoding="utf-8")
        except OSError as error:
            raise UserError(f"run_dir {config.run_dir}: cannot be written: {error.strerror}") from None
    ranks.barrier()


def check_fit(config: RunConfig, loader: AnyLoader) -> None:
    """The data must fit the model."""
    context = config.model.text.context
    if loader.context != context:
        raise UserError(
            f"{config.data.train} has captions of {loader.context} tokens, model.text.context is {context}; "
            f"set model.text.context={loader.context} or prepare again with --context {context}"
        )


def describe(config: RunConfig, model: Harmony, loader: AnyLoader, ranks: Ranks) -> str:
    """What is about to happen, in one line."""
    millions = sum(p.numel() for p in model.student.parameters()) / 1e6
    names = ", ".join(model.objectives)
    return (
        f"{loader.samples:,} samples, {loader.steps_per_epoch} steps an epoch, {config.epochs} epochs; "
        f"student {millions:.1f} M parameters; {names}; {config.precision}, "
        f"ZeRO {config.zero.stage}, {ranks.world_size} rank(s) on {ranks.device.type}"
    )


class Meter:
    """Samples per second since the last question."""

    def __init__(self, done: int) -> None:
        self._done, self._time = done, time.perf_counter()

    def rate(self, done: int, batch_size: int) -> float:
        """Over all ranks."""
        now = time.perf_counter()
        rate = (done - self._done) * batch_size / (now - self._time)
        self._done, self._time = done, now
        return rate


class StopRequest:
    """Whether SIGTERM or SIGINT has asked the run to save and stop; a second signal ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked:
            raise SystemExit(128 + number)
        self.asked = True
