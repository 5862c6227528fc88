"""What the command line makes of its words."""

import os
from pathlib import Path

import harmony_fast.engine.evaluate
import pytest
from harmony_fast.engine import cli
from harmony_fast.engine.config import load_config


def test_options_of_evaluate_arrive_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(harmony_fast.engine.evaluate, "evaluate_run", lambda *given: calls.append(given))
    data = ["\N{CAMERA}/é 1.tar", "b: [c", os.fsdecode(b"\xff.tar"), "2026-02-28"]
    cli.evaluate(Path("run"), ["knn", "evaluate.neighbours=5"], data=data, classes="imagenet")
    (run, tasks, settings, _), found = calls[0], load_config(Path("demo"), calls[0][2]).evaluate
    assert (run, tasks, settings[-1]) == (Path("run"), ["knn"], "evaluate.neighbours=5")
    assert (found.data, found.classes, found.neighbours) == (data, "imagenet", 5)
