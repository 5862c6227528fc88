"""`harmony-fast sweep`: several recipes under one budget, with several seeds; the table and the plot that compare them.

OUT/<recipe>/seed-<n>/        a run folder as any other; beside it seed-<n>.yaml and seed-<n>.log
OUT/sweep.json, .md, .png     what was measured, brought up to date after every run
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .auto_memory import PLANNED
from .checkpoint_folder import CheckpointFolder, step_of
from .config import RunConfig, differences, dump_config, load_config
from .distributed import LAUNCHER
from .errors import UserError
from .evaluate import evaluate_run
from .evaluated import METRICS
from .sweep_recipes import Budget, settle_budget, under_budget
from .sweep_results import collect, write_results

EVALUATED = "evaluated"
"""File in a run folder of the sweep that says that its evaluation went to the end"""


@dataclass(frozen=True)
class Trial:
    """One recipe with one seed."""

    recipe: str
    seed: int
    folder: Path
    """Its run folder."""
    config: RunConfig

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.recipe}, seed {self.seed}"

    @property
    def trained(self) -> bool:
        """Whether its last checkpoint is there, of this configuration."""
        newest, config = CheckpointFolder(self.folder).newest([])[0], self.folder / "config.yaml"
        if newest is None or not config.is_file():
            return False
        settled = ("precision", *(PLANNED if self.config.memory else ()))  # auto is settled when it trains
        differ = [key for key in differences(load_config(config), self.config) if not key.startswith(settled)]
        return step_of(newest) == self.config.max_steps and not differ

    @property
    def evaluated(self) -> bool:
        """Whether all its metrics are there, of its last checkpoint: training takes earlier ones away."""
        return not self.config.evaluate.data or (self.folder / EVALUATED).is_file()


def run(
    recipes: list[Path], overrides: list[str], data: str, steps: int | None, seeds: int, out: Path, ranks: int
) -> None:
    """Train and evaluate what is not finished yet, and write the results. overrides: for the shared configuration.

    Raises UserError for anything that makes the whole sweep impossible, and at the end if any of its runs failed.
    """
    names = [path.stem for path in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two recipes are called {', '.join(twice)}: results go by the names of the files")
    budget = settle_budget(data, overrides, steps)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made: {error.strerror}") from None
    check_budget(out / "sweep.json", budget)
    # Seeds in the outer loop: a sweep that is stopped early has compared all recipes with the first seeds.
    places = [(path, seed) for seed in range(seeds) for path in recipes]
    finished: list[Trial] = []
    failures: dict[str, str] = {}
    with progress_over(len(places)) as step:
        for path, seed in places:
            label, began = f"{path.stem}, seed {seed}", time.monotonic()
            step(f"{label}: training", 0)
            try:
                trial = plan_trial(path, seed, out, budget)
                again = trial.trained and trial.evaluated
                if not again:
                    carry_out(trial, ranks)
                finished.append(trial)
                outcome = "was finished before" if again else f"done in {time.monotonic() - began:.0f} s"
            except UserError as error:
                failures[label] = str(error)
                outcome = f"failed: {error}"
            write_results(out, collect(budget, seeds, names, finished, failures))
            step(f"{label}: {outcome}", 1)
    print((out / "sweep.md").read_text(), end="")
    print(f"\n{out / 'sweep.json'}\n{out / 'sweep.md'}\n{out / 'sweep.png'}")
    if failures:
        listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(places)} runs failed, the same command tries them again. {listed}")


def check_budget(path: Path, budget: Budget) -> None:
    """Raises UserError if the folder holds the results of another budget."""
    try:
        known = json.loads(path.read_text())["budget"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not the result of a sweep; choose another --out") from None
    for key, value in budget.described().items():
        if known.get(key) != value:
            difference = f"{key} {known.get(key)}, not {value}"
            raise UserError(f"{path.parent} holds a sweep with {difference}; choose another --out")


def plan_trial(recipe: Path, seed: int, out: Path, budget: Budget) -> Trial:
    """One run of the sweep. Raises UserError if the recipe cannot be had."""
    folder = out / recipe.stem / f"seed-{seed}"
    return Trial(recipe.stem, seed, folder, under_budget(recipe, budget, seed, folder))


def carry_out(trial: Trial, ranks: int) -> None:
    """Train, or go on training, in a process of its own, then evaluate. Raises UserError that says why it failed."""
    trial.folder.mkdir(parents=True, exist_ok=True)
    config, log = trial.folder.with_suffix(".yaml"), trial.folder.with_suffix(".log")
    with log.open("a", encoding="utf-8") as words:
        if not trial.trained:
            for earlier in (EVALUATED, METRICS):
                (trial.folder / earlier).unlink(missing_ok=True)
            config.write_text(dump_config(trial.config), encoding="utf-8")
            command = [sys.executable, "-m", "harmony_fast.engine.cli", "train", str(config), "--ranks", str(ranks)]
            alone = {**os.environ, LAUNCHER: str(os.getpid())}  # it ends with this process
            status = finish(subprocess.Popen(command, stdout=words, stderr=words, env=alone, start_new_session=True))
            if status or not trial.trained:
                raise UserError(f"{last_words(log) or f'exit status {status}'} (all of it: {log})")
        if not trial.evaluated:
            with contextlib.redirect_stdout(words):
                evaluate_run(trial.folder, [], [])
            (trial.folder / EVALUATED).touch()


def finish(process: subprocess.Popen[bytes]) -> int:
    """Wait for a training process. Asked to stop, it is asked in turn, so that it saves what it has.

    Raises SystemExit then.
    """

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise SystemExit("stopped as asked; start again with the same command to go on") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def last_words(log: Path) -> str:
    """The last line that a process wrote: its error, if it has one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


@contextlib.contextmanager
def progress_over(count: int) -> Iterator[Any]:
    """A function (what happens, runs done since the last call) that shows it: a bar, or lines where nobody watches."""
    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=count)
        done = 0

        def step(text: str, advance: int) -> None:
            nonlocal done
            done += advance
            progress.update(task, description=text, advance=advance)
            if advance:
                console.print(f"[{done}/{count}] {text}", highlight=False, markup=False, soft_wrap=True)

        yield step
