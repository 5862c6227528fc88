"""Run folders as training leaves them, with the initial weights of tiny models, and labelled tars."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harmony_fast.engine.checkpoint import write_weights_only
from harmony_fast.engine.config import RunConfig, dump_config, parse_config
from harmony_fast.harmony.model import Harmony
from PIL import Image

HOSTILE = '<script>alert("caption")</script> & <img src=https://example.com/x.png>'
CONTEXT = 12
SAMPLES = 10
ALL: dict[str, Any] = {
    "contrastive": {"embed_dim": 8},
    "self_distillation": {"prototypes": 16, "hidden": 16, "bottleneck": 8},
    "reconstruction": {"width": 16, "depth": 1, "heads": 2},
    "masked_language": {"depth": 1},
    "text_distillation": {"prototypes": 16, "hidden": 16, "bottleneck": 8},
}


def drawing(i: int, artist: int) -> Image.Image:
    """A small picture that depends on both."""
    pixels = np.full((40, 36, 3), 255, np.uint8)
    pixels[5 + i : 25 + i, 4 : 20 + artist] = [25 * i, 250 - 20 * i, 90 * artist]
    return Image.fromarray(pixels)


def write_tar(path: Path, artist: int, caption: str, label: Any = None) -> str:
    """Ten labelled drawings; the caption, and the class of the first, are given."""
    with tarfile.open(path, "w") as tar:
        for i in range(SAMPLES):
            png = io.BytesIO()
            drawing(i, artist).save(png, "PNG")
            labels = {"name": label if label and i == 0 else f"thing {i}", "subcategory": f"group {i % 3}"}
            text = f"{caption} {i}"
            for name, data in (("png", png.getvalue()), ("txt", text.encode()), ("json", json.dumps(labels).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def configuration(folder: Path, objectives: dict[str, Any], **more: Any) -> RunConfig:
    return parse_config(
        {
            "run_dir": str(folder),
            "data": {"train": str(folder / "train.beton"), "batch_size": 4},
            "model": {
                "image": {"width": 16, "depth": 2, "heads": 2, "patch_size": 8},
                "text": {"width": 16, "depth": 1, "heads": 2, "context": CONTEXT},
            },
            "views": {"global_size": 32, "local_size": 16, "local_crops": 2},
            "objectives": objectives,
            **more,
        },
        "test",
    )


def write_run(config: RunConfig) -> Path:
    """A run folder as training leaves it, with the initial weights."""
    folder = config.run_dir
    torch.manual_seed(0)
    model = Harmony(config)
    write_weights_only(folder, 1, {k: v.clone() for k, v in model.state_dict().items()})
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    lines = []
    for step in range(1, 40):
        losses = {f"loss/{name}": 3.0 / step for name in model.objectives}
        entry = {"step": step, "loss": 9.0 / step, **losses, "lr": 1e-3, "samples_per_second": 100.0}
        lines.append(json.dumps({**entry, "contrastive/accuracy": 0.5}))
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    return folder
