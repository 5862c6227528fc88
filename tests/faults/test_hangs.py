"""Steps that never end, ranks that are lost, loaders that stall, disks that are full: said, and ended in time."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import FAULTY, as_ranks, log, newest, run, start
from counting import Faults
from warm import Warm

SHORT = ("watchdog=5", "watchdog_seconds=3")


def faulty(**kinds: object) -> list[str]:
    return [*FAULTY, json.dumps(kinds)]


def ended(process: subprocess.Popen, seconds: float) -> str:
    err = process.communicate(timeout=seconds)[1]
    assert process.returncode == 1, err[-2000:]
    return err


@pytest.mark.parametrize("kind", ["hang", "stall"])
def test_a_step_that_hangs_is_ended_with_its_stacks(config: Path, tmp_path: Path, faults: Faults, kind: str) -> None:
    folder = tmp_path / "run"
    words = ("train", config, f"run_dir={folder}", "epochs=50", *SHORT)
    err = ended(start(*words, command=faulty(**{kind: {"steps": [4]}})), 120)
    assert "a step has taken" in err.splitlines()[-1] and "stacks-rank-0.txt" in err
    stacks = (folder / "stacks-rank-0.txt").read_text()
    assert ("_make" if kind == "hang" else "_batch") in stacks  # what was at fault
    assert len(log(folder)) == 3
    faults.injected("hanging step" if kind == "hang" else "stalled loader")
    run(*words, "max_steps=5")  # goes on afterwards


def test_every_ranks_stacks_are_kept(config: Path, tmp_path: Path, faults: Faults) -> None:
    """One of two ranks hangs; the other waits for it in a collective."""
    folder = tmp_path / "run"
    tasks = [
        start(
            "train", config, f"run_dir={folder}", "epochs=50", *SHORT,
            command=faulty(hang={"steps": [4], "ranks": [1]}), RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2,
            LOCAL_WORLD_SIZE=2, HARMONY_FAST_STORE=tmp_path / "store", GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2)
    ]  # fmt: skip
    for task in tasks:
        ended(task, 150)
    assert "_make" in (folder / "stacks-rank-1.txt").read_text()
    assert "_make" not in (folder / "stacks-rank-0.txt").read_text()
    faults.injected("hanging rank")


def two_ranks(config: Path, folder: Path) -> tuple[Warm, list[str]]:
    """A launcher whose ranks have saved a checkpoint, and the ranks' process ids."""
    process = start("train", config, f"run_dir={folder}", "epochs=2000", "checkpoint_every=2", "--ranks", 2)
    while not (folder / "checkpoints" / "latest").is_file() and process.poll() is None:
        time.sleep(0.05)
    return process, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_a_lost_rank_ends_the_run(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    process, children = two_ranks(config, folder)
    os.kill(int(children[-1]), signal.SIGKILL)
    assert "of 2 ended with exit status" in ended(process, 60).splitlines()[-1]
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    faults.injected("lost rank")
    words = ("train", config, f"run_dir={folder}", "epochs=2000", "max_steps=4")
    assert "resumed at step" in as_ranks(2, tmp_path, *words)[0].stderr


def test_ranks_end_with_their_launcher(config: Path, tmp_path: Path, faults: Faults) -> None:
    """Nobody is left who writes in the folder while the same command, started again, does."""
    process, children = two_ranks(config, tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    end = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end
        time.sleep(0.02)
    faults.injected("lost launcher")


def test_a_run_folder_has_one_process_at_a_time(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    process = start("train", config, f"run_dir={folder}", "epochs=2000")
    while not (folder / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.05)
    for ranks in (1, 2):
        message = run("train", config, f"run_dir={folder}", "epochs=2000", "--ranks", ranks, fails=True)
        assert f"{folder}: process {process.pid} on " in message and "is at work there" in message
        assert "Traceback" not in message
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert "resumed at step" in run("train", config, f"run_dir={folder}", "epochs=2000", "--max-time", "0:00:01")
    faults.injected("second run in a folder")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_no_run(config: Path, small_disk: Path, faults: Faults) -> None:
    """Neither the log, nor TensorBoard, nor checkpoints can be written from the second step on; then they can again."""
    folder, filler = small_disk / "run", small_disk / "filler"
    process = start("train", config, f"run_dir={folder}", "max_steps=200", "epochs=200", "checkpoint_every=50")
    while not (folder / "log.jsonl").is_file() and process.poll() is None:
        time.sleep(0.02)
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(64 * 2**20))
    err = process.communicate(timeout=200)[1]
    assert process.returncode == 1 and "Traceback" not in err, err[-3000:]  # it says that the end is not saved
    assert "the run goes on" in err and "checkpoint was not written" in err
    assert "step 200 could not be saved" in err.splitlines()[-1] and "0 MiB free" in err.splitlines()[-1]
    filler.unlink()
    faults.injected("full disk")


def test_a_folder_that_turns_unwritable_stops_no_run(config: Path, tmp_path: Path, faults: Faults) -> None:
    """A file where the checkpoint's folder would be made."""
    folder = tmp_path / "run"
    run("train", config, f"run_dir={folder}", "max_steps=2", "checkpoint_every=2")
    before = newest(folder)
    (folder / "checkpoints" / ".step-00000004.incomplete").mkdir()
    (folder / "checkpoints" / "step-00000004").write_text("in the way")
    message = run("train", config, f"run_dir={folder}", "max_steps=6", "checkpoint_every=2", "keep_checkpoints=5")
    assert "checkpoint was not written" in message and "the run goes on" in message
    assert before.is_dir() and newest(folder).name == "step-00000006"
    faults.injected("checkpoint cannot be written")
