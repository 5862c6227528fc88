"""From image-caption files to batches: prepare, the .beton format, the loader, the augmentations."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def ensure_data(config: Any) -> None:
    """Make the training file if it is missing and the configuration says what from."""
    train = config.data.train
    if isinstance(train, Path) and not train.exists() and config.data.prepare_from:
        from .prepare import prepare as run

        data, context = config.data, config.model.text.context
        run(data.prepare_from, train, context=context, tokenizer=data.tokenizer, captions=data.captions)
