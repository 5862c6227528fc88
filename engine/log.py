"""What a run says while it trains: a progress line, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .disk import replace_text

SHORT = {
    "contrastive": "clip",
    "self_distillation": "ibot",
    "reconstruction": "mae",
    "masked_language": "mlm",
    "text_distillation": "text",
}


class Log:
    """Writes on the main rank only; on the others every call does nothing."""

    def __init__(self, run_dir: Path, total: int, done: int, is_main: bool) -> None:
        self._active = is_main
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "log.jsonl"
        _cut(self._path, done)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done)
        self._console = Console(stderr=True)
        self._live, self._failed = sys.stderr.isatty(), False
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[line]}"), TimeElapsedColumn())
        self._progress = Progress(
            "train", *columns, TimeRemainingColumn(), console=self._console, disable=not self._live
        )
        self._task = self._progress.add_task("train", total=total, completed=done, line="")
        self._total, self._started, self._first = total, time.monotonic(), done
        self._progress.start()

    def step(self, done: int) -> None:
        """Move the progress bar."""
        if self._active:
            self._progress.update(self._task, completed=done)

    def record(self, entry: dict[str, Any]) -> None:
        """Write one logged step. entry: `step`, `epoch`, `loss`, `loss/<objective>`, `samples_per_second`, ..."""
        if not self._active:
            return
        self._keep(entry)
        line = self._line(entry)
        if self._live:
            self._progress.update(self._task, completed=entry["step"], line=line)
        else:
            left = (
                (time.monotonic() - self._started) / max(entry["step"] - self._first, 1) * (self._total - entry["step"])
            )
            self._console.print(
                f"step {entry['step']}/{self._total}  {line}  {_minutes(left)} left", highlight=False, soft_wrap=True
            )

    def _keep(self, entry: dict[str, Any]) -> None:
        """Write to log.jsonl and TensorBoard. What cannot be written, on a full disk, is lost, but not the run."""
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            for key, value in entry.items():
                if key != "step":
                    self._board.add_scalar(key, value, entry["step"])
        except OSError as error:
            if not self._failed:
                self.warn(f"{self._path} cannot be written: {error.strerror or error}; the run goes on without")
            self._failed = True

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self._active:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that should not be overlooked."""
        if self._active:
            self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Flush and stop the progress bar."""
        if self._active:
            self._progress.stop()
            for log in (self._file, self._board):
                with suppress(OSError):  # said before
                    log.close()

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        parts = [f"loss {entry['loss']:.3f}"]
        parts += [f"{SHORT.get(k[5:], k[5:])} {v:.3f}" for k, v in entry.items() if k.startswith("loss/")]
        return "  ".join([*parts, f"{entry['samples_per_second']:.0f} samples/s"])


def _cut(path: Path, done: int) -> None:
    """Forget logged steps after the checkpoint that the run goes on from; half-written lines go too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # damaged
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    replace_text(path, "".join(kept))


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
