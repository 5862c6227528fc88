"""The predicted peak of memory against counted bytes, on one and two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harmony_fast.engine.config import parse_config
from harmony_fast.engine.live_bytes import LiveBytes
from harmony_fast.engine.memory import go_through, predict
from harmony_fast.harmony.image_encoder import Block
from harmony_fast.harmony.packing import Layout
from harmony_fast.kernels import dispatch
from steps import config, start

pytestmark = pytest.mark.timeout(900)
WORKER = Path(__file__).with_name("memory_worker.py")
SMALL_BUCKETS = {
    "zero_optimization": {
        **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 60000),
        "stage3_param_persistence_threshold": 1000,
    }
}
WIDE = {"model__image__width": 64, "model__image__heads": 4, "model__image__depth": 4, "model__text__width": 64}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "wide-recomputed": (1, {**WIDE, "activation_checkpointing": {"image": 1, "text": 1}}),
    "recomputed-bf16": (1, {**WIDE, "activation_checkpointing": {"image": 1, "text": 1}, "precision": "bf16"}),
    "stage0-bf16": (1, {**WIDE, "zero__stage": 0, "activation_checkpointing": {"image": 2}, "precision": "bf16"}),
    "micro": (1, {"data__batch_size": 8, "data__micro_batch_size": 2}),
    "micro-kept": (1, {"data__batch_size": 8, "data__micro_batch_size": 2, "kept_graphs": 3}),
    "split-micro": (1, {**WIDE, "pass": "split", "data__micro_batch_size": 2, "zero__stage": 2}),
    "8bit": (1, {**WIDE, "optimizer__states": "8bit"}),
    "clip": (1, {"objectives": {"contrastive": {"embed_dim": 16}}}),
    "two-stage0": (2, {"zero__stage": 0, "data__batch_size": 8}),
    "two-stage1": (2, {"zero__stage": 1, "data__batch_size": 8}),
    "two-stage2-wide": (2, {**WIDE, "zero__stage": 2, "data__batch_size": 8, "data__micro_batch_size": 2}),
    "two-stage3-recomputed": (2, {**WIDE, "zero__stage": 3, "activation_checkpointing": {"image": 1, "text": 1}}),
    "two-stage3-bf16": (2, {**WIDE, "zero__stage": 3, "precision": "bf16"}),
}
"""Ranks, and what differs from the tiny configuration"""


def of(name: str) -> dict[str, Any]:
    return config(**{"run_dir": "none", "deepspeed": SMALL_BUCKETS, "data__batch_size": 4, **SETTINGS[name][1]})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    peaks = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        names = [name for name, (count, _) in SETTINGS.items() if count == ranks]
        start(WORKER, folder, ranks, {name: of(name) for name in names})
        peaks |= {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    return peaks


@pytest.mark.parametrize("name", SETTINGS)
def test_the_predicted_peak_is_within_5_percent_of_the_counted(measured: dict[str, float], name: str) -> None:
    memory = predict(parse_config(of(name), name), SETTINGS[name][0], "cpu")
    assert memory.total == pytest.approx(measured[name], rel=0.05), memory.parts


def test_on_a_gpu_an_average_in_host_memory_is_one_beside_the_compute_copy() -> None:
    """In fp32 the copy on the GPU is the average itself, unless the optimizer is elsewhere."""
    beside = {"zero__stage": 2, "precision": "fp32"}
    here, there = (
        predict(parse_config(config(**beside, zero__offload_optimizer=host), "the test"), 1) for host in (False, True)
    )
    assert here.held["ema"] == 0 and there.host["ema"] > 0


def test_the_kernels_that_a_run_asks_for_are_gone_through() -> None:
    """On a GPU xformers keeps what triton keeps; torch's operators write other things."""
    kinds = [{"precision": "fp32", "kernels": {"attention": kind}} for kind in ("triton", "xformers", "torch")]
    triton, xformers, plain = (go_through(parse_config(config(**kind), "the test"), 1).written for kind in kinds)
    assert triton == xformers != plain


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (64, 8)])
def test_what_a_block_keeps(width: int, heads: int) -> None:
    """`Block`'s own formula, with the kernels that a GPU takes."""
    tokens = 5 * 197
    with torch.device("meta"):
        block, x = Block(width, heads, 4.0, 1e-6), torch.empty(tokens, width).requires_grad_()
    live = LiveBytes("meta")
    with dispatch.preferring("auto"), live:
        live.watch(block)
        y = block(x, Layout(torch.arange(6, dtype=torch.int32) * 197, 197))
    assert y.shape == x.shape  # and counted as well
    assert live.now.total() == 4 * tokens * (10 * width + heads + 4) + y.nbytes
