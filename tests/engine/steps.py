"""Training steps of a tiny model in processes of their own, under any settings, and comparing what comes out."""

import json
import sys
from pathlib import Path
from typing import Any

import commands
import torch
from harmony_fast.engine.config import parse_config
from tiny import tiny_config

WORKER = Path(__file__).with_name("steps_worker.py")
Settings = dict[str, tuple[dict[str, Any], int, bool]]
"""By name: configuration, steps, whether to save a checkpoint"""


def config(**over: Any) -> dict[str, Any]:
    """The tiny configuration with dotted keys (as key__key) set."""
    raw = tiny_config()
    raw["data"]["batch_size"] = 8
    raw["model"]["text"]["vocabulary"] = 64
    # eps: so that rounding in gradients near zero does not become whole steps of AdamW.
    raw["optimizer"] = {"lr": 0.03, "warmup_epochs": 0, "eps": 1e-4}
    for key, value in over.items():
        *path, last = key.split("__")
        node = raw
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    parse_config(raw, "the test")
    return raw


def run(folder: Path, ranks: int, settings: Settings, **environment: str) -> dict[str, dict[str, Any]]:
    """The worker on some ranks under each setting; what rank 0 found."""
    start(WORKER, folder, ranks, settings, **environment)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in settings}


def start(worker: Path, folder: Path, ranks: int, settings: dict[str, Any], **environment: str) -> None:
    """`python WORKER SETTINGS.json FOLDER` on some ranks; all must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, str(worker)]
    processes = [
        commands.start(
            folder / "settings.json", folder, command=command, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks,
            LOCAL_WORLD_SIZE=ranks, GLOO_SOCKET_IFNAME="lo", HARMONY_FAST_STORE=folder / "store",
            HARMONY_FAST_KERNELS="torch", **environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        messages = [process.communicate(timeout=1100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(m[-3000:] for m in messages)


def assert_same(one: dict[str, Any], other: dict[str, Any], rtol: float = 1e-5, each: float | None = None) -> None:
    """Losses agree, and weights relative to each tensor's norm (`each`, by default `rtol`).

    The key part of attention biases has no gradient in exact arithmetic: what AdamW makes of the rounding there is
    left out.
    """
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(other["losses"]), rtol=rtol, atol=0)
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        difference = value - other["weights"][name]
        if name.endswith(("attn.qkv.bias", "attn.in_proj_bias")):
            difference.view(3, -1)[1] = 0
        error = float(difference.norm() / value.norm().clamp(min=1e-6))
        assert error < (each or rtol), (name, error)
