"""Several recipes under one budget: what a recipe becomes there, stopping and going on, failures, mean and spread."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import start
from harmony_fast.engine.checkpoint_folder import CheckpointFolder
from harmony_fast.engine.config import dump_config, load_config, parse_config, with_overrides
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.sweep import EVALUATED, Trial, plan_trial, run
from harmony_fast.engine.sweep_recipes import DEMO, Budget, settle_budget, under_budget
from harmony_fast.engine.sweep_results import as_markdown, collect, draw
from tiny import first_samples, tiny_config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
STEPS = 60


def write_yaml(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def budget() -> Budget:
    """The demo's, an eighth of its length, without making its data."""
    config = load_config(DEMO)
    return Budget("demo", config.model_dump(mode="json", by_alias=True, exclude_unset=True), config, 1911, 87)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_keeps_its_objectives_and_takes_everybodys_sizes(recipe: Path, budget: Budget, tmp_path: Path) -> None:
    theirs, ours = load_config(recipe), under_budget(recipe, budget, 5, tmp_path)
    assert list(ours.objectives.active()) == list(theirs.objectives.active())
    assert (ours.model, ours.data, ours.seed, ours.max_steps) == (budget.config.model, budget.config.data, 5, 87)
    assert (ours.views.global_size, ours.views.local_size) == (48, 24)
    assert (ours.views.global_crops, ours.views.block_ratios) == (theirs.views.global_crops, theirs.views.block_ratios)
    for objective in ours.objectives.active().values():
        assert getattr(objective, "prototypes", 0) <= 512
        assert getattr(objective, "width", 0) <= 64


def test_what_a_recipe_says_of_its_objectives_is_kept(budget: Budget, tmp_path: Path) -> None:
    def recipe(name: str) -> Any:
        return under_budget(ROOT / "configs" / "recipes" / f"{name}.yaml", budget, 0, tmp_path)

    assert recipe("siglip").objectives.contrastive.kind == "sigmoid"
    assert recipe("siglip").objectives.contrastive.initial_temperature == 0.1
    assert recipe("clip").objectives.contrastive.hard_weight_end == 1.0
    assert recipe("harmony").objectives.contrastive.hard_weight_end == 0.8  # the demo's
    assert recipe("dino").objectives.self_distillation.patch_weight is None
    assert recipe("silc").views.local_crops == 8
    assert recipe("scfs").objectives.scfs.search_temperature == 0.07
    assert recipe("scfs").objectives.scfs.bottleneck == 64  # as the demo's self-distillation
    assert recipe("harmony").objectives.contrastive.hard_weight_epochs == 2  # of 3, for 20 of 24
    assert recipe("harmony").optimizer.warmup_epochs == pytest.approx(2 / 8)
    assert recipe("harmony").epochs == 3


def test_a_recipe_without_a_base_speaks_for_itself(budget: Budget, tmp_path: Path) -> None:
    raw = {"data": {"train": "x.beton"}, "objectives": {"reconstruction": {"weight": 2.0, "width": 512}}}
    ours = under_budget(write_yaml(tmp_path / "own.yaml", raw), budget, 0, tmp_path)
    assert ours.objectives.active().keys() == {"reconstruction"}
    assert (ours.objectives.reconstruction.weight, ours.objectives.reconstruction.width) == (2.0, 64)


def test_what_data_may_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give demo, a \.beton file, or a configuration"):
        settle_budget("imagenet", [], 3)
    prepare([ROOT / "demo" / "noto.tar"], tmp_path / "a.beton", context=12, limit=9, workers=1, progress=False)
    budget = settle_budget(str(tmp_path / "a.beton"), ["data.batch_size=4", "epochs=6"], None)
    assert (budget.steps, budget.samples, budget.config.model.text.context) == (12, 9, 12)
    assert budget.config.evaluate.data == []  # the demo's say nothing about other data
    with pytest.raises(UserError, match="9 samples, less than one batch"):
        settle_budget(str(tmp_path / "a.beton"), [], 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared configuration, and three recipes of which one diverges and one is none."""
    folder = tmp_path_factory.mktemp("sweep")
    prepare([ROOT / "demo" / "noto.tar"], folder / "train.beton", context=16, limit=24, workers=1, progress=False)
    raw = tiny_config()
    raw["data"]["train"] = str(folder / "train.beton")
    raw["model"]["text"]["vocabulary"] = 49408
    labelled = str(first_samples(ROOT / "demo" / "twemoji.tar", folder / "labelled.tar", 20))
    raw["evaluate"] = {"data": [labelled], "bank": [labelled]}
    write_yaml(folder / "shared.yaml", raw)
    data = {"train": "x.beton"}
    write_yaml(folder / "clip.yaml", {"data": data, "objectives": {"contrastive": {"hard_weight_end": 1.0}}})
    write_yaml(folder / "wild.yaml", {"data": data, "objectives": {"reconstruction": {"weight": 1.0e39}}})
    write_yaml(folder / "typo.yaml", {"data": data, "objectives": {"contrastiv": {}}})
    return folder


def sweep(folder: Path, steps: int = STEPS) -> None:
    recipes = [folder / f"{name}.yaml" for name in ("clip", "wild", "typo")]
    run(recipes, [], str(folder / "shared.yaml"), steps, 1, folder / "out", 1)


def stop_when_it_trains(log: Path) -> None:
    """Ask this process to stop, as a job scheduler would, once there is a logged step."""
    while not (log.is_file() and log.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_stopping_going_on_and_failing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = folder / "out" / "clip" / "seed-0" / "log.jsonl"
    threading.Thread(target=stop_when_it_trains, args=(log,), daemon=True).start()
    with pytest.raises(SystemExit, match="the same command"):
        sweep(folder)
    before = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert 0 < before[-1] < STEPS

    with pytest.raises(UserError, match=r"2 of 3 runs failed") as failed:
        sweep(folder)
    assert "wild, seed 0: the loss or its gradient is not finite" in str(failed.value)
    assert "typo, seed 0:" in str(failed.value)
    assert "did you mean 'objectives.contrastive'" in str(failed.value)
    after = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert after[: len(before)] == before
    assert after[-1] == STEPS

    found = json.loads((folder / "out" / "sweep.json").read_text())
    assert set(found["recipes"]) == {"clip"}
    assert {"zero_shot/top1", "retrieval/image_to_text/r1", "knn/top1"} <= found["recipes"]["clip"]["summary"].keys()
    assert set(found["failed"]) == {"wild, seed 0", "typo, seed 0"}
    assert "| clip |" in capsys.readouterr().out
    assert (folder / "out" / "sweep.png").stat().st_size > 1000

    trial = plan_trial(folder / "clip.yaml", 0, folder / "out", settle_budget(str(folder / "shared.yaml"), [], STEPS))
    assert trial.trained
    assert trial.evaluated  # so the next call leaves it alone
    with pytest.raises(UserError, match=f"holds a sweep with steps {STEPS}, not 4"):
        sweep(folder, 4)


def test_what_is_finished(tmp_path: Path) -> None:
    """With settings that a plan has chosen; not with metrics of an evaluation that was interrupted."""
    raw = {**tiny_config(), "max_steps": 3, "memory": "auto", "evaluate": {"data": ["a.tar"]}}
    trial = Trial("tiny", 0, tmp_path, parse_config({**raw, "run_dir": str(tmp_path)}, "the test"))
    assert not trial.trained
    folder = CheckpointFolder(tmp_path)
    folder.begin(3)
    folder.publish(3, {})
    for planned, trained in (({"data.micro_batch_size": 2, "zero.stage": 2}, True), ({"data.batch_size": 4}, False)):
        used = with_overrides(trial.config, [f"{key}={value}" for key, value in planned.items()])
        (tmp_path / "config.yaml").write_text(dump_config(used))
        assert trial.trained == trained
    (tmp_path / "metrics.json").write_text(json.dumps({"zero_shot": {"top1": 0.5}}))
    assert not trial.evaluated
    (tmp_path / EVALUATED).touch()
    assert trial.evaluated


def test_training_ends_with_its_sweep(folder: Path) -> None:
    """Also with one that is killed: else nobody could go on in the run's folder."""
    words = folder / "clip.yaml", "--data", folder / "shared.yaml", "--seeds", 1, "--out", folder / "killed"
    process = start("sweep", *words, "epochs=2000")
    while not (folder / "killed" / "clip" / "seed-0" / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_mean_and_spread_over_seeds(budget: Budget, tmp_path: Path) -> None:
    trials = []
    for recipe, values in {"clip": [0.1, 0.2, 0.6], "mae": [0.5]}.items():
        for seed, value in enumerate(values):
            config = under_budget(ROOT / "configs" / "recipes" / f"{recipe}.yaml", budget, seed, tmp_path)
            trial = Trial(recipe, seed, tmp_path / recipe / f"seed-{seed}", config)
            trial.folder.mkdir(parents=True)
            metrics = {
                "knn": {"top1": value, "chance": {"top1": 0.125}},
                **({"zero_shot": {"top1": 0.25}} if recipe == "clip" else {}),
            }
            (trial.folder / "metrics.json").write_text(json.dumps(metrics))
            trials.append(trial)
    found = collect(budget, 3, ["mae", "clip"], trials, {"mae, seed 1": "no space left"})
    assert list(found["recipes"]) == ["mae", "clip"]
    summary = found["recipes"]["clip"]["summary"]["knn/top1"]
    assert summary == {"mean": pytest.approx(0.3), "std": pytest.approx(0.07**0.5), "n": 3}
    lines = as_markdown(found).splitlines()
    assert "| recipe | kNN top-1 | zero-shot top-1 |" in lines
    assert "| mae | 50.0 (n=1) | - |" in lines
    assert "| clip | 30.0 ± 26.5 | 25.0 ± 0.0 |" in lines
    assert "| *guessing* | 12 | - |" in lines
    assert lines[-1] == "mae, seed 1: failed: no space left"
    draw(found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
