"""Train several configurations, each in a process of its own: `python recipes_worker.py SETTINGS.json`.

SETTINGS.json holds [configuration file, overrides] pairs. The processes are forks of this one, two at a time, so that
what takes seconds to import is imported once.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - imports torch's compiler, as every run does
import harmony_fast.engine.data.loader  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from harmony_fast.engine.config import load_config
from harmony_fast.engine.distributed import leave
from harmony_fast.engine.train import train

AT_ONCE = 2


def start(path: str, overrides: list[str]) -> None:
    """Train in a new process."""
    if os.fork():
        return
    try:
        train(load_config(Path(path), overrides))
    except BaseException as error:
        print(f"{path}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    leave()


def main(settings: Path) -> None:
    """Exit status 1 if one fails."""
    waiting, running, failed = json.loads(settings.read_text()), 0, False
    while waiting or running:
        while waiting and running < AT_ONCE:
            start(*waiting.pop(0))
            running += 1
        failed |= os.wait()[1] != 0
        running -= 1
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
