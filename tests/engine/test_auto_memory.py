"""`memory: auto` trains with a plan and keeps it; `plan --measure`. When memory runs out: tests/faults."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, as_ranks, call
from harmony_fast.engine.config import load_config, plain
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.nested import dotted
from steps import config

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    prepare([ROOT / "demo" / "noto.tar"], path, context=16, limit=96, workers=1, progress=False)
    return path


def write(tmp_path: Path, beton: Path, **over: Any) -> Path:
    over = {"objectives": {"contrastive": {"embed_dim": 16}}, "model__image__depth": 1, **over}  # planned in seconds
    raw = config(data__train=str(beton), **over)
    del raw["model"]["text"]["vocabulary"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def last_entry(run: Path) -> dict[str, Any]:
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def test_a_run_takes_the_plan_and_keeps_it(tmp_path: Path, beton: Path) -> None:
    words = ["train", write(tmp_path, beton), f"run_dir={tmp_path / 'run'}", "memory=auto"]
    first = as_ranks(2, tmp_path, *words, "max_steps=1")[0]
    plans = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "going through the passes" in first.stdout and plans["failed"] == 0
    used = dotted(plain(load_config(tmp_path / "run" / "config.yaml")))
    for override in plans["plans"][0]["overrides"]:
        key, _, value = override.partition("=")
        assert used[key] == yaml.safe_load(value), key
    entry = last_entry(tmp_path / "run")
    assert entry["memory/predicted_gib"] == pytest.approx(plans["plans"][0]["tensors"] / 2**30)
    assert entry["memory/peak_gib"] > entry["memory/predicted_gib"]  # Python and its libraries are in it
    again = as_ranks(2, tmp_path, *words, "max_steps=2")[0]
    assert "going through the passes" not in again.stdout
    assert "resumed at step 1" in again.stderr and last_entry(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("given", ["24", "much", "-1GiB"])
def test_a_size_without_unit_is_refused(tmp_path: Path, beton: Path, given: str) -> None:
    result = call("train", write(tmp_path, beton), f"run_dir={tmp_path / 'run'}", f"memory={given}")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and "'memory'" in result.stderr


def test_measure_runs_the_best_plan(tmp_path: Path, beton: Path) -> None:
    words = ["plan", write(tmp_path, beton), "--memory", "4GiB", "--gpus", 2, "--measure", "--json"]
    result = call(*words, "--keep", "zero.offload_optimizer", "--keep", "zero.offload_parameters")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["rates"]["name"] == "this machine's processor" and 1e8 < found["rates"]["flops"] < 1e14
    assert found["plans"][0]["tensors"] == pytest.approx(found["measured"]["tensors"], rel=0.05)
    assert found["measured"]["seconds"] > 0
