"""The tables of `harmony-fast bench scaling` in markdown."""

from __future__ import annotations

from typing import Any

GIB = 2**30


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
