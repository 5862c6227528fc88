"""`harmony-fast bench peaks`: peak memory of a training step by batch size, ours in several ways and the four passes.

Nothing is run: the real passes are gone through on tensors without contents and the bytes alive are counted, so the
numbers are those of any machine whose operators keep what PyTorch's do on a CPU; `harmony-fast bench memory` holds
them against steps that are run. fp32, one rank, weights and optimizer included; ours with samples that need most.
Writes peaks.json and peaks.png to bench/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from ..engine.config import with_overrides
from ..engine.memory import predict
from .counts import baseline_peak
from .machine import RESULTS
from .step import BASELINE, OURS, configured

MICRO = 8
WAYS = {
    OURS: [], f"{OURS}, micro-batches of {MICRO}": [f"data.micro_batch_size={MICRO}"],
    f"{OURS}, recomputed": ["activation_checkpointing.image=1", "activation_checkpointing.text=1"],
}  # fmt: skip
"""Ours: in one packed pass, in parts with the contrast of the whole step, with every block's activations recomputed"""
COLOURS = ("#1f6f8b", "#5b8fb0", "#7a9e7e", "#d9a441")


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench peaks", description=__doc__.split("\n\n")[1])
    parser.add_argument("--tower", nargs="+", default=["ViT-S/16", "ViT-B/16", "ViT-L/16"], help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 32, 96], help="default: %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of everybody")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [(tower, size) for tower in options.tower for size in options.batch]
    shown = track(cases, "going through passes", console=Console(stderr=True), disable=not sys.stderr.isatty())
    report = {"cases": [case(tower, size, options.set) for tower, size in shown]}
    print(table(report))
    (options.out / "peaks.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.out / "peaks.png")
    return 0


def case(tower: str, size: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Bytes at the peak of a step, by who takes it."""
    config = configured("step", tower, size, "fp32", overrides)
    peaks = {
        name: predict(with_overrides(config, settings), 1, "cpu").total
        for name, settings in WAYS.items() if size > MICRO or "micro_batch" not in " ".join(settings)
    }  # fmt: skip
    return {"tower": tower, "batch": size, "peaks": {**peaks, BASELINE: baseline_peak(config)}}


def table(report: dict[str, Any]) -> str:
    """Markdown: GiB, and the share of the four passes' peak."""
    ways = [*WAYS, BASELINE]
    lines = [f"| tower | batch | {' | '.join(ways)} |", f"|---|---|{'---|' * len(ways)}"]
    for row in report["cases"]:
        whole = row["peaks"][BASELINE]
        cells = [
            "-" if way not in row["peaks"] else f"{row['peaks'][way] / 2**30:.1f} GiB"
            + ("" if way == BASELINE else f", {row['peaks'][way] / whole:.2f} x")
            for way in ways
        ]  # fmt: skip
        lines.append(f"| {row['tower']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel per tower: peak by batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    towers = dict.fromkeys(row["tower"] for row in report["cases"])
    figure, axes = plt.subplots(1, len(towers), figsize=(4 * len(towers), 3.6), squeeze=False, layout="constrained")
    for axis, tower in zip(axes.flat, towers, strict=True):
        for way, colour in zip([*WAYS, BASELINE], COLOURS, strict=True):
            rows = [row for row in report["cases"] if row["tower"] == tower and way in row["peaks"]]
            axis.plot(
                [row["batch"] for row in rows], [row["peaks"][way] / 2**30 for row in rows], "o-", ms=4, color=colour,
                label=way,
            )  # fmt: skip
        axis.set_title(tower, fontsize=10, loc="left")
        axis.set_xlabel("samples of a step", fontsize=8)
        axis.set_ylabel("GiB at the peak, counted", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(color="#e3e6ec", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
