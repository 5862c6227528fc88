"""Comparisons: what is wrong, unwritten or failing is found before anything is timed; the command works on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harmony_fast.bench import comparison as comparing
from harmony_fast.bench import contrastive, kernels, machine, masked_attention, names, prototype_ce, run, tables, timing
from harmony_fast.bench.comparison import OURS, Comparison, compare
from torch import Tensor

CPU = torch.device("cpu")


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (2 * x,)


def never_written(x: Tensor) -> tuple[Tensor, ...]:
    out = torch.empty_like(x)
    out[1:] = 2 * x[1:]
    return (out,)


def failing(x: Tensor) -> tuple[Tensor, ...]:
    raise RuntimeError("needs\n  another machine")


def make(**rivals: object) -> Comparison:
    return Comparison(
        "doubling", "100 numbers", lambda: (torch.randn(100),), {OURS: double, **rivals},
        lambda x: (2 * x.double(),), 1e-6, unavailable={"absent": "not installed"},
    )  # fmt: skip


def test_rivals_that_are_wrong_or_fail_are_named_and_not_timed() -> None:
    result = compare(make(triple=lambda x: (3 * x,), failing=failing, add=lambda x: (x + x,)), CPU, seed=1, seconds=0.1)
    assert set(result["results"]) == {OURS, "add"}
    assert result["right"] and result["repeatable"] and result["speedup"] > 0
    assert result["not_run"]["absent"] == "not installed"
    assert result["not_run"]["failing"] == "RuntimeError: needs another machine"
    assert result["not_run"]["triple"].startswith("wrong: relative error 5.00e-01")
    low, high = result["results"]["add"]["quartiles"]
    assert 0 < low <= result["results"]["add"]["milliseconds"] <= high


@pytest.mark.parametrize(
    "wrong", [never_written, lambda x: (2.001 * x,), lambda x: (2 * x,) * 2, lambda x: (torch.full_like(x, torch.nan),)]
)
def test_ours_must_be_right_everywhere(wrong: object) -> None:
    result = compare(make(**{OURS: wrong, "add": lambda x: (x + x,)}), CPU, seed=1, seconds=0.1)
    assert not result["right"] and result["speedup"] is None and OURS in result["not_run"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_nobody_is_right_where_the_reference_runs_out_of_memory() -> None:
    def too_large(x: Tensor) -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError

    case = make(add=lambda x: (x + x,))
    case.reference = too_large
    result = compare(case, CPU, seed=1, seconds=0.1)
    assert not result["right"] and not result["results"] and result["speedup"] is None
    assert result["not_run"] == {
        "absent": "not installed", OURS: "reference: out of memory", "add": "reference: out of memory"
    }  # fmt: skip
    report = {"comparisons": [result], "machine": {"processor": "some", "memory_gib": 1, "date": "today"}}
    assert "| doubling | 100 numbers | not checked |  |" in tables.kernels(report)


def test_results_that_differ_from_run_to_run_are_noticed() -> None:
    calls = iter(range(1000))
    result = compare(make(**{OURS: lambda x: (2 * x * (1 + 1e-7 * (next(calls) % 7)),)}), CPU, seed=1, seconds=0.1)
    assert result["right"] and not result["repeatable"]


def test_rounds_alternate_and_short_calls_are_repeated() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = timing.alternate({n: lambda n=n: work(n, 0.01) for n in "ab"}, CPU, rounds=4)
    assert "".join(calls[-8:]) == "abbaabba" and found["a"].samples == 4
    assert found["a"].median > 9
    calls.clear()
    found = timing.alternate({"short": lambda: work("short", 1e-5)}, CPU, rounds=3)
    assert len(calls) > 30 and found["short"].median < 5


def test_peak_memory_counts_what_is_taken_and_not_what_was() -> None:
    if timing.peak_memory(lambda: None, CPU) is None:
        pytest.skip("this system does not tell")
    hold = torch.zeros(2**24)
    peak = timing.peak_memory(lambda: (torch.zeros(2**23) + 1).sum(), CPU)
    assert 60 < peak < 80 and hold.sum() == 0


@pytest.mark.parametrize("module", [masked_attention, contrastive, prototype_ce])
def test_every_rival_computes_the_same(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "alternate", lambda work, device, seconds: {})
    for case in module.comparisons(CPU)[:2]:
        result = compare(case, CPU, seed=3, seconds=0)
        assert not result["not_run"], result["not_run"]


def test_the_command_writes_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("kernels", ["--only", "ema", "--seconds", "0.1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "harmony-fast" in printed and "foreach lerp + copy" in printed
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert report["machine"]["versions"]["torch"] == torch.__version__ and report["device"] == "cpu"
    for result in report["comparisons"]:
        assert result["right"] and result["repeatable"]
        assert all(r["gigabytes_per_second"] > 0 for r in result["results"].values())


def test_no_comparison_starts_after_the_limit(tmp_path: Path) -> None:
    assert kernels.main(["--limit", "-1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "kernels.png").exists()


def test_benchmarks_are_found_by_name(capsys: pytest.CaptureFixture) -> None:
    assert {"aot", "kernels"} <= set(names())
    assert run("kernel", []) == 2
    assert "no benchmark is called 'kernel'" in capsys.readouterr().err


def test_the_machine_is_described() -> None:
    described = machine.describe_machine()
    assert described["cores"] >= 1 and described["memory_gib"] > 0 and described["processor"]
    assert machine.results_folder().parent.name == "results"
    command = [sys.executable, "-m", "harmony_fast.bench.kernels", "--only", "nothing"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 2
