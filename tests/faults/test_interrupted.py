"""Runs that are killed or asked to stop at any moment go on as if nothing had happened."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import FAULTY, losses, newest, run, start, start_ranks
from counting import Faults
from safetensors.torch import load_file

STEPS, TIMES = 9, 20
pytestmark = pytest.mark.timeout(900)


def finish(process: subprocess.Popen) -> str:
    return process.communicate(timeout=200)[1]


def wait_until_it_trains(process: subprocess.Popen, folder: Path) -> None:
    while not (folder / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_interrupted_at_random(
    config: Path, undisturbed_run: Callable, tmp_path: Path, faults: Faults, ranks: int
) -> None:
    """TIMES starts, each interrupted a random time after it began its steps, the last one allowed to finish.

    Two ranks have a launcher every seventh time; else all of them get the signal, as a scheduler sends it.
    """
    folder, draw = tmp_path / "run", random.Random(ranks)
    words = ("train", config, f"run_dir={folder}", f"max_steps={STEPS}", "checkpoint_every=1")
    for k in range(TIMES):
        launched = ranks == 1 or k % 7 == 0
        processes = [start(*words, "--ranks", ranks)] if launched else start_ranks(ranks, tmp_path / "store", *words)
        before = writing(folder)
        while all(process.poll() is None for process in processes) and writing(folder) == before:
            time.sleep(0.005)  # until its first checkpoint has begun
        time.sleep(draw.uniform(0, 0.6))
        number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
        for process in processes:
            process.send_signal(number)
        faults.injected(f"{signal.Signals(number).name}, {ranks} rank(s)")
        for process in processes:
            finish(process)
        if (folder / "finished").exists():
            assert_same(folder, undisturbed_run(STEPS), ranks)
            shutil.rmtree(folder)  # from the start again
    run(*words, "--ranks", ranks)
    assert_same(folder, undisturbed_run(STEPS), ranks)


def writing(folder: Path) -> set[str]:
    """Checkpoints that are there, or being written."""
    return {path.name for path in (folder / "checkpoints").glob("*step-*")}


def assert_same(one: Path, other: Path, ranks: int) -> None:
    if ranks == 1:  # to the bit
        assert losses(one) == losses(other)
        ours, theirs = (load_file(newest(r) / "weights.safetensors") for r in (one, other))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    else:
        for ours, theirs in zip(losses(one), losses(other), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_ends_well(config: Path, tmp_path: Path, faults: Faults, number: int) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "finished").touch()  # as a shorter run would have left it
    process = start("train", config, f"run_dir={folder}", "epochs=2000")
    wait_until_it_trains(process, folder)
    process.send_signal(number)
    err = finish(process)
    assert process.returncode == 0 and "as asked" in err, err[-2000:]
    steps = len(losses(folder))
    assert newest(folder).name == f"step-{steps:08d}" and not (folder / "finished").exists()
    faults.injected(signal.Signals(number).name)


def test_a_second_signal_ends_at_once(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    faulty = [*FAULTY, '{"hang": {"steps": [2]}}']
    process = start("train", config, f"run_dir={folder}", "epochs=2000", command=faulty)
    wait_until_it_trains(process, folder)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    finish(process)
    assert process.returncode == 128 + signal.SIGTERM
    faults.injected("second signal")


def test_time_that_is_up_stops_in_good_order(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    begin = time.monotonic()
    message = run("train", config, f"run_dir={folder}", "epochs=2000", "--max-time", "0:00:20")
    assert "as asked" in message and time.monotonic() - begin < 60
    assert newest(folder).name == f"step-{len(losses(folder)):08d}"
    faults.injected("time is up")
