"""`harmony-fast bench guard [--update]`: what a step costs, counted, against the committed values.

For a few small configurations the real passes are gone through on the meta device, and what does not depend on a
machine's mood is counted: operations per sample, bytes at the peak and written, calls of operators (kernel launches, on
a GPU), backward passes, tokens through each tower and head, and, by the formulas of `engine/scaling.py`, the bytes that
one of 8 ranks sends. The exit status is 1 if a quantity grew by more than its tolerance: an accidental slowdown fails
the build, and one that is meant is committed with its new values. Compares with bench/results/guard.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..engine.accumulate import accumulate
from ..engine.backends import DTYPES
from ..engine.build import build_model
from ..engine.config import load_config
from ..engine.errors import UserError
from ..engine.live_bytes import LiveBytes
from ..engine.memory import Imagined
from ..engine.scaling import Sizes, sent_bytes
from ..harmony.model import Branch, Harmony
from ..harmony.objectives import Collectives
from ..harmony.objectives.masked_language import MaskedLanguage
from ..harmony.objectives.reconstruction import Reconstruction
from ..kernels import dispatch
from .counts import CLOCK, imagined_views
from .machine import RESULTS

COMMITTED = RESULTS / "guard.json"
CONFIGS = Path(__file__).parents[1] / "configs"
BATCH = 8
SMALL = [
    "model.image={width: 96, depth: 3, heads: 3, patch_size: 16}", "model.text.width=64", "model.text.depth=2",
    "model.text.heads=2", "model.text.vocabulary=1000", "objectives.contrastive.embed_dim=64", "precision=bf16",
]  # fmt: skip
SMALL_HEADS = [
    "objectives.self_distillation={prototypes: 512, hidden: 128, bottleneck: 32}",
    "objectives.text_distillation={prototypes: 256, hidden: 128, bottleneck: 32}",
    "objectives.reconstruction={width: 64, depth: 2, heads: 2}", "objectives.masked_language.depth=1",
]  # fmt: skip
CASES: dict[str, tuple[str, list[str], str]] = {
    "all objectives": ("cc3m.yaml", SMALL_HEADS, "auto"),
    "stochastic depth": ("cc3m.yaml", [*SMALL_HEADS, "model.image.drop_path=0.3"], "auto"),
    "split passes": ("cc3m.yaml", [*SMALL_HEADS, "pass=split"], "auto"),
    "micro-batches": ("cc3m.yaml", [*SMALL_HEADS, f"data.micro_batch_size={BATCH // 2}"], "auto"),
    "recomputed": ("cc3m.yaml", [*SMALL_HEADS, "activation_checkpointing={image: 1, text: 1}"], "auto"),
    "on a processor": ("cc3m.yaml", [*SMALL_HEADS, "precision=fp32"], "torch"),
    "CLIP": ("recipes/clip.yaml", [], "auto"),
}
"""A configuration file, what is set, and the kernels' backend: auto is what a GPU takes"""
TOLERANCE = {"operations a sample": 0.001, "tokens": 0.0, "bytes sent": 0.001, "backward passes": 0.0,
             "bytes at the peak": 0.01, "bytes written": 0.01, "operator calls": 0.02}  # fmt: skip
OTHER_TORCH = 0.1
"""Tolerance of bytes and calls where another version of torch made the committed values: operators differ"""
OF_TORCH = ("bytes at the peak", "bytes written", "operator calls")
FIRST_TEXT_LAYER = "transformer.resblocks.0.mlp.c_fc"


class Change(NamedTuple):
    """A quantity that is not within its tolerance."""

    case: str
    quantity: str
    before: float
    now: float

    def __str__(self) -> str:
        how = "grew" if self.now > self.before else "fell"
        share = f" by {abs(self.now / self.before - 1):.1%}" if self.before else ""
        return f"{self.case}: {self.quantity} {how}{share}, {self.before:,.0f} to {self.now:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and compare; a line for each change. Raises UserError if there is nothing to compare with."""
    options = _parse(arguments)
    now: dict[str, Any] = {"torch": torch.__version__.partition("+")[0], "cases": {name: count(name) for name in CASES}}
    if options.update:
        options.file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        print(f"{len(CASES)} cases written to {options.file}")
        return 0
    changes = list(compare(_read(options.file), now))
    grown = [change for change in changes if change.now > change.before]
    for change in changes:
        print(change, file=sys.stderr if change in grown else sys.stdout)
    if grown:
        print("if that is meant: harmony-fast bench guard --update, and commit its file", file=sys.stderr)
    elif changes:
        print("better than committed: harmony-fast bench guard --update, and commit its file, to hold it")
    else:
        print(f"{sum(map(len, now['cases'].values()))} quantities of {len(CASES)} cases are as committed")
    return 1 if grown else 0


def count(name: str) -> dict[str, float]:
    """The quantities of a case."""
    file, overrides, backend = CASES[name]
    config = load_config(CONFIGS / file, [*SMALL, f"data.batch_size={BATCH}", *overrides])
    with torch.device("meta"):
        model = build_model(config)
    sizes = Sizes(sum(p.numel() for p in model.parameters() if p.requires_grad),
                  sum(p.numel() for p in model.teacher.parameters()))  # fmt: skip
    model = model.to(DTYPES[config.precision]).train()
    size = config.data.micro_batch_size or BATCH
    views = imagined_views(config.model_copy(update={"data": config.data.model_copy(update={"batch_size": size})}))
    tokens: Counter[str] = Counter()
    for where, layer in layers(model):
        layer.register_forward_pre_hook(lambda _, given, where=where: tokens.update({where: _rows(given[0])}))
    live = LiveBytes("meta")
    live.watch(model)
    with dispatch.preferring(backend), live:
        passes = Imagined(model, live)
        split = config.pass_mode == "split"
        accumulate(passes, [views] * (BATCH // size), CLOCK, Collectives(), split, config.kept_graphs)
    return {
        "operations a sample": live.flops / BATCH, "bytes at the peak": live.peak, "bytes written": live.written,
        "operator calls": live.calls, "backward passes": passes.passes,
        **{f"tokens: {where}": count for where, count in sorted(tokens.items())},
        **{f"bytes sent: stage {stage} of 8 ranks": sent_bytes(sizes, stage, 8) for stage in (1, 2, 3)},
    }  # fmt: skip


def layers(model: Harmony) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers whose rows are counted, by where they are."""
    for side, branch in (("student", model.student), ("teacher", model.teacher)):
        yield from ((f"{side}'s {name}", layer) for name, layer in _of_branch(branch))
    if "reconstruction" in model.objectives:
        pixels = cast(Reconstruction, model.objectives["reconstruction"]).decoder
        yield from (("pixel decoder", pixels.embed), ("predicted patches", pixels.pred))
    if "masked_language" in model.objectives:
        words = cast(MaskedLanguage, model.objectives["masked_language"]).decoder
        yield from (("word decoder", words.get_submodule(FIRST_TEXT_LAYER)), ("vocabulary", words.head))


def _of_branch(branch: Branch) -> Iterator[tuple[str, nn.Module]]:
    if branch.image is not None:
        blocks = branch.image.blocks
        first, last = (block.get_submodule("mlp.fc1") for block in (blocks[0], blocks[-1]))
        yield from (("image tower", first), ("last image block", last))
    if branch.text is not None:
        yield "text tower", branch.text.get_submodule(FIRST_TEXT_LAYER)
    yield from ((f"{name} head", head.get_submodule("mlp.0")) for name, head in branch.heads.items())


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def compare(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    """What left its tolerance; a quantity that only one of the two has counts as 0 in the other."""
    same_torch = before["torch"] == now["torch"]
    for case in before["cases"] | now["cases"]:
        old, new = before["cases"].get(case, {}), now["cases"].get(case, {})
        for quantity in old | new:
            kind = quantity.partition(":")[0]
            allowed = TOLERANCE[kind] if same_torch or kind not in OF_TORCH else OTHER_TORCH
            change = Change(case, quantity, old.get(quantity, 0.0), new.get(quantity, 0.0))
            if abs(change.now - change.before) > allowed * change.before:
                yield change


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; --update writes it") from None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench guard", description=__doc__.split("\n\n")[1])
    parser.add_argument("--update", action="store_true", help="write the values that are counted now")
    parser.add_argument("--file", type=Path, default=COMMITTED, help="the committed values (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
