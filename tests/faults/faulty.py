"""`python faulty.py FAULTS train CONFIG ...`: the command line with faults in it.

FAULTS is JSON: {"poison": {"steps": [3, 4], "ranks": [0]}} puts infinities into the crops of a step; {"hang": ...}
never comes back from making them; {"die": ...} kills the process there; {"stall": ...} has the loader's thread hang.
"""

import json
import os
import signal
import sys
import time

from harmony_fast.engine import cli, train
from harmony_fast.engine.data import loader
from harmony_fast.engine.host_memory import TUNABLES, VARIABLE

FAULTS = json.loads(sys.argv.pop(1))
StepViews = train.StepViews


def due(kind: str, step: int) -> bool:
    """Whether this fault is to happen in this step, the first being 1, on this rank."""
    place = FAULTS.get(kind, {})
    return step in place.get("steps", []) and int(os.environ.get("RANK", 0)) in place.get("ranks", [0, 1])


class FaultyViews(StepViews):
    """Views with whatever goes wrong while they are made."""

    def __init__(self, config, batch, clock, *rest) -> None:
        super().__init__(config, batch, clock, *rest)
        self._step = clock.step + 1

    def _make(self, part):
        if due("hang", self._step):
            time.sleep(1e6)
        if due("die", self._step):
            os.kill(os.getpid(), signal.SIGKILL)
        views = super()._make(part)
        if due("poison", self._step):
            views.global_crops.fill_(float("inf"))
        return views


class FaultyLoader(loader.Loader):
    """A loader whose thread never comes back from a batch."""

    def _batch(self, indices, epoch, key):
        self._made = getattr(self, "_made", 0) + 1
        if due("stall", self._made):
            time.sleep(1e6)
        return super()._batch(indices, epoch, key)


train.StepViews = FaultyViews
loader.Loader = FaultyLoader
# So that the command does not start itself again, without this file.
os.environ[VARIABLE] = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())

if __name__ == "__main__":
    cli.main()
