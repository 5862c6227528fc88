"""`harmony-fast bench memory`: the peak that `harmony-fast plan` predicts, against the peak of a step that is run.

Measured is what torch has allocated on a GPU, and the counted bytes of live tensors on a CPU, in the second step of the
engine; what the prediction adds for CUDA itself and for the allocator is left out of the comparison. Writes memory.json
and memory.png to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..engine.distributed import Ranks, join
from ..engine.memory import predict
from .machine import caption, describe_machine, results_folder
from .step import configured
from .step_process import two_steps
from .step_rivals import Ours, made_samples
from .timing import release

SETTINGS = {
    "packed": [], "split": ["pass=split"], "recomputed": ["activation_checkpointing.image=1"],
    "8-bit states": ["optimizer.states=8bit", "zero.stage=1"],
}  # fmt: skip
ADDED = ("CUDA", "allocator")
"""Parts of a prediction that are no tensors"""
GOAL = 0.05
"""Largest relative error"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 if a prediction is further off than GOAL."""
    options = _parse(arguments)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks = join()
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe_machine(), "device": ranks.device.type, "cases": []}
    for tower in options.tower:
        for micro in options.micro:
            for name in options.only or SETTINGS:
                report["cases"].append(measure_case(tower, micro, name, ranks, options))
                # After each: what was measured stays if the machine is taken away.
                (folder / "memory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, folder / "memory.png")
    Console(width=None if sys.stdout.isatty() else 120).print(table(report["cases"]))
    print(f"results in {folder}")
    return 0 if all(case["error"] is None or abs(case["error"]) <= GOAL for case in report["cases"]) else 1


def measure_case(tower: str, micro: int, name: str, ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """One case as plain data; bytes."""
    config, device = configured("step", tower, micro, options.precision, [*options.set, *SETTINGS[name]]), ranks.device
    parts = predict(config, 1, "cuda" if device.type == "cuda" else "cpu").parts
    expected = sum(size for part, size in parts.items() if part not in ADDED)
    try:
        measured = two_steps(partial(Ours, config, made_samples(config), ranks), device)[-1]
    except torch.OutOfMemoryError:
        measured = None
    release(device)
    return {
        "tower": tower, "micro": micro, "setting": name, "predicted": expected, "measured": measured, "parts": parts,
        "error": None if measured is None else expected / measured - 1,
    }  # fmt: skip


def table(cases: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    made = Table(title="GiB at the peak of a step", title_justify="left", min_width=100)
    for heading in ("", "samples", "setting", "predicted", "measured", "error"):
        made.add_column(heading, justify="left" if heading in ("", "setting") else "right")
    for case in cases:
        measured = ["out of memory", ""] if case["measured"] is None else [
            f"{case['measured'] / 2**30:.2f}", f"{100 * case['error']:+.1f} %",
        ]  # fmt: skip
        predicted = f"{case['predicted'] / 2**30:.2f}"
        made.add_row(case["tower"], str(case["micro"]), case["setting"], predicted, *measured)
    return made


def plot(report: dict[str, Any], path: Path) -> None:
    """A bar per case: the parts that were predicted, and a mark where the measured peak is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"][::-1]
    parts = [p for p in dict.fromkeys(p for c in cases for p in c["parts"]) if p not in ADDED]
    parts = [p for p in parts if any(c["parts"].get(p) for c in cases)]
    figure, axis = plt.subplots(figsize=(10, 1.4 + 0.4 * len(cases)), layout="constrained")
    left = [0.0] * len(cases)
    for part, colour in zip(parts, plt.get_cmap("tab20")(range(20)), strict=False):
        sizes = [c["parts"].get(part, 0) / 2**30 for c in cases]
        axis.barh(range(len(cases)), sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    measured = [(c["measured"] / 2**30, row) for row, c in enumerate(cases) if c["measured"] is not None]
    axis.plot(*zip(*measured, strict=True), "|", color="#1b1f27", ms=16, mew=2, label="measured")
    axis.set_yticks(range(len(cases)), [f"{c['tower']}, {c['micro']} samples, {c['setting']}" for c in cases])
    axis.set_xlabel("GiB at the peak of a step")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(caption(report), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench memory", description=__doc__.split("\n\n")[1])
    gpu = torch.cuda.is_available()
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these settings; default: all")
    parser.add_argument("--tower", nargs="+", default=["ViT-S/16", "ViT-B/16"], help="default: %(default)s")
    parser.add_argument("--micro", nargs="+", type=int, default=[24, 96] if gpu else [8], help="samples of a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every case")
    parser.add_argument("--out", type=Path, help="folder for memory.json and memory.png")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
