"""The benchmark of a training step: it runs as a command, and what it counts and compares is right."""

import argparse
import json
import os
import signal
import sys
from functools import cache
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from harmony_fast.bench import step, tables
from harmony_fast.bench.baseline import unwatched
from harmony_fast.bench.counts import imagined_views
from harmony_fast.bench.profiling import gaps
from harmony_fast.bench.step import (
    LARGEST_DIFFERENCE,
    OURS,
    VARIANTS,
    Contender,
    added_to,
    compared,
    configured,
    contenders,
    cut_to,
    measure_all,
    same_case,
    time_beside,
    tokens_a_sample,
)
from harmony_fast.bench.step_rivals import PARTS, count_open_clip, made_samples
from harmony_fast.bench.timing import Stopwatch, Timing, in_turns
from harmony_fast.engine.config import RunConfig, parse_config, with_overrides
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.memory import predict
from tiny import tiny_config

TINY = [
    "model.image={width: 32, depth: 2, heads: 2, patch_size: 16}", "model.text.width=32", "model.text.depth=1",
    "model.text.heads=2", "model.text.vocabulary=100", "views.global_size=32", "views.local_size=16",
    "views.local_crops=2", "objectives.contrastive.embed_dim=16",
]  # fmt: skip
HEADS = [
    "objectives.self_distillation={prototypes: 32, hidden: 32, bottleneck: 16}",
    "objectives.text_distillation={prototypes: 32, hidden: 32, bottleneck: 16}",
    "objectives.reconstruction={width: 16, depth: 1, heads: 2}", "objectives.masked_language.depth=1",
]  # fmt: skip

OPTIONS = argparse.Namespace(profile=False, rounds=2, seconds=1.0)


def run(command: list[str]) -> str:
    done = call(command=command, timeout=880, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["step", "clip"])
def test_the_command_writes_json_and_plot(kind: str, tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed keeps state in its."""
    command = [
        sys.executable, "-m", "harmony_fast.bench.step", "--only", kind, "--tower", "ViT-Ti/16", "--micro", "2",
        "--precision", "fp32", "--rounds", "3", "--out", str(tmp_path), "--set", *TINY,
        *(HEADS if kind == "step" else ["views.local_crops=0"]),
    ]  # fmt: skip
    done = run(command)
    assert "samples/s" in done and "student forward" in done
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "step.json").read_text())
    (case,) = report["cases"]
    assert f"{case['results'][OURS]['samples_per_second']:.3f} (" in tables.step(report)
    rival = "four passes" if kind == "step" else "open_clip"
    assert list(case["results"]) == [OURS, rival]
    for result in case["results"].values():
        assert result["samples_per_second"] > 0 and result["mfu"] > 0
        assert result["peak_mib"] > result["held_mib"] > 0
        assert {"data", "student forward", "backward", "optimizer"} <= {p for p in PARTS if result["breakdown_ms"][p]}
    assert case["reference"] == rival and "speedup" not in case["results"][rival]
    speeds = [case["results"][name]["samples_per_second"] for name in (OURS, rival)]
    assert case["results"][OURS]["speedup"] == pytest.approx(speeds[0] / speeds[1])
    if kind == "step":
        assert case["right"] and case["loss_difference"][rival] < 1e-4
        assert case["micro_batch"] == 1
        assert case["results"][OURS]["flops_per_sample"] < case["results"][rival]["flops_per_sample"]


@pytest.mark.timeout(900)
def test_predicted_peaks_are_those_of_steps(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "harmony_fast.bench.memory", "--only", "packed", "split", "--tower", "ViT-Ti/16",
        "--micro", "8", "--out", str(tmp_path), "--set", *TINY, *HEADS,
    ]  # fmt: skip
    assert "predicted" in run(command)
    cases = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert [case["setting"] for case in cases] == ["packed", "split"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    for case in cases:
        assert case["measured"] > 0 and abs(case["error"]) <= 0.05


@pytest.mark.parametrize("beside", [True, False])
def test_rivals_take_turns_in_pairs(monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    """Each with the first, while no third one runs, without those that run out of memory, be it that the system ends
    them; in a new process for every step where two do not fit."""
    config = parse_config(tiny_config(), "the test")
    makes = {OURS: Quick, "full": Full, "quick": Quick, "killed": Killed, "other": Quick}
    everyone = {name: Contender(make, config, 1) for name, make in makes.items()}
    groups: list[list[str]] = []

    def recorded(turns: dict[str, Any], **options: Any) -> dict[str, Timing]:
        groups.append([*turns])
        assert len(active_children()) == (2 if beside else 0)
        return in_turns(turns, **options)

    monkeypatch.setattr(step, "in_turns", recorded)
    monkeypatch.setattr(step, "memory", lambda: 2**50 if beside else 2**20)
    found = measure_all(everyone, OPTIONS)
    assert groups == [[OURS, "quick"], [OURS, "other"]]
    assert [*found] == [OURS, "quick", "other"]
    for result in found.values():
        assert result["milliseconds"] > 0 and result["beside"] == beside and result["resident_mib"] > 50


def test_rivals_that_run_out_of_memory() -> None:
    """Beside another or alone; what is wrong otherwise is not passed over."""
    config = parse_config(tiny_config(), "the test")
    assert time_beside({OURS: Contender(Quick, config, 1), "full": Contender(Full, config, 1)}, OPTIONS) is None
    found = measure_all({"full": Contender(Full, config, 1), OURS: Contender(Quick, config, 1)}, OPTIONS)
    assert [*found] == [OURS] and found[OURS]["milliseconds"] > 0
    with pytest.raises(RuntimeError, match="exit status 3"):
        measure_all({"it": Contender(Leaves, config, 1)}, OPTIONS)
    assert measure_all({"it": Contender(Full, config, 1)}, OPTIONS) == {}


class Quick:
    """A rival without a model."""

    watch = staticmethod(unwatched)

    def __init__(self, *_: object) -> None:
        pass

    def step(self) -> dict[str, torch.Tensor]:
        return {"contrastive": torch.ones(())}


class Full(Quick):
    def step(self) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("no more")


class Killed(Quick):
    def step(self) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Leaves(Quick):
    def step(self) -> dict[str, torch.Tensor]:
        os._exit(3)


def test_micro_batches_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest, with as many graphs kept as there is room for."""
    others = [f"objectives.{name}=null" for name in ("masked_language", "text_distillation")]
    config = configured("step", "ViT-Ti/16", 4, "fp32", [*TINY, HEADS[0], HEADS[2], *others])

    known = cache(lambda micro, kept: predict(cut(micro, kept), 1, "cpu"))  # each prediction takes a while
    monkeypatch.setattr(step, "predict", lambda c, *_: known(c.data.micro_batch_size, c.kept_graphs))

    def cut(micro: int, kept: int) -> RunConfig:
        return with_overrides(config, [f"data.micro_batch_size={micro}", f"kept_graphs={kept}"])

    def peak(micro: int, kept: int) -> float:
        return known(micro, kept).total

    assert peak(1, 1) < peak(2, 1) < peak(2, 2) < peak(4, 1)
    for limit, micro, kept in ((1e15, 4, 1), (peak(2, 2), 2, 2), (peak(2, 1), 2, 1), (0.0, 1, 1)):
        found = cut_to(limit, config)
        assert (found.data.micro_batch_size, found.kept_graphs) == (micro, kept)


@pytest.mark.parametrize("kind", ["step", "clip"])
def test_variants_are_ours_in_other_ways(kind: str) -> None:
    """On the same samples, with the operations of one pass."""
    config = configured(kind, "ViT-Ti/16", 8, "fp32", [*TINY, *(HEADS if kind == "step" else [])])
    everyone = contenders(kind, config, imagined_views(config), torch.device("cpu"), list(VARIANTS))
    ours = {name: c for name, c in everyone.items() if name.startswith(OURS)}
    assert list(ours) == [OURS, *(f"{OURS}, {name}" for name in VARIANTS)]
    assert len({c.flops for c in ours.values()}) == 1
    assert len({str(c.config) for c in ours.values()}) == len(ours)
    assert [ours[f"{OURS}, {name}"].config.data.micro_batch_size for name in ("one pass", "micro-batches")] == [8, 2]


def test_losses_that_differ_are_no_success() -> None:
    def result(loss: float) -> dict[str, Any]:
        return {"losses": {"contrastive": loss}, "samples_per_second": 2.0, "peak_mib": 1.0}

    for factor, right in ((1 + LARGEST_DIFFERENCE["fp32"] / 2, True), (1.01, False), (float("nan"), False)):
        results = {OURS: result(factor), "four passes": result(1.0)}
        assert compared("step", "fp32", torch.device("cpu"), results)["right"] == right


def test_cases_are_added_to_those_of_the_same_machine_alone() -> None:
    machine = {"date": "2026-01-02", "cores": 2, "commit": "b", "system": "Linux-2"}
    now = {"machine": machine, "device": "cpu", "cases": []}
    before = {"machine": {**machine, "commit": "a", "system": "Linux-1"}, "device": "cpu", "cases": ["measured"]}
    assert added_to(before, now) is before
    with pytest.raises(UserError, match="differs in cores"):
        added_to({**before, "machine": {**before["machine"], "cores": 4}}, now)
    with pytest.raises(UserError, match="differs in device"):
        added_to({**before, "device": "cuda"}, now)


def test_a_case_that_is_measured_again_is_the_same() -> None:
    case = {"kind": "step", "tower": "ViT-S/16", "micro": 8, "precision": "fp32", "commit": "a"}
    assert same_case(case, {**case, "commit": "b"})
    assert not any(same_case(case, {**case, key: other}) for key, other in (("kind", "clip"), ("micro", 16)))


def test_captions_are_as_long_as_cc3ms() -> None:
    raw = tiny_config()
    raw["data"]["batch_size"], raw["model"]["text"]["context"] = 4000, 77
    batch = made_samples(parse_config(raw, "the test"))
    lengths = batch.tokens.argmax(-1) + 1
    assert float(lengths.float().mean()) == pytest.approx(10.3 * 1.3 + 2, rel=0.03)
    assert float(lengths.float().std()) == pytest.approx(4.5 * 1.3, rel=0.1)
    padded = torch.arange(77) >= lengths[:, None]
    assert not batch.tokens[padded].any() and (batch.tokens[~padded] > 0).all()


def test_tokens_of_a_packed_pass() -> None:
    assert tokens_a_sample(configured("step", "ViT-S/16", 8, "fp32", [])) == 987  # DESIGN: 2 x 197, 8 x 37, 197, 2 x 50
    assert tokens_a_sample(configured("clip", "ViT-S/16", 8, "fp32", [])) == 197


def test_open_clips_operations() -> None:
    """Those of its towers by hand: 12 products of width squared a block and token, two of attention a pair."""
    config = configured("clip", "ViT-S/16", 2, "fp32", [])
    image = 12 * (12 * 384**2 * 197 + 2 * 384 * 197**2) + 196 * 768 * 384 + 384 * 512
    text = 12 * (12 * 512**2 * 77 + 2 * 512 * 77**2) + 512 * 512
    assert count_open_clip(config) == pytest.approx(3 * 2 * 2 * (image + text), rel=0.02)


def test_parts_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("harmony_fast.bench.timing.time.perf_counter", lambda: float(next(now)))
    watch = Stopwatch(torch.device("cpu"))
    with watch("forward"), watch("teacher"):
        pass
    assert watch.seconds == {"forward": 2.0, "teacher": 1.0}


def test_gaps_between_kernels() -> None:
    assert gaps([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 8.0), (10.0, 11.0)]) == 2.0 + 2.0
    assert gaps([]) == 0.0
