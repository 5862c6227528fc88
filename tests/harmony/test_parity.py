"""The production engine gives the numbers of the authors' implementation (see parity.py)."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"


def parity(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "parity.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("mode", ["packed", "split"])
def test_every_quantity_of_the_reference_files(mode: str) -> None:
    result = parity("--mode", mode, GOLDEN / "tiny_a.safetensors", GOLDEN / "schedules_a.json")
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAIL")]
    assert result.returncode == 0 and not failed, failed or result.stderr[-2000:]
    assert sum(line.endswith("ok") for line in result.stdout.splitlines()) > 1400
    for quantity in (
        "step2.after.teacher.",
        "epoch0.loss.total",
        "inter.mlm.logits",
        "0.mask_ratio_array_at_iteration",
    ):
        assert quantity in result.stdout


def test_a_wrong_number_and_an_unknown_quantity_are_failures(tmp_path: Path) -> None:
    import json

    schedules = json.loads((GOLDEN / "schedules_a.json").read_text())
    schedules["schedules"][0]["lr"][3] *= 1 + 1e-6
    schedules["unheard_of"] = 1
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(schedules))
    result = parity(path)
    failed = [line for line in result.stdout.splitlines() if line.endswith("FAIL")]
    assert result.returncode == 1
    assert [line.split()[1] for line in failed] == ["0.lr", "unheard_of"]
