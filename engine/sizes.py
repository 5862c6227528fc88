"""Sizes in bytes as people write them: 24GiB."""

from __future__ import annotations

import re

from .errors import UserError

GIB = 2**30
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def size_of(text: str, option: str) -> float:
    """Bytes of a size with its unit: 24GiB. option: what a message calls it. Raises UserError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if not match or match[2].lower() not in units:
        raise UserError(f"{option} {text}: a number with its unit is needed, as in 24GiB (or {', '.join(UNITS)})")
    if not float(match[1]):
        raise UserError(f"{option} {text}: is nothing")
    return float(match[1]) * units[match[2].lower()]
