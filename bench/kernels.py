"""`harmony-fast bench kernels`: every kernel against what a user would pick instead, on this machine.

First right, then fast: each rival is checked against fp64 on fresh random inputs (ours on memory poisoned with NaN),
then timed in alternating rounds of one process. Without a GPU the torch backends are compared, on small sizes.
Writes kernels.json and kernels.png to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import contrastive, ema, masked_attention, prototype_ce
from .comparison import OURS, compare
from .machine import caption, describe_machine, results_folder

OPERATIONS = {
    "masked_attention": masked_attention,
    "contrastive": contrastive,
    "prototype_ce": prototype_ce,
    "ema": ema,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparisons; the exit status is 1 if a kernel of ours was wrong, failed or was not checked."""
    options = _parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    report: dict[str, Any] = {"machine": describe_machine(), "device": device.type, "seed": options.seed}
    report["comparisons"] = done = []
    start = time.perf_counter()
    for name in options.only or OPERATIONS:
        for comparison in OPERATIONS[name].comparisons(device):
            if time.perf_counter() - start > options.limit:
                report.setdefault("left_out", []).append(f"{name}: {comparison.case}")
                continue
            done.append(compare(comparison, device, seed=options.seed, seconds=options.seconds))
            console.print(table(done[-1]))
            # After each: what was measured stays if the machine is taken away.
            (folder / "kernels.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, folder / "kernels.png")
    for case in report.get("left_out", []):
        console.print(f"left out for time: {case}")
    console.print(f"{folder / 'kernels.json'}, {folder / 'kernels.png'}", soft_wrap=True)
    return 0 if all(comparison["right"] for comparison in done) else 1


def table(comparison: dict[str, Any]) -> Table:
    """One comparison for the terminal."""
    made = Table(title=f"{comparison['operation']}: {comparison['case']}", title_justify="left", min_width=100)
    for heading in ("", "ms", "quartiles", "peak MiB", "GB/s", "error"):
        made.add_column(heading, justify="left" if not heading else "right")
    for name, result in comparison["results"].items():
        low, high = result["quartiles"]
        made.add_row(
            name, f"{result['milliseconds']:.3f}", f"{low:.3f} - {high:.3f}", _shown(result["peak_mib"], ".0f"),
            _shown(result.get("gigabytes_per_second"), ".0f"), _shown(result["relative_error"], ".1e"),
        )  # fmt: skip
    for name, why in comparison["not_run"].items():
        made.add_row(name, "-", why)
    if comparison["speedup"] is not None:
        repeatable = "the same bits twice" if comparison["repeatable"] else "other bits in a second run"
        made.caption = f"best baseline / ours: {comparison['speedup']:.2f}; {repeatable}"
    return made


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel per comparison: medians as bars, quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [c for c in report["comparisons"] if c["results"]]
    if not shown:
        return
    rows = -(-len(shown) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 0.6 + 1.9 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, comparison in zip(axes.flat, shown, strict=False):
        names = list(comparison["results"])[::-1]
        found = [comparison["results"][name] for name in names]
        middles = [r["milliseconds"] for r in found]
        spread = [[abs(r["quartiles"][i] - r["milliseconds"]) for r in found] for i in (0, 1)]
        colours = ["#1f6f8b" if name == OURS else "#b8c4cc" for name in names]
        axis.barh(names, middles, xerr=spread, color=colours, error_kw={"lw": 1})
        axis.set_title(f"{comparison['operation']}: {comparison['case']}", fontsize=9, loc="left")
        axis.set_xlabel("ms", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(caption(report), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench kernels", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", nargs="+", choices=list(OPERATIONS), help="these operations; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.png")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per comparison (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=400.0, help="start no comparison after so many seconds")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the inputs; default: a new one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
