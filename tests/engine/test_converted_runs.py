"""Runs that begin with the authors' weights train, evaluate and make a report."""

import json
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import torch
from authors_checkpoints import HEADS, Weights, authors_state, fixture_weights, saved
from harmony_fast.engine.convert import from_run, to_run
from harmony_fast.engine.data.prepare import prepare
from harmony_fast.engine.evaluate import evaluate_run
from harmony_fast.engine.report import write_report
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.beton"
    prepare([commands.ROOT / "demo" / "noto.tar"], path, context=16, limit=16, workers=1, progress=False)
    return path


@pytest.fixture(scope="module")
def real() -> Weights:
    """The fixture's weights with the tokenizer's vocabulary in place of their 100 words."""
    torch.manual_seed(0)
    golden = fixture_weights()
    words = [n for n in golden if n.endswith("token_embedding.weight") or n.startswith("mlm.head.")]
    return authors_state({**golden, **{n: 0.02 * torch.randn(49409, *golden[n].shape[1:]) for n in words}})


def converted(weights: Weights, beton: Path, run: Path, *settings: str) -> list[str]:
    """A run of them that can be trained; returns the overrides."""
    overrides = [
        *HEADS, f"data.train={beton}", "data.batch_size=8", "data.workers=1", "log_every=1", "views.local_crops=2",
        "checkpoint_every=1", *settings,
    ]  # fmt: skip
    to_run([saved(run.with_suffix(".pth"), {"model": weights})], run, overrides)
    return overrides


def weights_at(run: Path, step: int) -> Weights:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


def assert_started_from(run: Path, start: Weights) -> None:
    """The learning rate of the first step is 0: the student is still as given, and its average moves towards it."""
    first = weights_at(run, 1)
    for name, value in start.items():
        if name.startswith("student.") or "decoder" in name:
            assert torch.equal(first[name], value), name
        elif name.startswith("teacher."):
            moved = 0.996 * value + 0.004 * start[name.replace("teacher.", "student.", 1)]
            torch.testing.assert_close(first[name], moved, rtol=1e-5, atol=1e-7)


def test_sharded_training_starts_from_the_weights_unrounded(real: Weights, tmp_path: Path, beton: Path) -> None:
    run = tmp_path / "run"
    converted(real, beton, run, "precision=bf16", "zero.stage=2")
    start = weights_at(run, 0)
    commands.as_ranks(2, tmp_path, "train", run / "config.yaml", "max_steps=1")
    assert_started_from(run, start)


def test_a_converted_run_trains_and_evaluates(
    real: Weights, tmp_path: Path, beton: Path, tar: Callable, encoded: Callable, picture: Callable
) -> None:
    run = tmp_path / "run"
    overrides = converted(real, beton, run)
    start = weights_at(run, 0)
    commands.run("train", run / "config.yaml", "max_steps=2")
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert_started_from(run, start)
    second = weights_at(run, 2)
    assert not torch.equal(second["student.image.cls_token"], start["student.image.cls_token"])

    files = [(f"{i}.{kind}", data) for i in range(4) for kind, data in (
        ("jpg", encoded(picture(i), quality=90)), ("txt", f"thing {i}".encode()),
        ("json", json.dumps({"name": f"thing {i}"}).encode()),
    )]  # fmt: skip
    evaluation = f"evaluate.data=[{tar('eval.tar', files)}]"
    assert set(evaluate_run(run, [], [evaluation])) == {"zero_shot", "retrieval"}
    from_run(run, tmp_path / "after.pth")
    after = torch.load(tmp_path / "after.pth", weights_only=True)["model"]
    assert list(after) == list(real)
    assert torch.equal(after["image_encoder.cls_token"], second["student.image.cls_token"])

    to_run([tmp_path / "run.pth"], tmp_path / "fresh", [*overrides, evaluation])
    page = write_report(tmp_path / "fresh").read_text()  # before any training
    assert "checkpoint step-00000000" in page and page.count("<img") + page.count("<svg") > 8
