"""Counted peaks: the baseline's against a step that is run (ours: tests/engine/test_memory.py), and the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harmony_fast.bench import peaks, tables
from harmony_fast.bench.step import BASELINE, OURS, configured
from harmony_fast.bench.step_process import two_steps
from harmony_fast.bench.step_rivals import Baseline, made_samples
from test_step import HEADS, TINY


def test_the_baselines_peak_is_that_of_a_step() -> None:
    config = configured("step", "ViT-Ti/16", 8, "fp32", [*TINY, *HEADS])
    device = torch.device("cpu")
    measured = two_steps(lambda: Baseline(config, made_samples(config), SimpleNamespace(device=device)), device)[-1]
    assert peaks.baseline_peak(config) == pytest.approx(measured, rel=0.05)


def test_the_command_writes_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--tower", "ViT-Ti/16", "--batch", "8", "16", "--out", str(tmp_path), "--set", *TINY, *HEADS]
    assert peaks.main(command) == 0
    report = json.loads((tmp_path / "peaks.json").read_text())
    small, large = report["cases"]
    parts = f"{OURS}, micro-batches of 8"
    assert parts not in small["peaks"] and large["peaks"][parts] < large["peaks"][OURS] < 2 * small["peaks"][OURS]
    assert large["peaks"][BASELINE] > small["peaks"][BASELINE]
    assert tables.TABLES["peaks"](report) in capsys.readouterr().out
    assert (tmp_path / "peaks.png").read_bytes().startswith(b"\x89PNG")
