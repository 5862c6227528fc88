"""Steps whose loss or gradient is not finite: left out, counted, and the end of the run if there are too many."""

import json
from pathlib import Path

import pytest
import torch
from commands import FAULTY, as_ranks, log, losses, newest, run
from counting import Faults
from safetensors.torch import load_file


def poisoned(*steps: int, ranks: tuple[int, ...] = (0, 1)) -> list[str]:
    return [*FAULTY, json.dumps({"poison": {"steps": steps, "ranks": ranks}})]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_a_step_that_is_not_finite_changes_nothing(
    config: Path, tmp_path: Path, faults: Faults, stage: int, precision: str
) -> None:
    """On two ranks, infinities on one: weights, moments and centers after the step are those before it."""
    words = ("train", config, f"zero.stage={stage}", f"precision={precision}", "checkpoint_every=1")
    folder = tmp_path / "run"
    words = (*words, f"run_dir={folder}", "max_steps=4", "keep_checkpoints=9")
    assert "step 3 was left out" in as_ranks(2, tmp_path, *words, command=poisoned(3, ranks=(1,)))[0].stderr
    weights = [load_file(folder / "checkpoints" / f"step-{k:08d}" / "weights.safetensors") for k in (2, 3, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(value.isfinite().all() for value in weights[2].values())
    assert log(folder)[-1]["skipped/not_finite"] == 1 and log(folder)[1]["skipped/not_finite"] == 0
    faults.injected(f"infinities in a batch, {precision}, stage {stage}")


def test_steps_after_it_are_as_if_it_had_not_been(config: Path, tmp_path: Path, faults: Faults) -> None:
    """Adam's moments hold no infinity: with a constant schedule, the step after is the one that would have been."""
    words = ["train", config, "optimizer.clip_grad=3", "max_steps=4", "checkpoint_every=1", "keep_checkpoints=9"]
    run(*words, f"run_dir={tmp_path / 'run'}", command=poisoned(2))
    states = []
    for step in (1, 2, 4):
        path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        content = torch.load(path, weights_only=False)["optimizer_state_dict"]  # written by this test's own run
        inner = content["base_optimizer_state"].get("state", {})
        states.append([s[m] for s in inner.values() for m in ("exp_avg", "exp_avg_sq")])
    assert states[0] and all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert all(value.isfinite().all() for value in states[2])
    faults.injected("infinities and AdamW's moments")


def test_too_many_end_the_run_with_what_they_were_made_of(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder, steps = tmp_path / "run", tuple(range(3, 100))
    words = ("train", config, f"run_dir={folder}", "epochs=50", "checkpoint_every=1", "max_skipped_steps=2")
    message = run(*words, command=poisoned(*steps), fails=True)
    assert "3 steps in a row" in message.splitlines()[-1] and "diverged-rank-0.json" in message
    report = json.loads((folder / "diverged-rank-0.json").read_text())
    assert report["step"] == 5 and len(report["samples"]) == 8 and len(set(report["samples"])) == 8
    assert set(report["losses"]) >= {"contrastive", "self_distillation"}
    assert any(value != value or value == float("inf") for value in report["gradient_norms"].values())
    assert all(v.isfinite().all() for v in load_file(newest(folder) / "weights.safetensors").values())
    faults.injected("divergence")
    again = run(*words, "max_steps=6")  # the checkpoints are good: it goes on
    assert "resumed at step" in again


def test_rollback_goes_on_from_the_checkpoint_in_another_order(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    words = ("train", config, f"run_dir={folder}", "max_steps=6", "checkpoint_every=2", "max_skipped_steps=0")
    message = run(*words, "on_divergence=rollback", command=poisoned(4))
    assert "going back to the last checkpoint, with the data in another order" in message
    assert "resumed at step 2 of 6" in message
    assert [entry["step"] for entry in log(folder)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "rollbacks.json").read_text()) == [4]
    run("train", config, f"run_dir={tmp_path / 'other'}", "max_steps=6")
    ours, theirs = losses(folder), losses(tmp_path / "other")
    assert ours[:2] == theirs[:2] and all(a != b for a, b in zip(ours[2:], theirs[2:], strict=True))
    faults.injected("divergence with rollback")


def test_rollbacks_are_bounded(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    words = ("train", config, f"run_dir={folder}", "max_steps=6", "checkpoint_every=2", "max_skipped_steps=0")
    run(*words[:3], "max_steps=2")
    (folder / "rollbacks.json").write_text("[4, 4, 4]")
    message = run(*words, "on_divergence=rollback", command=poisoned(4), fails=True)
    assert "after 3 rollbacks" in message.splitlines()[-1]
    faults.injected("divergence with rollback")


def test_the_first_steps_of_fp16_only_lower_the_loss_scale(config: Path, tmp_path: Path, faults: Faults) -> None:
    folder = tmp_path / "run"
    scale = "deepspeed={fp16: {initial_scale_power: 40}}"
    run("train", config, f"run_dir={folder}", "precision=fp16", "max_steps=40", "epochs=20", "log_every=1", scale)
    last = log(folder)[-1]
    assert last["skipped/loss_scaling"] > 5 and last["skipped/not_finite"] == 0
    assert last["precision/loss_scale"] < 2.0**40
    faults.injected("loss scale too large")


def test_collapse_is_said(config: Path, tmp_path: Path, faults: Faults) -> None:
    """Teachers that give everything the same prototype: at a temperature near 0."""
    name = "objectives.self_distillation.teacher_temperature"
    words = ("train", config, f"run_dir={tmp_path / 'run'}", "max_steps=4", f"{name}=1e-5", f"{name}_start=1e-5")
    message = run(*words)
    assert "collapse? self_distillation/teacher_entropy" in message
    assert {"self_distillation/center_norm", "contrastive/feature_std"} <= log(tmp_path / "run")[-1].keys()
    faults.injected("collapse")
