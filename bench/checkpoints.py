"""`harmony-fast bench checkpoints`: how long a run stands still to save, and how long saving and loading take.

For the model of a configuration on one rank: copying its state to host memory, during which training stands still;
writing, syncing and hashing it, during which it goes on; finding the newest whole checkpoint, for which all of it is
hashed; and loading it. Writes checkpoints.json to bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from ..engine.backends import has_bf16, settle_precision, use_backends
from ..engine.build import build_model
from ..engine.checkpoint import Checkpoints
from ..engine.config import load_config
from ..engine.distributed import join
from ..engine.ema import ShardedEma
from ..engine.zero import Zero
from .machine import ROOT, describe_machine, results_folder
from .timing import summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0."""
    options = _parse(arguments)
    ranks = join()
    config = settle_precision(load_config(options.config, options.overrides), has_bf16(ranks.device))
    use_backends(config, ranks.device)
    model = build_model(config).to(ranks.device)
    zero = Zero(model, config, ranks)
    ema = ShardedEma(zero, model)
    seconds: dict[str, list[float]] = {"copy": [], "write": [], "verify": [], "load": []}
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="bench-checkpoints-") as scratch:
        checkpoints = Checkpoints(Path(scratch), ranks, keep=1)
        for step in range(1, options.rounds + 1):
            seconds["copy"].append(_timed(partial(checkpoints.save, step, zero, ema)))
            seconds["write"].append(_timed(checkpoints.wait))
            seconds["verify"].append(_timed(checkpoints.latest))
            found, _ = checkpoints.latest()
            assert found is not None  # what was written above
            seconds["load"].append(_timed(partial(checkpoints.load, found, zero, ema)))
            size = sum(file.stat().st_size for file in found.iterdir())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = {
        "machine": describe_machine(), "config": options.config.name, "overrides": options.overrides,
        "precision": config.precision, "trained_parameters": trained, "bytes": size,
        "seconds": {name: summary(values)._asdict() for name, values in seconds.items()},
    }  # fmt: skip
    folder = options.out or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{trained / 1e6:.0f} M trained parameters, {size / 2**30:.2f} GiB")
    for name, values in seconds.items():
        print(f"{name:8} {summary(values).median:8.2f} s")
    print(f"results in {folder}")
    return 0


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="harmony-fast bench checkpoints", description=__doc__.split("\n\n")[1])
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "cc3m.yaml", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--out", type=Path, help="folder of the results; default: bench/results/<machine>")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
