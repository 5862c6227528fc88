"""The smallest configuration that has every part, and a few of the demo's samples."""

import tarfile
from pathlib import Path


def tiny_config() -> dict:
    """A configuration, as plain data, of the smallest model that has every part."""
    return {
        "epochs": 3,
        "log_every": 1,
        "data": {"train": "none.beton", "batch_size": 8, "workers": 1},
        "model": {
            "image": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "drop_path": 0.2},
            "text": {"width": 32, "depth": 1, "heads": 2, "context": 16},
        },
        "views": {"global_size": 32, "local_size": 16, "local_crops": 2},
        "objectives": {
            "contrastive": {"embed_dim": 16},
            "self_distillation": {"prototypes": 64, "hidden": 32, "bottleneck": 16},
            "reconstruction": {"width": 16, "depth": 1, "heads": 2},
            "masked_language": {"depth": 1},
            "text_distillation": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
        },
    }


def first_samples(source: Path, path: Path, count: int) -> Path:
    """A tar of the first samples of another, three files each."""
    with tarfile.open(source) as whole, tarfile.open(path, "w") as part:
        for _, member in zip(range(3 * count), whole, strict=False):
            part.addfile(member, whole.extractfile(member))
    return path
