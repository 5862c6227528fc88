"""Whole runs through the command line, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from harmony_fast.engine.host_memory import TUNABLES, VARIABLE
from warm import Warm

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "harmony_fast.engine.cli"]
FAULTY = [sys.executable, str(ROOT / "tests" / "faults" / "faulty.py")]
MALLOC = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: MALLOC}  # so that no command starts itself again


def start(*arguments: object, command: list[str] = COMMAND, **environment: object) -> Warm:
    words, variables = [*command, *map(str, arguments)], {name: str(value) for name, value in environment.items()}
    return Warm(words, {**ENVIRONMENT, **variables})


def call(
    *arguments: object, command: list[str] = COMMAND, timeout: float = 280, **environment: object
) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, command=command, **environment)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.command, process.returncode, out, err)


def run(*arguments: object, fails: bool = False, command: list[str] = COMMAND) -> str:
    """What it prints; it must fail with a message, or succeed."""
    ended = call(*arguments, command=command)
    assert (ended.returncode != 0) == fails, ended.stderr[-3000:]
    if fails:
        assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout + ended.stderr


def start_ranks(count: int, store: Path, *arguments: object, command: list[str] = COMMAND) -> list[Warm]:
    """The command as ranks that a scheduler has started, which meet in a new file.

    Like `train --ranks`, without a launcher whose processes import everything anew.
    """
    store.unlink(missing_ok=True)
    return [
        start(
            *arguments, command=command, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count,
            HARMONY_FAST_STORE=store, GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(count)
    ]  # fmt: skip


def as_ranks(
    count: int, folder: Path, *arguments: object, command: list[str] = COMMAND
) -> list[subprocess.CompletedProcess[str]]:
    """Ranks as `start_ranks` has them, when they have ended; all must end well."""
    ended = []
    for task in start_ranks(count, folder / "store", *arguments, command=command):
        out, err = task.communicate(timeout=240)
        ended.append(subprocess.CompletedProcess(task.command, task.returncode, out, err))
    assert all(task.returncode == 0 for task in ended), "\n".join(task.stderr[-3000:] for task in ended)
    return ended


def log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in log(run_dir)]


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
