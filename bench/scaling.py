"""`harmony-fast bench scaling`: the table of docs/scaling.md, from the formulas of `engine/scaling.py`.

Memory that a rank holds for the whole run, and bytes that it sends in a step, for the paper's configuration with image
towers of four sizes. Nothing is run: these are counts, not measurements.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..engine.build import build_model
from ..engine.config import load_config
from ..engine.scaling import Sizes, held_bytes, sent_bytes

TOWERS = {
    **{name: [f"model.image={{name: {name}}}"] for name in ("ViT-S/16", "ViT-B/16", "ViT-L/16")},
    "ViT-H/14": ["model.image={width: 1280, depth: 32, heads: 16, patch_size: 14}", "views.local_size=98"],
}
GIB = 2**30


def sizes_of(config: Path, overrides: list[str]) -> Sizes:
    """Parameters of a configuration with another image tower, counted on the meta device."""
    with torch.device("meta"):
        model = build_model(load_config(config, overrides))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(trained, sum(p.numel() for p in model.teacher.parameters()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table in markdown; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench scaling", description=__doc__.split("\n\n")[1])
    default = Path(__file__).parents[1] / "configs" / "cc3m.yaml"
    parser.add_argument("--config", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="default: %(default)s")
    options = parser.parse_args(arguments)
    heading = " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in options.ranks)
    print(f"| tower | stage | {heading} |\n|---|---|{'---|' * len(options.ranks)}")
    for name, overrides in TOWERS.items():
        sizes = sizes_of(options.config, overrides)
        label = f"{name}: P {sizes.trained / 1e6:.0f} M, T {sizes.twins / 1e6:.0f} M"
        for stage in range(4):
            cells = [_cell(sizes, stage, ranks) for ranks in options.ranks]
            print(f"| {label if stage == 0 else ''} | {stage} | {' | '.join(cells)} |")
    return 0


def _cell(sizes: Sizes, stage: int, ranks: int) -> str:
    held, sent = sum(held_bytes(sizes, stage, ranks).values()), sent_bytes(sizes, stage, ranks)
    return f"{held / GIB:.2f} GiB, {sent / GIB:.2f} GiB" if ranks > 1 else f"{held / GIB:.2f} GiB, -"


if __name__ == "__main__":
    sys.exit(main())
