"""open_clip's `SimpleTokenizer` from its file alone: importing the whole package takes 5 s more."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING


def open_clip_folder() -> Path:
    """Where open_clip is installed; it is not imported. Raises ImportError where it is not."""
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ImportError("open_clip is not installed")
    return Path(spec.origin).parent


if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer as SimpleTokenizer
else:
    _spec = spec_from_file_location(f"{__name__}.file", open_clip_folder() / "tokenizer.py")
    _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    SimpleTokenizer = _module.SimpleTokenizer
