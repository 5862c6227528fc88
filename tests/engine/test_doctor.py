"""What the doctor says of this machine, of broken packages, of wrong kernels and of wishes that cannot be granted."""

import json
from pathlib import Path

import pytest
import torch
from commands import call
from harmony_fast.engine import doctor, doctor_kernels
from harmony_fast.engine.backends import use_backends
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.errors import UserError
from harmony_fast.kernels import dispatch


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HARMONY_FAST_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_preferred", {})


def test_json_and_status_of_the_command() -> None:
    done = call("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["torch"] == states["deepspeed"] == states["ffcv"] == "ok"
    cpu = {check["operation"]: check for check in report["kernels"] if check["device"] == "cpu"}
    assert set(cpu) == set(dispatch.OPERATIONS)
    for check in cpu.values():
        assert check["problem"] is None and check["error"] < 1e-4
        assert (check["backend"], check["reason"]) == ("torch", "the tensors are on the CPU")


def test_printed_lines_stay_whole_in_a_pipe(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    assert doctor.run(as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("  ok      ema")]
    assert "torch, because the tensors are on the CPU; relative error" in line
    assert not any("\033" in line for line in lines)


def test_kernels_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_kernels, "masked_attention", lambda q, k, v, *_, **__: q * k * v)
    monkeypatch.setattr(doctor_kernels, "ema_update_", lambda ema, source, momentum, copy: ema.lerp_(source, 0.011))
    monkeypatch.setattr(doctor_kernels, "prototype_cross_entropy", lambda s, w, *_, **__: s.sum() / 0)
    found = {check.operation: check for check in doctor_kernels.check_kernels()}
    assert "relative error" in found["attention"].problem and found["contrastive"].problem is None
    assert found["ema"].problem and found["prototype_ce"].problem


def test_wishes_that_cannot_be_granted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    monkeypatch.setenv("HARMONY_FAST_KERNELS", "triton")
    assert doctor.run(as_json=True) == 1
    (broken,) = [f for f in json.loads(capsys.readouterr().out)["findings"] if f["state"] == "broken"]
    assert "HARMONY_FAST_KERNELS asks for triton, but the tensors are on the CPU" in broken["detail"]


def test_gpus_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody else has to himself; and those that the driver lists but torch cannot use."""

    def refuse(_: int) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {check.device for check in doctor_kernels.check_kernels()} == {"cpu"}
    assert [finding.state for finding in doctor._gpus()] == ["missing"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert {check.device for check in doctor_kernels.check_kernels()} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    (found,) = doctor._gpus()
    assert (found.name, found.state) == ("cuda:0", "broken") and "busy or unavailable" in found.detail


def test_packages_that_are_missing_old_or_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from packaging.specifiers import SpecifierSet

    assert doctor._package("no-such-package-here", SpecifierSet(">=1"), []).detail == "not installed"
    old = doctor._package("numpy", SpecifierSet("<1"), ["numpy"])
    assert old.state == "broken" and "wanted is <1" in old.detail and old.cure == "pip install 'numpy<1'"
    (tmp_path / "a_broken_module.py").write_text("raise OSError('libnothing.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor._package("numpy", None, ["a_broken_module"])
    assert broken.state == "broken" and "OSError: libnothing.so" in broken.detail


def test_configuration_says_which_backends(tiny: dict) -> None:
    config = parse_config({**tiny, "precision": "fp32", "kernels": {"ema": "torch"}}, "test")
    chosen = use_backends(config, torch.device("cpu"))
    assert chosen["ema"] == ("torch", "kernels.ema asks for it")
    assert chosen["attention"].reason == "the tensors are on the CPU"
    with pytest.raises(
        UserError, match=r"attention: kernels\.attention asks for triton, but the tensors are on the CPU"
    ):
        asked = {**tiny, "precision": "fp32", "kernels": {"attention": "triton"}}
        use_backends(parse_config(asked, "test"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"kernels\.ema"):
        parse_config({**tiny, "kernels": {"ema": "xformers"}}, "test")
