"""One rank of a test: `python memory_worker.py SETTINGS.json OUT`. Writes the most bytes of tensors that were alive in
a step under each setting to OUT/<setting>.json.
"""

import json
import sys
from pathlib import Path

from harmony_fast.engine.config import parse_config
from harmony_fast.engine.distributed import join, leave
from harmony_fast.engine.measure import measure_steps


def main(settings: Path, out: Path) -> None:
    """All settings of the file: {"name": configuration, ...}."""
    ranks = join()
    for name, raw in json.loads(settings.read_text()).items():
        found = measure_steps(parse_config(raw, name), ranks)
        if ranks.is_main:
            (out / f"{name}.json").write_text(json.dumps(found["tensors"]))
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
