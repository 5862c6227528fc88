"""Every layout of the engine trains, and the layouts that promise the same mathematics keep the promise."""

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from harmony_fast.engine.build import build_model
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.errors import UserError
from harmony_fast.engine.scaling import Sizes, held_bytes, messages
from harmony_fast.engine.zero import deepspeed_config
from steps import Settings, assert_same, config, run

pytestmark = pytest.mark.timeout(1200)  # the first test trains all the layouts
STEPS = 3
"""Of two epochs: the last layers of heads are fixed in the first"""
LAYOUTS: dict[str, dict[str, Any]] = {
    "stage0": {"zero__stage": 0},
    "stage1": {"zero__stage": 1},
    "stage2": {"zero__stage": 2},
    "stage3": {"zero__stage": 3},
    "split": {"pass": "split"},
    "micro": {"data__micro_batch_size": 2},
    "micro1": {"data__micro_batch_size": 1, "zero__stage": 2, "kept_graphs": 2},
    "kept_recomputed1": {"kept_graphs": 9, "data__micro_batch_size": 2,
                         "activation_checkpointing": {"image": 1, "text": 1}, "zero__stage": 1},
    "split_micro3": {"pass": "split", "data__micro_batch_size": 2, "zero__stage": 3},
    "recompute": {"activation_checkpointing": {"image": 1, "text": 2}},
    "recompute3": {"activation_checkpointing": {"image": 2, "text": 1}, "zero__stage": 3},
    "offload_micro": {"zero__stage": 2, "zero__offload_optimizer": True, "data__micro_batch_size": 2},
    "offload_split1": {"zero__stage": 1, "zero__offload_optimizer": True, "pass": "split"},
    "offload_all3": {"zero__stage": 3, "zero__offload_optimizer": True, "zero__offload_parameters": True},
}  # fmt: skip
"""Those that must compute the same as one rank with one batch in one pass"""

NEVER_KEPT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
LAYOUTS["gather3"] = {"zero__stage": 3, "deepspeed": {"zero_optimization": NEVER_KEPT}}
"""Parameters are gathered for each use, which the formula counts; by default small ones stay"""
LAYOUTS["kept3"] = {**LAYOUTS["gather3"], "data__micro_batch_size": 2, "kept_graphs": 2}
ON_ONE = [name for name in LAYOUTS if name not in ("micro1", "kept3", "split_micro3", "recompute3", "offload_all3")]
"""Layouts that are tried on one rank as well as on two"""

CLIPPED: dict[str, dict[str, Any]] = {
    f"clipped{stage}": {"zero__stage": stage, "optimizer__clip": "parameter", "optimizer__clip_grad": 0.1,
                        "optimizer__clip_only": ["student.image.", "student.heads.self_distillation."]}
    for stage in (0, 1, 2)
}  # fmt: skip
"""The same with clipping parameter by parameter"""


def drawn(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model with objectives and data sizes at random, and a layout at random that must compute the same."""
    draw = random.Random(seed)
    everything = config()["objectives"]
    names = draw.sample(sorted(everything), draw.randint(1, 5))
    heads = draw.choice((1, 2, 3))
    model = {
        "objectives": {name: everything[name] for name in names}, "seed": seed,
        "model__image__width": 16 * heads, "model__image__heads": heads, "model__image__depth": draw.randint(1, 3),
        "model__image__drop_path": draw.choice((0.0, 0.3)), "model__text__context": draw.randint(8, 20),
        "views__local_crops": draw.randint(0, 3), "data__batch_size": draw.choice((4, 8, 12)),
        "optimizer__clip_grad": draw.choice((0.0, 0.5, 3.0)),
    }  # fmt: skip
    stage = draw.choice((0, 1, 2, 3))
    layout = {
        "zero__stage": stage, "zero__offload_optimizer": bool(stage) and draw.random() < 0.3,
        "data__micro_batch_size": draw.choice((None, 1, 2)), "pass": draw.choice(("packed", "split")),
        "activation_checkpointing": {"image": draw.randint(0, 3), "text": draw.randint(0, 2)},
        "kept_graphs": draw.randint(0, 3),
    }  # fmt: skip
    return model, layout


DRAWN = {f"drawn{seed}": drawn(seed) for seed in range(8)}
PLAIN = {f"{name}-plain": model for name, (model, _) in DRAWN.items()}
LAID_OUT = {name: {**model, **layout} for name, (model, layout) in DRAWN.items()}


SOME = ("contrastive", "self_distillation", "masked_language")
SMALLER = {"model__image__depth": 1, "model__text__depth": 1, "data__batch_size": 4,
           "objectives": {name: config()["objectives"][name] for name in SOME}}  # fmt: skip


def combinations() -> dict[str, dict[str, Any]]:
    """Every allowed combination of stage, offload and optimizer states, with everything else on top.

    But in stage 3, where each pass gathers all parameters: LAYOUTS has everything else there.
    """
    found = {}
    more = {"pass": "split", "data__micro_batch_size": 1, "activation_checkpointing": {"image": 1, "text": 1}}
    for stage, host, parameters, states in product((0, 1, 2, 3), (False, True), (False, True), ("fp32", "8bit")):
        chosen = {"zero__stage": stage, "zero__offload_optimizer": host, "zero__offload_parameters": parameters,
                  "optimizer__states": states, "precision": "bf16",
                  **({} if stage == 3 else more)}  # fmt: skip
        try:
            config(**SMALLER, **chosen)
        except UserError:
            continue
        name = f"stage{stage}-{states}{'-host' if host else ''}{'-parameters' if parameters else ''}"
        found[name] = {**SMALLER, **chosen}
    fp16 = {**SMALLER, "precision": "fp16", "deepspeed": {"fp16": {"initial_scale_power": 4}}}
    return {
        **found, "stage1-fp16": {**fp16, **more, "zero__stage": 1},
        "stage3-fp16": {**fp16, "zero__stage": 3},
    }  # fmt: skip


def settings_of(layouts: dict[str, dict[str, Any]], steps: int) -> Settings:
    return {name: (config(run_dir="none", **layout), steps, False) for name, layout in layouts.items()}


RESUMED = {1: {"stage0": (0, 0), "1to3": (1, 3), "3to0": (3, 0)},
           2: {"stage2": (2, 2), "stage3": (3, 3), "0to2": (0, 2), "fp16": (1, 2)}}  # fmt: skip
"""Runs that stop after two of three steps and go on with another number of ranks.

By the ranks before, of one and two: name, ZeRO stage before and after
"""


def interrupted(folder: Path, ranks: int, steps: int, save: bool) -> Settings:
    """The runs of RESUMED in folders of their own."""
    settings: Settings = {}
    for name, stages in RESUMED[ranks].items():
        over = {"run_dir": str(folder / name), "zero__stage": stages[0 if save else 1]}
        if name == "fp16":
            over |= {"precision": "fp16", **({"deepspeed": {"fp16": {"initial_scale_power": 4}}} if save else {})}
        settings[f"{'begun' if save else 'resumed'}-{name}"] = (config(**over), steps, save)
    return settings


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "again", "begun-by-one", "begun-by-two")}


@pytest.fixture(scope="module")
def one_rank(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    begun, layouts = interrupted(folders["begun-by-one"], 1, 2, True), {name: LAYOUTS[name] for name in ON_ONE}
    small = settings_of({"smaller": SMALLER}, 2) | settings_of({"smaller at the start": SMALLER}, 0)
    return run(folders["one"], 1, settings_of({**layouts, **CLIPPED, **PLAIN}, STEPS) | small | begun)


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, Path], one_rank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    everything = settings_of({**LAYOUTS, **CLIPPED, **LAID_OUT}, STEPS) | settings_of(combinations(), 2)
    begun = interrupted(folders["begun-by-two"], 2, 2, True)
    return run(folders["two"], 2, everything | begun | interrupted(folders["begun-by-one"], 1, STEPS, False))


@pytest.fixture(scope="module")
def one_rank_resumed(folders: dict[str, Path], two_ranks: dict[str, Any]) -> dict[str, Any]:
    return run(folders["again"], 1, interrupted(folders["begun-by-two"], 2, STEPS, False))


PAIRS = [(ranks, name) for ranks, names in RESUMED.items() for name in names if name != "fp16"]


@pytest.mark.parametrize(("before", "name"), PAIRS)
def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], one_rank_resumed: dict[str, Any], before: int, name: str
) -> None:
    undisturbed = {**one_rank["stage1"], "losses": one_rank["stage1"]["losses"][2:]}
    assert_same(undisturbed, {1: two_ranks, 2: one_rank_resumed}[before][f"resumed-{name}"])


def test_fp16_goes_on_with_its_loss_scale(two_ranks: dict[str, Any], one_rank_resumed: dict[str, Any]) -> None:
    assert two_ranks["begun-fp16"]["loss_scale"] == one_rank_resumed["resumed-fp16"]["loss_scale"] == 2**4


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_mathematics_whatever_the_layout(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
) -> None:
    assert_same(one_rank["stage0"], two_ranks[name])
    if name in ON_ONE:
        assert_same(one_rank["stage0"], one_rank[name])


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_mathematics_of_models_and_layouts_at_random(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
) -> None:
    """Some are not clipped: biases that begin at 0 then carry the rounding of gradients that cancel."""
    assert_same(one_rank[f"{name}-plain"], two_ranks[name], each=5e-5)


@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_by_parameter_is_the_same_in_every_stage(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
) -> None:
    assert_same(one_rank["clipped0"], one_rank[name])
    assert_same(one_rank["clipped0"], two_ranks[name])
    assert one_rank["clipped0"]["losses"] != one_rank["stage0"]["losses"]


@pytest.mark.parametrize("name", combinations())
def test_every_allowed_combination_trains(one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str) -> None:
    """In half precision or with 8-bit states: losses, and where the weights go, are about those of fp32."""
    found, plain, start = two_ranks[name], one_rank["smaller"], one_rank["smaller at the start"]["weights"]
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(plain["losses"]), rtol=0.02, atol=0)
    went, expected = (torch.cat([(r["weights"][n] - start[n]).flatten() for n in start]) for r in (found, plain))
    assert torch.cosine_similarity(went, expected, 0) > 0.9


def test_half_of_the_memory_on_each_of_two_ranks(one_rank: dict[str, Any], two_ranks: dict[str, Any]) -> None:
    """Counted bytes of fp32 weights and EMA; a few more for padding."""
    for stage in (1, 2, 3):
        whole, half = one_rank[f"stage{stage}"]["bytes"], two_ranks[f"stage{stage}"]["bytes"]
        for part in ("masters", "ema"):
            assert whole[part] / 2 <= half[part] <= whole[part] / 2 + 1024
    assert two_ranks["stage0"]["bytes"] == one_rank["stage0"]["bytes"]


@pytest.mark.parametrize(("name", "stage"), [("stage0", 0), ("stage1", 1), ("stage2", 2), ("gather3", 3)])
def test_bytes_are_those_of_the_formulas(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str, stage: int
) -> None:
    """Memory to a few bytes of padding, messages to the losses' and the passes' small change."""
    weights = one_rank[name]["weights"]
    model = build_model(parse_config(config(), "the test"))
    sizes = Sizes(
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.teacher.parameters()),
    )
    assert sum(w.numel() for n, w in weights.items()) >= sizes.trained + sizes.twins
    for ranks, found in ((1, one_rank[name]["bytes"]), (2, two_ranks[name]["bytes"])):
        held = held_bytes(sizes, stage, ranks, element=4)
        assert found["ema"] == pytest.approx(held["ema"], abs=1024)
        assert found["masters"] == pytest.approx(held["masters"] or 4 * sizes.trained, abs=1024)
    counted, expected = two_ranks[name]["messages"], messages(sizes, stage, element=4)
    for kind, count in expected.items():
        slack = 0.1 * count if (stage, kind) == (3, "all_gather") else 4096
        key = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}.get(kind, kind)
        assert count <= counted.get(key, 0) <= count + slack, (kind, count, counted)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"zero__stage": 0, "zero__offload_optimizer": True}, "offload_optimizer needs zero.stage"),
        ({"zero__stage": 2, "zero__offload_parameters": True}, "offload_parameters needs zero.stage 3"),
        ({"zero__offload_optimizer": True, "optimizer__states": "8bit"}, "no host version"),
        ({"zero__stage": 3, "optimizer__clip": "parameter"}, "stage 3 gives no access"),
        ({"zero__offload_optimizer": True, "optimizer__clip": "parameter"}, "cannot be used with"),
        ({"zero__stage": 0, "precision": "fp16"}, "loss scaling"),
        ({"zero__stage": 3, "compile": True}, "compile needs zero.stage"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed.zero_optimization must be keys and values"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_the_reason(over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**over)


def test_the_users_deepspeed_settings_are_merged_into_the_generated_ones() -> None:
    raw = config(
        zero__stage=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    )
    generated = deepspeed_config(parse_config(raw, "the test"), 2)
    zero = generated["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 1000, True)
    assert generated["wall_clock_breakdown"] is True
    assert generated["train_micro_batch_size_per_gpu"] == 4


def test_overlapping_reductions_are_refused_where_deepspeed_gets_them_wrong() -> None:
    overlap = {"zero_optimization": {"overlap_comm": True}}
    for over in ({"pass": "split"}, {"data__micro_batch_size": 2}, {"zero__offload_optimizer": True}):
        assert not deepspeed_config(parse_config(config(**over), "the test"), 2)["zero_optimization"]["overlap_comm"]
        with pytest.raises(UserError, match="overlap_comm"):
            deepspeed_config(parse_config(config(**over, deepspeed=overlap), "the test"), 2)
    assert deepspeed_config(parse_config(config(), "the test"), 2)["zero_optimization"]["overlap_comm"]
    assert not deepspeed_config(parse_config(config(), "the test"), 1)["zero_optimization"]["overlap_comm"]
