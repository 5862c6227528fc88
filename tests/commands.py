"""Whole runs through the command line, and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "harmony_fast.engine.cli"]
FAULTY = [sys.executable, str(ROOT / "tests" / "faults" / "faulty.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: object, command: list[str] = COMMAND, **environment: object) -> subprocess.Popen:
    words, variables = [*command, *map(str, arguments)], {name: str(value) for name, value in environment.items()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, env={**ENVIRONMENT, **variables})


def run(*arguments: object, fails: bool = False, command: list[str] = COMMAND) -> str:
    process = start(*arguments, command=command)
    out, err = process.communicate(timeout=240)
    assert (process.returncode != 0) == fails, err[-3000:]
    if fails:
        assert "Traceback" not in err, err
    return out + err


def log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in log(run_dir)]


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
