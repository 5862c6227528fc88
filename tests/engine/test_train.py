"""Whole runs through the command line: log, resume, signals, ranks, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from commands import ENVIRONMENT, log, losses, newest, run, start
from harmony_fast.engine.distributed import _read_slurm, first_host, most_tasks
from safetensors.torch import load_file

STEPS = 7


@pytest.fixture(scope="module")
def undisturbed(undisturbed_run: Callable[[int], Path]) -> Path:
    """A run of STEPS steps that nothing happened to (crossing two epoch ends: 3 steps each)."""
    return undisturbed_run(STEPS)


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    entries = log(undisturbed)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    names = ["contrastive", "self_distillation", "reconstruction", "masked_language", "text_distillation"]
    for entry in entries:
        assert {"loss", "samples_per_second", "lr", "ema_momentum", *(f"loss/{n}" for n in names)} <= entry.keys()
        assert sum(entry[f"loss/{n}"] for n in names) == pytest.approx(entry["loss"], rel=1e-5)
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["max_steps"] == STEPS
    assert any((undisturbed / "tensorboard").iterdir())
    weights = load_file(newest(undisturbed) / "weights.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())
    moved = [
        n
        for n in weights
        if n.startswith("teacher.") and not torch.equal(weights[n], weights[n.replace("teacher.", "student.")])
    ]
    assert len(moved) > 20  # student and teacher have parted


def test_the_first_line_says_how_large_the_student_is(config: Path, tmp_path: Path) -> None:
    """Also in stage 3, where parameters are empty between uses."""
    words = ("train", config, "max_steps=1")
    said = [run(*words, f"run_dir={tmp_path / str(stage)}", f"zero.stage={stage}") for stage in (1, 3)]
    one, three = (next(line for line in text.splitlines() if "M parameters" in line) for text in said)
    assert one.replace("ZeRO 1", "ZeRO 3") == three and "student 0.0 M" not in one


def test_an_interrupted_run_goes_on_with_the_same_losses(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    # Inside an epoch, at the first step of one, at the end; how the file is read makes no difference.
    for stop, reading in ((2, "auto"), (4, "direct"), (STEPS, "page_cache")):
        run("train", config, f"run_dir={tmp_path / 'run'}", f"max_steps={stop}", f"data.reading={reading}")
    assert losses(tmp_path / "run") == losses(undisturbed)
    ours, theirs = (load_file(newest(r) / "weights.safetensors") for r in (tmp_path / "run", undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_killed_goes_on_with_the_same_losses(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("train", config, f"run_dir={folder}", f"max_steps={STEPS}", "checkpoint_every=1")
    process = start(*arguments)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "latest").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    run(*arguments)
    assert losses(folder) == losses(undisturbed)


def test_two_ranks_compute_what_one_does(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    run("train", config, f"run_dir={tmp_path / 'run'}", "max_steps=4", "--ranks", 2)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(undisturbed), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-5)
    generated = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert generated["train_micro_batch_size_per_gpu"] == 4 and generated["zero_optimization"]["stage"] == 1


def test_tasks_of_slurm_join_each_other(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    tasks = [
        start(
            "train", config, f"run_dir={tmp_path / 'run'}", "max_steps=2", GLOO_SOCKET_IFNAME="lo",
            SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_STEP_NUM_TASKS=2, SLURM_STEP_NODELIST="localhost",
            HARMONY_FAST_STORE=tmp_path / "store",
        )
        for rank in range(2)
    ]  # fmt: skip
    for task in tasks:
        _, err = task.communicate(timeout=240)
        assert task.returncode == 0, err[-3000:]
    for ours, theirs in zip(losses(tmp_path / "run"), losses(undisturbed), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-5)


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "-m"],
    "deepspeed": ["deepspeed.launcher.launch", "--world_info", "eyJsb2NhbGhvc3QiOiBbMCwgMV19",  # {"localhost": [0, 1]}
                  "--master_addr", "127.0.0.1", "--master_port", "29510", "--module"],
}  # fmt: skip


ALONE = ["unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""Runs a command in a network namespace of its own: the launchers' stores listen on all interfaces"""


def may_be_alone() -> bool:
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_be_alone(), reason="needs unshare, ip, and the right to make a network namespace")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_of_a_launcher_join_each_other(config: Path, undisturbed: Path, tmp_path: Path, launcher: str) -> None:
    words = [sys.executable, "-m", *LAUNCHERS[launcher], "harmony_fast.engine.cli", "train", str(config)]
    result = subprocess.run(
        [*ALONE, *words, f"run_dir={tmp_path / 'run'}", "max_steps=2"],
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(losses(tmp_path / "run"), losses(undisturbed)[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("hosts", "first"), [
    ("gpu7", "gpu7"), ("gpu[07-09,12]", "gpu07"), ("a1,b[2-3]", "a1"), ("n[3,5-6]-ib,m1", "n3-ib"),
])  # fmt: skip
def test_slurms_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize(("tasks", "most"), [("8", 8), ("8(x2)", 8), ("4(x2),3", 4), ("1,12(x3),2", 12)])
def test_slurms_tasks_of_a_node(tasks: str, most: int) -> None:
    assert most_tasks(tasks) == most


@pytest.mark.parametrize(("gpus", "device"), [(0, "3"), (1, "0"), (4, "3")])
def test_a_task_of_slurm_uses_the_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch, gpus: int, device: str) -> None:
    said = {"SLURM_PROCID": "7", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "8"}
    said["SLURM_STEP_TASKS_PER_NODE"] = "4(x2)"
    monkeypatch.setattr("os.environ", said)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    _read_slurm()
    assert (said["RANK"], said["WORLD_SIZE"], said["LOCAL_RANK"]) == ("7", "8", device)
    assert said["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train(config: Path, undisturbed: Path, tmp_path: Path, precision: str) -> None:
    run("train", config, f"run_dir={tmp_path / 'run'}", "max_steps=3", f"precision={precision}", "zero.stage=2")
    ours, theirs = losses(tmp_path / "run"), losses(undisturbed)
    assert ours[0] == pytest.approx(theirs[0], rel=0.01)
    # fp16 skips its first steps until the loss scale fits, so later losses may lag
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs[:3]], rel=0.1)


def test_a_folder_of_another_run_is_refused(config: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    message = run("train", config, f"run_dir={tmp_path / 'run'}", "model.image.depth=1", "seed=3", fails=True)
    assert "holds a run of another configuration (differs in: " in message
    assert "model.image.depth" in message and "seed" in message


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    (["CONFIG", "data.train=nowhere.beton"], "nowhere.beton"),
    (["CONFIG", "data.batch_size=500"], "24 samples"),
    (["CONFIG", "model.text.context=20"], "prepare again with --context 20"),
    (["CONFIG", "data.batch_size=9", "--ranks", "2"], "cannot be divided among 2 ranks"),
])  # fmt: skip
def test_bad_input_is_one_line(config: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    words = [str(config) if word == "CONFIG" else word for word in arguments]
    err = run("train", *words, f"run_dir={tmp_path / 'run'}", fails=True)
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
