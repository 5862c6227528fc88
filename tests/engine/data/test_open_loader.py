"""The order of a run is settled once, and stays when the run goes on elsewhere."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harmony_fast.engine.config import RunConfig, parse_config
from harmony_fast.engine.data import open_loader
from harmony_fast.engine.data.open_loader import cores_of_a_rank, settle_order
from harmony_fast.engine.errors import DataError

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


@pytest.mark.parametrize("streamed", [False, True])
def test_captions_must_fit_the_models_vocabulary(
    tiny: dict, beton: Path, tar: Callable, pairs: Callable, tmp_path: Path, streamed: bool
) -> None:
    source = ("webdataset", tar("a.tar", pairs(8))) if streamed else ("ffcv", beton)
    config = settings(tiny, source[1], tmp_path / "run", loader=source[0])
    config.model.text.vocabulary = 49406
    ranks = SimpleNamespace(**vars(HERE), device=torch.device("cpu"), local_size=1, rank=0, world_size=1)
    with open_loader.open_loader(config, ranks) as loader, pytest.raises(DataError, match="text tower knows 49406"):
        next(loader.epoch(0))


def test_cores_are_divided_among_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [cores_of_a_rank(local) for local in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
