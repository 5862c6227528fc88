"""How much memory there is, where control groups limit it."""

from pathlib import Path

import pytest
from harmony_fast.engine import host_memory

MIB = 2**20


@pytest.mark.parametrize(("groups", "limits", "memory"), [
    ("0::/\n", {"memory.max": "max"}, None),
    ("0::/\n", {"memory.max": f"{64 * MIB}"}, 64 * MIB),  # a container sees its own group as the root
    ("0::/slurmstepd.scope/job_7/step_0/user/task_0\n", {"slurmstepd.scope/job_7/memory.max": f"{32 * MIB}"}, 32 * MIB),
    ("9:cpu,memory:/slurm/job_7\n1:cpuset:/x\n", {"memory/slurm/memory.limit_in_bytes": f"{16 * MIB}"}, 16 * MIB),
    ("9:cpuset:/slurm\n", {"memory/slurm/memory.limit_in_bytes": f"{16 * MIB}"}, None),
    (None, {"memory/memory.limit_in_bytes": f"{8 * MIB}", "memory.max": "max"}, 8 * MIB),
])  # fmt: skip
def test_the_smallest_limit_of_all_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, limits: dict[str, str], memory: int | None
) -> None:
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "GROUPS_OF_PROCESS", tmp_path / "self")
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.__getitem__)
    if groups is not None:
        (tmp_path / "self").write_text(groups)
    for name, limit in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    assert host_memory.host_memory() == (memory or 2**32)
