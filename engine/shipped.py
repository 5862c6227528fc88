"""What comes with the project and is found by name wherever it is installed: configurations, the demo's drawings."""

from __future__ import annotations

import difflib
import os.path
from pathlib import Path

from .errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = Path(__file__).parents[1] / "demo"


def shipped_configs() -> dict[str, Path]:
    """The project's own configurations and recipes by name: `demo`, `cc3m`, `clip`, ..."""
    return {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml"))}


def find_config(given: str | Path, folder: Path = Path()) -> Path:
    """The file of a configuration: a path, seen from `folder`, or the name of one of the project's own.

    A file that exists wins. A folder does not: `demo` is one in the checkout. Raises UserError with the nearest names.
    """
    path = folder / given
    if os.path.exists(path) and not os.path.isdir(path):  # unlike pathlib's, these take any name
        return path
    shipped = shipped_configs()
    if str(given) in shipped:
        return shipped[str(given)]
    what = "is a folder, not a configuration file" if os.path.isdir(path) else "no such configuration file"
    raise UserError(f"{path}: {what}; {nearest_configs(given)}")


def nearest_configs(given: str | Path) -> str:
    """What an unknown name may have meant, for the end of a message: near names, or else all."""
    names = list(shipped_configs())
    near = difflib.get_close_matches(Path(given).stem, names, 3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"the project's own are {', '.join(names)}"


def shipped_data(path: Path) -> Path:
    """The demo's file for `demo/NAME` where nothing has that path, as outside the checkout; else the path itself."""
    own = DEMO / path.name
    return own if path.parent == Path("demo") and not path.exists() and own.is_file() else path
