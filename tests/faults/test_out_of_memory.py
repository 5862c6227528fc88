"""`memory: auto` when memory really runs out: the next plan is taken; without a plan the message says what helps."""

import json
import resource
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import ROOT, log, start
from counting import Faults
from harmony_fast.engine.data.prepare import prepare
from tiny import tiny_config

pytestmark = pytest.mark.timeout(600)
LIMIT = 2450 * 2**20
"""Bytes: between what the best and the most frugal plan of `hungry` need, with what Python takes"""


@pytest.fixture(scope="module")
def hungry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose activations are most of what it needs, so that the plans differ."""
    folder = tmp_path_factory.mktemp("hungry")
    prepare([ROOT / "demo" / "noto.tar"], folder / "train.beton", context=16, limit=192, workers=1, progress=False)
    raw = tiny_config()
    raw["data"] |= {"train": str(folder / "train.beton"), "batch_size": 192}
    raw["model"]["image"] |= {"depth": 6, "width": 64, "patch_size": 2}
    raw["views"] |= {"global_size": 32, "local_size": 16}
    raw["objectives"] = {"contrastive": {"embed_dim": 16}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def limited(*words: object) -> subprocess.CompletedProcess[str]:
    """A command with no more than LIMIT of memory for its data, as it starts and where it starts again."""
    process = start(*words)
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (LIMIT, LIMIT))
    out, err = process.communicate(timeout=500)
    return subprocess.CompletedProcess(process.command, process.returncode, out, err)


def test_when_memory_runs_out_the_next_plan_is_taken(hungry: Path, tmp_path: Path, faults: Faults) -> None:
    result = limited("train", hungry, f"run_dir={tmp_path / 'run'}", "memory=64GiB", "max_steps=1")
    assert result.returncode == 0, result.stderr
    failed = json.loads((tmp_path / "run" / "plan.json").read_text())["failed"]
    assert failed > 0
    assert result.stderr.count("going on with the next plan") == failed
    assert log(tmp_path / "run")[-1]["step"] == 1
    for _ in range(failed):
        faults.injected("memory runs out")


def test_without_a_plan_the_message_says_what_helps(hungry: Path, tmp_path: Path, faults: Faults) -> None:
    result = limited("train", hungry, f"run_dir={tmp_path / 'run'}", "max_steps=1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "memory ran out" in result.stderr and "harmony-fast plan" in result.stderr
    faults.injected("memory runs out")
