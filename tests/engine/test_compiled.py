"""`compile: true` changes the speed alone: the same numbers, no graph broken, nothing compiled in later steps."""

from pathlib import Path
from typing import Any

import pytest
from harmony_fast.engine.build import build_model
from harmony_fast.engine.config import parse_config
from steps import assert_same, config, run

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stochastic depth": ("eager", {"model__image__drop_path": 0.5, "data__micro_batch_size": 4}),
    "plain crops from masked ones": ("eager", {
        "model__image__drop_path": 0.0,
        "objectives": {name: config()["objectives"][name] for name in ("contrastive", "self_distillation")},
    }),
    "image packs of one size": ("eager", {
        "model__image__drop_path": 0.0, "activation_checkpointing": {"image": 2, "text": 0},
        "objectives": {"contrastive": {"embed_dim": 16}},
    }),
    "as a run does": ("inductor", {
        "model__image__drop_path": 0.0, "model__image__depth": 1, "objectives": {"contrastive": {"embed_dim": 16}},
    }),
}  # fmt: skip
"""Torch's backend, and the settings. The graphs are the same for all; inductor, which a run takes, makes dozens of
libraries of the smallest model's, each with a run of g++"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_compiled_blocks_train_the_same(tmp_path: Path, case: str) -> None:
    """To rounding, which fusion changes. Steps differ in the lengths of captions, and in the sequences kept."""
    backend, over = CASES[case]
    settings = {name: (config(compile=name == "compiled", **over), 4, False) for name in ("eager", "compiled")}
    found = run(tmp_path, 1, settings, COMPILED_BY=backend)
    assert_same(found["eager"], found["compiled"], rtol=1e-4)
    assert found["eager"]["programs"] == [0] * 4
    programs = found["compiled"]["programs"]
    assert programs[0] > 0 and programs[1:] == programs[:1] * 3
    assert found["compiled"]["graph_breaks"] == 0


def test_parameters_keep_their_names() -> None:
    names = [list(build_model(parse_config(config(compile=c), "the test")).state_dict()) for c in (False, True)]
    assert names[0] == names[1]
