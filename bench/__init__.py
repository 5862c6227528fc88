"""Benchmarks: one module each, with `main(arguments) -> exit status`; results/ keeps JSON and plots by machine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def names() -> list[str]:
    """The benchmarks: modules of this package that can be run by name."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\ndef main(" in p.read_text(encoding="utf-8"))


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark; the exit status, 2 for an unknown name."""
    known = names()
    if name in known:
        return importlib.import_module(f"{__name__}.{name}").main(arguments)
    asked = name in ("--help", "-h")
    usage = f"usage: harmony-fast bench NAME [OPTION]...\nbenchmarks: {', '.join(known)}"
    print(usage if asked else f"no benchmark is called '{name}'\n{usage}", file=None if asked else sys.stderr)
    return 0 if asked else 2
