"""`evaluate_every`: the numbers that `evaluate` finds, and a run that is not disturbed."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, as_ranks, log, losses, newest, run
from harmony_fast.engine.evaluate import evaluate_run


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first 30 samples of the demo's artists."""
    settings = []
    for key, name in (("data", "twemoji.tar"), ("bank", "noto.tar")):
        path = tmp_path_factory.mktemp("sets") / name
        with tarfile.open(ROOT / "demo" / name) as whole, tarfile.open(path, "w") as part:
            for member in list(whole)[:90]:
                part.addfile(member, whole.extractfile(member))
        settings.append(f"evaluate.{key}=[{path}]")
    return settings


@pytest.mark.parametrize(("ranks", "extra"), [(1, ()), (2, ("zero.stage=3",)), (1, ("precision=bf16",))])
def test_it_logs_what_evaluate_finds(
    config: Path, undisturbed_run: Callable, sets: list[str], tmp_path: Path, ranks: int, extra: tuple
) -> None:
    folder = tmp_path / "run"
    tasks = ("evaluate_tasks=[zero-shot, knn]", "evaluate.group_key=subcategory")
    words = ("train", config, f"run_dir={folder}", "max_steps=4", "evaluate_every=2", *tasks, *sets, *extra)
    if ranks == 1:
        run(*words)
    else:
        as_ranks(ranks, tmp_path, *words)
    entries = log(folder)
    assert [e["step"] for e in entries if "evaluate/zero_shot/top1" in e] == [2, 4]
    found = evaluate_run(folder, ["zero-shot", "knn"], [])
    half = "precision=bf16" in extra
    for key, value in {"zero_shot/top10": found["zero_shot"]["top10"], "knn/top1": found["knn"]["top1"]}.items():
        assert entries[-1][f"evaluate/{key}"] == pytest.approx(value, abs=0.01 if half else 1e-3), key
    assert entries[-1]["evaluate/seconds"] > 0 and newest(folder).name == "step-00000004"
    if not half:
        for ours, theirs in zip(losses(folder), losses(undisturbed_run(4)), strict=True):
            assert ours == (theirs if not extra else pytest.approx(theirs, rel=1e-5))


def test_without_data_it_is_refused(config: Path, tmp_path: Path) -> None:
    message = run("train", config, f"run_dir={tmp_path / 'run'}", "evaluate_every=2", fails=True)
    assert "evaluate_every needs evaluate.data" in message
