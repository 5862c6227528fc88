"""The order of a run is settled once, and stays when the run goes on elsewhere."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.data import open_loader
from harmony_fast.engine.data.open_loader import cores_of_a_rank, settle_order

HERE = SimpleNamespace(any=lambda value: value, is_main=True)
ANOTHER_IS_SMALLER = SimpleNamespace(any=lambda value: True, is_main=True)


def settings(tiny: dict, beton: Path, folder: Path, **data: object) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return parse_config({**tiny, "run_dir": str(folder), "data": {**tiny["data"], "train": str(beton), **data}}, "tiny")


@pytest.mark.parametrize(("fits", "order"), [(True, "random"), (False, "quasi_random")])
def test_it_goes_by_memory_the_first_time(
    tiny: dict, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, order: str
) -> None:
    config = settings(tiny, beton, tmp_path / "run")
    monkeypatch.setattr(open_loader, "fits_memory", lambda size: fits)
    assert settle_order(config, HERE) == order
    monkeypatch.setattr(open_loader, "fits_memory", lambda size: not fits)
    assert settle_order(config, HERE) == order


def test_the_smallest_machine_decides(tiny: dict, beton: Path, tmp_path: Path) -> None:
    assert settle_order(settings(tiny, beton, tmp_path / "run"), ANOTHER_IS_SMALLER) == "quasi_random"


def test_what_is_asked_for_wins(tiny: dict, beton: Path, tmp_path: Path) -> None:
    assert settle_order(settings(tiny, beton, tmp_path / "run"), ANOTHER_IS_SMALLER) == "quasi_random"
    assert settle_order(settings(tiny, beton, tmp_path / "run", order="random"), HERE) == "random"


def test_cores_are_divided_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [cores_of_a_rank(local) for local in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
