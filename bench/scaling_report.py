"""The tables of `harmony-fast bench scaling` in markdown, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..engine.sizes import GIB


def memory_table(report: dict[str, Any]) -> str:
    """GiB that a rank holds and sends, by tower, ZeRO stage and ranks."""
    ranks = report["ranks"]
    heading = " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in ranks)
    lines = [f"| tower | stage | {heading} |", f"|---|---|{'---|' * len(ranks)}"]
    for tower in report["towers"]:
        label = f"{tower['tower']}: P {tower['trained'] / 1e6:.0f} M, T {tower['twins'] / 1e6:.0f} M"
        for stage, cells in enumerate(tower["stages"]):
            shown = [
                f"{c['held'] / GIB:.2f} GiB, {c['sent'] / GIB:.2f} GiB" if n > 1 else f"{c['held'] / GIB:.2f} GiB, -"
                for n, c in zip(ranks, cells, strict=True)
            ]
            lines.append(f"| {label if stage == 0 else ''} | {stage} | {' | '.join(shown)} |")
    return "\n".join(lines)


def hours_table(report: dict[str, Any]) -> str:
    """Predicted hours of a training run by machine and data set, predicted speed by number of GPUs, and everything
    that was assumed."""
    sets = report["data_sets"]
    heading = " | ".join(f"{name} ({count / 1e6:.1f} M)" for name, count in sets.items())
    lines = [f"| predicted, {report['epochs']} epochs | micro-batch | samples/s | {heading} |",
             f"|---|---|---|{'---|' * len(sets)}"]  # fmt: skip
    for row in report["machines"]:
        hours = " | ".join(f"{row['hours'][name]:,.0f} h" for name in sets)
        lines.append(f"| {row['machine']} | {row['micro']} | {row['samples_per_second']:,.0f} | {hours} |")
    lines += ["", "| predicted, by GPUs | batch | samples/s | of one GPU's, each | parts of a step |"]
    lines += ["|---|---|---|---|---|"]
    for row in report["growth"]:
        parts = ", ".join(f"{name} {1e3 * value:,.0f} ms" for name, value in row["seconds"].items() if value > 5e-4)
        lines.append(
            f"| {row['gpus']}, {row['link']} | {row['batch']} | {row['samples_per_second']:,.0f} | "
            f"{100 * row['efficiency']:.0f} % | {parts} |"
        )
    return "\n".join([*lines, "", "Assumed:", "", *(f"- {line}" for line in report["assumptions"])])


def plot(report: dict[str, Any], path: Path) -> None:
    """Predicted speed by number of GPUs, one line per network, and that of so many single GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, networks = report["growth"], dict.fromkeys(row["link"] for row in report["growth"])
    counts = sorted({row["gpus"] for row in rows})
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axis.plot(counts, [n * rows[0]["samples_per_second"] for n in counts], "--", color="#98a2b3", label="single GPUs")
    for link, colour in zip(networks, ("#1f6f8b", "#d9a441", "#7a9e7e"), strict=False):
        line = [(row["gpus"], row["samples_per_second"]) for row in rows if row["link"] == link]
        axis.plot(*zip(*line, strict=True), "o-", color=colour, ms=4, label=link)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("GPUs of 80 GB")
    axis.set_ylabel("samples/s, predicted")
    axis.grid(color="#e3e6ec", lw=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
