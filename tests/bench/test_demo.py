"""`bench demo`: what it writes is what the run's own files say."""

import json
from pathlib import Path

import pytest
from commands import ROOT, run
from harmony_fast.bench import demo, tables
from harmony_fast.engine.errors import UserError
from tiny import first_samples


def test_it_says_what_the_run_says(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With the commands as forks, of which each is one that `call` would start."""
    monkeypatch.setattr(demo, "call", run)
    labelled = first_samples(ROOT / "demo" / "twemoji.tar", tmp_path / "labelled.tar", 20)
    words = [f"data.train={beton}", "data.batch_size=8", "max_steps=2", "log_every=1", f"evaluate.data=[{labelled}]",
             f"evaluate.bank=[{labelled}]"]  # fmt: skip
    assert demo.main([*words, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["steps"] == 2 and report["overrides"] == words
    assert report["losses_first"]["loss"] > 0 and "loss/contrastive" in report["losses_last"]
    assert report["losses_first"] != report["losses_last"]
    assert report["metrics"]["knn"]["top1"] >= 0 and report["seconds_train_and_evaluate"] > 0
    knn = f"| {100 * report['metrics']['knn']['top1']:.1f} |"
    assert knn in tables.demo(report) and "nearest neighbours" in capsys.readouterr().out


def test_a_command_that_fails_ends_it() -> None:
    with pytest.raises(UserError, match="harmony-fast no-such-command ended with exit status 2"):
        demo.call("no-such-command")
