"""The base of every typed configuration part: unknown keys are refused, values are checked when assigned."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A part of the configuration. Subclasses hold the only place for a default, one docstring per key."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"the lower bound {pair[0]} is above the upper bound {pair[1]}")
    return pair


Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1, both included."""

Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
"""Lower and upper bound of a uniform draw."""
