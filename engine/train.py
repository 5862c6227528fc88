"""The training loop. The step itself is in `step`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import torch

from ..harmony.schedules import Clock
from .auto_memory import Settled, settle
from .backends import has_bf16, settle_precision, use_backends
from .build import build_model, count_micro_batches
from .checkpoint import Checkpoints
from .checkpoint_folder import FINISHED
from .config import RunConfig, differences, dump_config, load_config
from .data.batch import RawBatch
from .data.open_loader import AnyLoader, open_loader
from .data.views import StepViews
from .disk import alone_in, replace_text
from .distributed import Ranks, join
from .ema import ShardedEma
from .errors import StartAgain, UserError
from .evaluate.during import evaluate_now
from .health import SEED_STRIDE, Divergence, rollbacks
from .log import Log
from .numbers import Numbers
from .sizes import GIB
from .step import Step, step
from .stopping import BEGAN, StopRequest
from .watchdog import Watchdog
from .zero import Zero, deepspeed_config

# Keys that may change when a run goes on: they do not touch what is computed.
FREE_KEYS = (
    "run_dir", "max_steps", "max_time", "keep_every", "max_skipped_steps", "on_divergence", "max_rollbacks", "watchdog",
    "watchdog_seconds", "memory", "log_every", "checkpoint_every", "keep_checkpoints", "data.workers", "data.reading",
    "data.cache_", "data.micro_batch_size", "kept_graphs", "evaluate", "pass", "zero.", "deepspeed", "tf32", "compile",
    "kernels.", "activation_checkpointing.",
)  # fmt: skip
LAST_MOMENTS = 5.0
"""Seconds in which a process that was killed is gone"""


def train(config: RunConfig) -> None:
    """Train on this process's rank until the configuration's end, or until it is to stop; resumes by itself.

    Raises UserError for anything the user can mend.
    """
    ranks = join()
    stop = StopRequest(config.max_time)
    settled = settle(config, ranks)
    try:
        with settled.explaining():
            run(settled, ranks, stop)
    except StartAgain:
        os.environ[BEGAN] = str(stop.began)  # what starts again has no more time
        raise


def run(settled: Settled, ranks: Ranks, stop: StopRequest) -> None:
    """From the newest checkpoint, if there is one, to the end."""
    config = settled.config
    micro_batches = count_micro_batches(config, ranks)
    use_backends(config, ranks.device)
    torch.manual_seed(config.seed)  # initial weights only: all later draws are counter-based
    with run_folder(config, ranks), open_loader(config, ranks) as loader:
        check_fit(config, loader)
        loader.seed += SEED_STRIDE * len(rollbacks(config.run_dir))
        model = build_model(config).to(ranks.device)
        zero = Zero(model, config, ranks)
        ema = ShardedEma(zero, model)
        checkpoints = Checkpoints(config.run_dir, ranks, config.keep_checkpoints, config.keep_every)
        saved, damaged = checkpoints.latest()
        progress = checkpoints.load(saved, zero, ema) if saved else {"step": 0}
        done, total = progress["step"], config.epochs * loader.steps_per_epoch
        last = min(total, config.max_steps or total)
        if done < last and ranks.is_main:  # a run that goes on with more steps is not finished any more
            (config.run_dir / FINISHED).unlink(missing_ok=True)
        log = Log(config.run_dir, last, done, ranks.is_main)
        log.say(f"resumed at step {done} of {last}" if saved else describe(config, zero, loader, ranks))
        greet(log, settled, damaged)

        divergence, numbers = Divergence(config, progress), Numbers(settled, log, done, ranks)
        evaluation = 0.0  # seconds that the last one took
        model.train()
        with closing(log), Watchdog(config.run_dir, ranks.rank, config.watchdog, config.watchdog_seconds) as watchdog:
            for clock, batch in batches(config, loader, done, last):
                views = StepViews(config, batch, clock, ranks.device, micro_batches)

                result = step(config, zero, ema, views, clock, ranks, norms=divergence.suspicious)
                done += 1
                watchdog.step_done()
                settled.stepped = True

                if result.taken:
                    divergence.taken()
                else:
                    left_out(result, divergence, checkpoints, loader, batch, done, zero, ranks, log)
                to_come = watchdog.typical + (evaluation if evaluates(config, done + 1) else 0.0)
                stopping = ranks.any(stop.due(checkpoints.seconds, to_come))
                saving = stopping or done == last or done % config.checkpoint_every == 0
                evaluating = not stopping and evaluates(config, done)
                log.step(done)
                if evaluating:
                    began = time.monotonic()
                    with watchdog.resting():
                        numbers.add(evaluate_now(config, zero, ranks))
                    evaluation = time.monotonic() - began
                if saving or evaluating or done == 1 or done % config.log_every == 0:
                    numbers.record(done, result, clock, zero, divergence)
                if saving:
                    with watchdog.resting():
                        if problem := checkpoints.wait():
                            log.warn(f"the last checkpoint was not written: {problem}; the run goes on")
                        checkpoints.save(done, zero, ema, divergence.state())
                if stopping and done < last:
                    log.say(f"stopped at step {done} as asked; start again with the same command to go on")
                    break
            with watchdog.resting():
                problem = checkpoints.wait()
        if problem:
            raise UserError(f"step {done} could not be saved: {problem}; make room and start the same command again")
        if done == last and ranks.is_main:
            (config.run_dir / FINISHED).touch()


def evaluates(config: RunConfig, done: int) -> bool:
    """Whether to evaluate after so many steps."""
    return config.evaluate_every is not None and done % config.evaluate_every == 0


def greet(log: Log, settled: Settled, damaged: list[str]) -> None:
    """What is worth knowing before the first step."""
    for problem in damaged:
        log.warn(f"{problem}; an older checkpoint is used")
    if settled.predicted:
        words = " ".join(settled.chosen)
        log.say(f"memory: {settled.predicted / GIB:.2f} GiB of tensors predicted on each rank; {words}")


def left_out(
    result: Step, divergence: Divergence, checkpoints: Checkpoints, loader: AnyLoader, batch: RawBatch, done: int,
    zero: Zero, ranks: Ranks, log: Log,
) -> None:  # fmt: skip
    """A step was not taken: count it, and end the run if there were too many. All ranks must call."""
    finite = not ranks.any(not math.isfinite(result.output.loss))
    scaled = finite and zero.loss_scale > 1
    if scaled:
        log.say(f"step {done} was left out: the loss scale was too large for fp16, it is {zero.loss_scale:g} now")
    else:
        log.warn(f"step {done} was left out: its {'gradient' if finite else 'loss'} is not finite")
    if divergence.left_out(scaled):
        report = write_diverged(zero.config.run_dir, done, batch, loader, result, ranks)
        checkpoints.wait()
        divergence.give_up(done, report, checkpoints.latest()[0] is not None)


def batches(config: RunConfig, loader: AnyLoader, done: int, last: int) -> Iterator[tuple[Clock, RawBatch]]:
    """This rank's samples of steps `done` to `last`."""
    while done < last:
        epoch, step = divmod(done, loader.steps_per_epoch)
        for batch in loader.epoch(epoch, start_step=step):
            yield Clock(done, loader.steps_per_epoch, config.epochs), batch
            done += 1
            if done == last:
                return


def write_diverged(run_dir: Path, done: int, batch: RawBatch, loader: AnyLoader, result: Step, ranks: Ranks) -> Path:
    """What a step that ends the run was made of, for this rank."""
    path, output = run_dir / f"diverged-rank-{ranks.rank}.json", result.output
    found = {
        "step": done, "loss": output.loss.item(), "losses": {n: v.item() for n, v in output.losses.items()},
        "metrics": {n: v.item() for n, v in output.metrics.items()}, "gradient_norms": result.norms,
        "samples": loader.sample_ids(batch.index),
    }  # fmt: skip
    with suppress(OSError):  # on a full disk the run ends for what it ends for
        path.write_text(json.dumps(found, indent=1))
    return path


@contextmanager
def run_folder(config: RunConfig, ranks: Ranks) -> Iterator[None]:
    """The run folder, made, or checked to hold this run, for this run alone.

    Raises UserError if it holds another run, or another process is at work there.
    """
    path = config.run_dir / "config.yaml"
    if path.is_file():
        saved = settle_precision(load_config(path), has_bf16(ranks.device))
        changed = [k for k in differences(saved, config) if not k.startswith(FREE_KEYS)]
        if changed and (config.run_dir / "checkpoints" / "latest").is_file():
            raise UserError(
                f"{config.run_dir} holds a run of another configuration (differs in: {', '.join(changed)}); "
                "choose another run_dir, or delete this one"
            )
    generated = json.dumps(deepspeed_config(config, ranks.world_size), indent=1)
    ranks.barrier()
    with ExitStack() as held:
        problem: UserError | None = None
        if ranks.is_main:
            try:
                config.run_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(alone_in(config.run_dir, LAST_MOMENTS))
                replace_text(path, dump_config(config))
                replace_text(config.run_dir / "deepspeed.json", generated)
            except UserError as error:
                problem = error
            except OSError as error:
                problem = UserError(f"run_dir {config.run_dir}: cannot be written: {error.strerror}")
        if ranks.any(problem is not None):
            raise problem or UserError("the main rank cannot use the run folder; it says why")
        yield


def check_fit(config: RunConfig, loader: AnyLoader) -> None:
    """The data must fit the model."""
    context = config.model.text.context
    if loader.context != context:
        raise UserError(
            f"{config.data.train} has captions of {loader.context} tokens, model.text.context is {context}; "
            f"set model.text.context={loader.context} or prepare again with --context {context}"
        )


def describe(config: RunConfig, zero: Zero, loader: AnyLoader, ranks: Ranks) -> str:
    """What is about to happen, in one line."""
    # By their shapes: in stage 3 the parameters themselves are empty between uses.
    millions = sum(shape.numel() for name, shape in zero.shapes.items() if name.startswith("student.")) / 1e6
    names = ", ".join(zero.model.objectives)
    return (
        f"{loader.samples:,} samples, {loader.steps_per_epoch} steps an epoch, {config.epochs} epochs; "
        f"student {millions:.1f} M parameters; {names}; {config.precision}, "
        f"ZeRO {config.zero.stage}, {ranks.world_size} rank(s) on {ranks.device.type}"
    )
