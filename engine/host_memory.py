"""The host's memory: how much there is, and a malloc that keeps its pages.

Training on the CPU allocates and frees the same large buffers every step; by default glibc returns them to the kernel
and faults them in again, page by page, which can take as long as the arithmetic.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Large blocks come from the heap (mmap_max=0), which never shrinks (trim_threshold), grows in big steps (top_pad) and
# is offered to the kernel for huge pages (hugetlb=1). Allocators other than glibc's ignore the variable.
TUNABLES = {"mmap_max": "0", "trim_threshold": "1000000000000", "top_pad": "268435456", "hugetlb": "1"}
VARIABLE = "GLIBC_TUNABLES"
GROUPS, GROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Control groups with their limits, and in which of them this process is"""


def keep_pages() -> None:
    """Start this process again with `TUNABLES` (glibc reads them at the start only). The user's own settings stay."""
    if sys.platform == "linux" and keep_pages_in_children():
        os.execv(sys.executable, [sys.executable, "-m", "harmony_fast.engine.cli", *sys.argv[1:]])


def keep_pages_in_children() -> bool:
    """Put `TUNABLES` into the environment; whether any was missing there."""
    given = os.environ.get(VARIABLE, "")
    missing = [
        f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items() if f"glibc.malloc.{name}=" not in given
    ]
    os.environ[VARIABLE] = ":".join(filter(None, [given, *missing]))
    return bool(missing)


def host_memory() -> int:
    """Bytes of memory that this machine has, or less where a control group limits it: a container's, a SLURM job's."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in _limits():
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        memory = min(memory, int(limit)) if limit.isdecimal() else memory
    return memory


def _limits() -> Iterator[Path]:
    """Where limits may stand: in each group that this process is in, and in those above it; versions 1 and 2."""
    try:
        lines = GROUPS_OF_PROCESS.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0:memory:/", "0::/"]:  # in a container the root may be the group itself
        _, controllers, name = line.split(":", 2)
        folder, file = (GROUPS / "memory", "memory.limit_in_bytes") if controllers else (GROUPS, "memory.max")
        if not controllers or "memory" in controllers.split(","):
            group = Path(name.lstrip("/"))
            yield from (folder / above / file for above in (group, *group.parents))
