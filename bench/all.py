"""`harmony-fast bench all`: every benchmark that measures, each in a process of its own, with its defaults; then the
tables of README.md and docs/ are written anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

EVERY = ("kernels", "loader", "step", "memory", "peaks", "scaling", "guard", "tables")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; the exit status is 1 if any failed."""
    parser = argparse.ArgumentParser(prog="harmony-fast bench all", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=EVERY, default=EVERY, help="default: %(default)s")
    failed = []
    for name in parser.parse_args(arguments).only:
        print(f"--- {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "harmony_fast.engine.cli", "bench", name]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
