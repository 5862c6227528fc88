"""`harmony-fast plan`: what it names fits, is the fastest that does, and computes the same; bad input is one line."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from commands import call
from harmony_fast.engine.config import RunConfig, parse_config, with_overrides
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.memory import CONTEXT, predict
from harmony_fast.engine.plan import Budget, Plan, Planner
from harmony_fast.engine.rates import rates_for
from harmony_fast.engine.sizes import size_of
from steps import config

MIB = 2**20
PLENTY = Budget(4 * 2**30, 2**30)


@pytest.fixture(scope="module")
def tiny() -> RunConfig:
    """Small communication buckets, so that something can be chosen."""
    raw = config(
        run_dir="none", data__batch_size=16, precision="bf16", model__image__depth=1, model__text__depth=1,
    )  # fmt: skip
    raw["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 2**16}}
    return parse_config(raw, "the test")


@pytest.fixture(scope="module")
def planner(tiny: RunConfig) -> Planner:
    return Planner(tiny, 1, rates_for(PLENTY.device))


@pytest.fixture(scope="module")
def rich(planner: Planner) -> list[Plan]:
    return planner.search(PLENTY)


@pytest.fixture(scope="module")
def poor(planner: Planner, rich: list[Plan]) -> tuple[Budget, list[Plan]]:
    budget = Budget(rich[0].memory.total - 2 * MIB, 2**30)
    return budget, planner.search(budget)


def test_with_plenty_nothing_is_given_up(rich: list[Plan]) -> None:
    assert rich[0].settings["pass"] == "packed" and rich[0].settings["activation_checkpointing.image"] == 0
    assert rich[0].settings["optimizer.states"] == "fp32" and not rich[0].settings["zero.offload_optimizer"]


def test_plans_are_different_and_sorted(rich: list[Plan]) -> None:
    assert len(rich) == 4
    assert len({tuple(plan.overrides) for plan in rich}) == 4
    rates = [plan.samples_per_second for plan in rich]
    assert rates == sorted(rates, reverse=True)


def test_what_is_named_fits_and_costs_time(rich: list[Plan], poor: tuple[Budget, list[Plan]]) -> None:
    budget, plans = poor
    assert all(budget.fits(plan.memory) for plan in plans)
    assert plans[0].samples_per_second <= rich[0].samples_per_second


def test_a_plan_is_what_its_overrides_predict(tiny: RunConfig, poor: tuple[Budget, list[Plan]]) -> None:
    """And the batch stays."""
    for plan in poor[1]:
        chosen = with_overrides(tiny, plan.overrides)
        assert chosen.data.batch_size == tiny.data.batch_size
        assert plan.memory.total == pytest.approx(predict(chosen, 1).total, rel=0.02)


@pytest.mark.parametrize("kept", [1, 3])
def test_many_micro_batches_need_what_is_predicted_of_them(tiny: RunConfig, kept: int) -> None:
    """Also if the configuration has graphs of several kept."""
    tiny = with_overrides(tiny, [f"kept_graphs={kept}"])
    settings = {"data.micro_batch_size": 2, "pass": "packed", "activation_checkpointing.image": 0,
                "activation_checkpointing.text": 0, "zero.stage": 1, "optimizer.states": "fp32",
                "zero.offload_optimizer": False, "zero.offload_parameters": False}  # fmt: skip
    [plan] = Planner(tiny, 1, rates_for(PLENTY.device)).examine(settings)
    exact = predict(with_overrides(tiny, plan.overrides), 1)
    assert plan.memory.total - CONTEXT == pytest.approx(exact.total - CONTEXT, rel=0.03)


def test_more_ranks_hold_less(tiny: RunConfig, rich: list[Plan]) -> None:
    settings = {**rich[0].settings, "zero.stage": 2, "data.micro_batch_size": 1}
    one, two = (Planner(tiny, ranks, rates_for(PLENTY.device)).examine(settings)[0].memory.total for ranks in (1, 2))
    assert two < one


def test_if_nothing_fits_the_budget_that_would_do_is_named(planner: Planner) -> None:
    with pytest.raises(UserError, match="the smallest setting needs") as error:
        planner.search(Budget(100 * MIB, 2**30))
    least = float(str(error.value).split("needs ")[1].split(" GiB")[0])
    assert planner.search(Budget(least * 2**30, 2**30))


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80e9), (".5TiB", 2**39), ("512mib", 2**29)]
)
def test_sizes(text: str, size: float) -> None:
    assert size_of(text, "--memory") == size


@pytest.mark.parametrize("text", ["24", "GiB", "24 parsecs", "-3GiB", "0GiB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--memory"):
        size_of(text, "--memory")


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    """Of a plan that is killed while others work for it."""
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(config(model__image__depth=12, model__text__depth=12)))
    words = [sys.executable, "-m", "harmony_fast.engine.cli", "plan", str(path)]
    process = subprocess.Popen(words, env={**os.environ, "HARMONY_FAST_TEST": str(tmp_path)})
    try:
        wait_for(lambda: len(started_for(tmp_path)) > 3)  # more than itself, a fork server and a resource tracker
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not started_for(tmp_path))


def started_for(folder: Path) -> list[str]:
    """Processes with this test's mark in their environment."""
    mark, found = f"HARMONY_FAST_TEST={folder}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found += [path.parent.name] if mark in path.read_bytes() else []
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config(objectives={"contrastive": {"embed_dim": 16}})))
    result = call("plan", path, "--memory", "4GiB", "--json", "--picture", tmp_path / "plan.png")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    best = found["plans"][0]
    assert best["total"] == pytest.approx(sum(best["held"].values()) + sum(best["step"].values()))
    assert found["budget"] == 4 * 2**30 and "data.micro_batch_size" in best["settings"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    many = call("plan", path, "--gpus", 16)
    assert many.returncode == 1 and many.stderr == "error: data.batch_size 8 cannot be divided among 16 ranks\n"
