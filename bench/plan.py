"""`harmony-fast bench plan`: what fits, for image towers, cards and numbers of cards. Nothing is run.

For each: the largest micro-batch in bf16 without offload, found with every block checkpointed, packed or split passes,
and fp32 or 8-bit optimizer states; and the samples per second that are expected of the best plan, offload included, for
the paper's batch of 768, by data sheets. Writes plan.json to bench/results/ row by row, going on where it was
interrupted at the same commit, and prints the table in markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.config import RunConfig, load_config, with_overrides
from ..engine.disk import write_synced
from ..engine.memory import Passes, memory_of
from ..engine.plan import Budget, Planner
from ..engine.rates import rates_for
from ..engine.sizes import GIB
from ..engine.walks import Walks
from .machine import RESULTS, ROOT, commit

TOWERS = ("ViT-S/16", "ViT-B/16", "ViT-L/16")
CARDS, RANKS = (8, 12, 16, 24, 40, 80, 141), (1, 2, 4, 8)
HOST = 64 * GIB
"""Host memory a rank that plans may use"""
STEP = 8
"""Micro-batches are tried in multiples of this"""
KNOWN = (32, 64)
"""Micro-batches that are gone through; the others lie on a line through them, and are then gone through, too"""


class Setting(NamedTuple):
    """How memory is saved."""

    passes: str
    stage: int
    states: str

    def applied(self, config: RunConfig, micro: int, ranks: int) -> RunConfig:
        """The configuration with it, for one micro-batch on each rank."""
        return with_overrides(config, [
            f"pass={self.passes}", f"zero.stage={self.stage}", f"optimizer.states={self.states}",
            "activation_checkpointing={image: 1, text: 1}", f"data.batch_size={micro * ranks}", "precision=bf16",
        ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Go through all of it; the exit status is 0."""
    options = _parse(arguments)
    batch = load_config(options.config).data.batch_size
    found: dict[str, Any] = {"commit": commit(), "batch": batch, "cards_gib": list(options.cards), "rows": []}
    done = _rows_of(options.out, found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for tower, ranks in product(options.towers, options.ranks):
        config = load_config(options.config, [f"model.image.name={tower}"])
        cells = done.get((tower, ranks)) or dict(_cells(config, ranks, options.cards))
        found["rows"].append({"tower": tower, "gpus": ranks, "cells": cells})
        write_synced(options.out, (json.dumps(found, indent=1) + "\n").encode())
        print(_row(found["rows"][-1]), flush=True)
    print(f"\n{markdown(found)}\nresults in {options.out}")
    return 0


def _rows_of(path: Path, like: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a file that the same command was writing: cells by tower and cards."""

    def of(report: dict[str, Any]) -> list[Any]:  # the file itself may be what differs from the commit
        return [report["commit"].removesuffix("+"), report["batch"], report["cards_gib"]]

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if of(found) == of(like):
            return {(row["tower"], row["gpus"]): row["cells"] for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def markdown(found: dict[str, Any]) -> str:
    """The table of the docs: micro-batch, samples per second."""
    lines = [f"| tower | GPUs | {' | '.join(f'{card} GiB' for card in found['cards_gib'])} |"]
    lines.append("|---|---|" + "---|" * len(found["cards_gib"]))
    return "\n".join([*lines, *(_row(row) for row in found["rows"])])


def _row(row: dict[str, Any]) -> str:
    shown = []
    for cell in row["cells"].values():
        micro = cell["largest_micro_batch"] or "-"
        rate = cell["samples_per_second"]
        shown.append(f"{micro}, {rate:,.0f}/s" if rate else "-")
    return f"| {row['tower']} | {row['gpus']} | {' | '.join(shown)} |"


def _cells(config: RunConfig, ranks: int, cards: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    walks = Walks(ranks, "cuda")
    settings = [
        Setting(*choice) for choice in product(("packed", "split"), (1, 2, 3) if ranks > 1 else (1,), ("fp32", "8bit"))
    ]
    known: dict[str, list[Passes]] = {
        passes: walks([Setting(passes, 1, "fp32").applied(config, micro, ranks) for micro in KNOWN])
        for passes in ("packed", "split")
    }
    with Planner(config, ranks, rates_for(cards[-1] * GIB)) as planner:
        for card in cards:
            best = planner.estimate(Budget(card * GIB, HOST), rates_for(card * GIB))
            if best is None:
                yield str(card), {"largest_micro_batch": 0, "samples_per_second": None}
                continue
            micro = _largest(config, ranks, card * GIB, settings, known, walks)
            yield str(card), {
                "largest_micro_batch": micro, "samples_per_second": best.samples_per_second, "plan": best.overrides,
            }  # fmt: skip
    walks.close()


def _largest(
    config: RunConfig, ranks: int, memory: float, settings: list[Setting], known: dict[str, list[Passes]], walks: Walks
) -> int:
    """The largest multiple of STEP that fits with any of the settings."""
    expected = sorted(((_on_the_line(config, ranks, memory, s, known[s.passes]), s) for s in settings), reverse=True)
    most, setting = expected[0]
    for micro in range(most + STEP, 0, -STEP):
        chosen = setting.applied(config, micro, ranks)
        if memory_of(chosen, ranks, walks([chosen])[0]).total <= memory:
            return micro
    return 0


def _on_the_line(config: RunConfig, ranks: int, memory: float, setting: Setting, known: list[Passes]) -> int:
    small, large = (
        memory_of(setting.applied(config, micro, ranks), ranks, passes).total
        for micro, passes in zip(KNOWN, known, strict=True)
    )
    each = (large - small) / (KNOWN[1] - KNOWN[0])
    return max(int((memory - small) / each + KNOWN[0]) // STEP * STEP, 0)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench plan", description=__doc__.split("\n\n")[1])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "cc3m.yaml", help="default: %(default)s")
    parser.add_argument("--towers", nargs="+", default=TOWERS, help="default: %(default)s")
    parser.add_argument("--cards", type=int, nargs="+", default=CARDS, help="GiB, default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="cards, default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.json", help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
