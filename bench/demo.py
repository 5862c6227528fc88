"""`harmony-fast bench demo [KEY=VALUE...]`: how long the demo's training and evaluation take, and how good it gets.

Both run as the commands do, in a new run folder. Writes demo.json to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from ..engine.config import load_config
from ..engine.data import ensure_data
from ..engine.errors import UserError
from . import tables
from .machine import ROOT, describe_machine, results_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0. Raises UserError if one of the commands fails."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--out", type=Path, help="folder for demo.json")
    options = parser.parse_args(arguments)
    config = ROOT / "configs" / "demo.yaml"
    ensure_data(load_config(config, options.overrides))
    with tempfile.TemporaryDirectory(prefix="bench-demo-") as scratch:
        run = Path(scratch) / "run"
        begin = time.perf_counter()
        call("train", config, *options.overrides, f"run_dir={run}")
        call("evaluate", run)
        report = {
            "machine": describe_machine(), "config": "configs/demo.yaml", "overrides": options.overrides,
            "seconds_train_and_evaluate": time.perf_counter() - begin, **found(run),
        }  # fmt: skip
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Console().print(Markdown(tables.demo(report)))
    print(folder / "demo.json")
    return 0


def call(*words: object) -> None:
    """A command of this project, in a process of its own."""
    if status := subprocess.call([sys.executable, "-m", "harmony_fast.engine.cli", *map(str, words)]):
        raise UserError(f"harmony-fast {words[0]} ended with exit status {status}; its message is above")


def found(run: Path) -> dict[str, Any]:
    """What a run's log and metrics say: steps, the first and last losses, samples a second, metrics."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [{key: value for key, value in entry.items() if key.split("/")[0] == "loss"} for entry in log]
    return {
        "steps": log[-1]["step"], "losses_first": losses[0], "losses_last": losses[-1],
        "samples_per_second_median": statistics.median(entry["samples_per_second"] for entry in log),
        "metrics": json.loads((run / "metrics.json").read_text(encoding="utf-8")),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
