"""The guard of counted quantities: the committed values are the code's, and a slowdown does not pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harmony_fast.bench import guard
from harmony_fast.engine.errors import UserError
from harmony_fast.harmony.heads import WordDecoder
from harmony_fast.harmony.model import Harmony


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases are enough to see a change in."""
    monkeypatch.setattr(guard, "CASES", {name: guard.CASES[name] for name in ("all objectives", "CLIP")})


def run(committed: dict[str, Any], tmp_path: Path) -> int:
    path = tmp_path / "guard.json"
    path.write_text(json.dumps({**committed, "cases": {name: committed["cases"][name] for name in guard.CASES}}))
    return guard.main(["--file", str(path)])


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(guard.COMMITTED.read_text())


def test_the_committed_values_are_the_codes(capsys: pytest.CaptureFixture) -> None:
    status = guard.main([])
    assert status == 0, capsys.readouterr().err


def test_a_second_teacher_pass_is_caught(
    few: None, committed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    teach = Harmony.teach
    monkeypatch.setattr(Harmony, "teach", lambda model, views: (teach(model, views), teach(model, views))[1])
    assert run(committed, tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    tokens = committed["cases"]["all objectives"]["tokens: teacher's image tower"]
    assert f"all objectives: tokens: teacher's image tower grew by 100.0%, {tokens:,} to {2 * tokens:,}" in lines
    assert any(line.startswith("all objectives: operations a sample grew") for line in lines)
    assert not any(line.startswith("CLIP") for line in lines)  # which has no teacher


def test_logits_at_every_word_are_caught(
    few: None, committed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward = WordDecoder.forward

    def everywhere(self: WordDecoder, x: torch.Tensor, layout: Any, places: torch.Tensor) -> torch.Tensor:
        return forward(self, x, layout, torch.arange(len(x), device=x.device))[places]

    monkeypatch.setattr(WordDecoder, "forward", everywhere)
    assert run(committed, tmp_path) == 1
    assert "all objectives: tokens: vocabulary grew by" in capsys.readouterr().err


def test_what_got_better_asks_to_be_committed(
    few: None, committed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    worse = json.loads(json.dumps(committed))
    worse["cases"]["CLIP"]["operator calls"] *= 2
    assert run(worse, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "CLIP: operator calls fell by 50.0%" in printed and "--update" in printed
    path = tmp_path / "new.json"
    assert guard.main(["--update", "--file", str(path)]) == 0
    assert guard.main(["--file", str(path)]) == 0


def test_another_torch_may_call_other_operators(committed: dict[str, Any]) -> None:
    other = json.loads(json.dumps({**committed, "torch": "2.10.0"}))
    other["cases"]["CLIP"]["operator calls"] *= 1.05
    assert list(guard.compare(other, committed)) == []
    other["cases"]["CLIP"]["tokens: student's text tower"] -= 1
    assert [change.quantity for change in guard.compare(other, committed)] == ["tokens: student's text tower"]


def test_without_values_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--update writes it"):
        guard.main(["--file", str(tmp_path / "none.json")])
