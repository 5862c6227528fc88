"""Write docs/configuration.md: every key of a run, from the models and the docstrings below their fields.

`make docs` runs it, and tests/test_docs.py holds the page against the models.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from harmony_fast.engine.config import RunConfig
from harmony_fast.harmony.config import Range
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration reference

Every key of a configuration file, with what it may be and its default. This page is made from the models by
`scripts/config_reference.py`.

A configuration is a YAML file; `configs/demo.yaml` and `configs/cc3m.yaml` are complete examples. On the command line a
key is set by its full name, which is the heading of its table, a dot, and the key:

```bash
harmony-fast train configs/cc3m.yaml epochs=10 data.batch_size=256 'views.local_scale=[0.05, 0.3]' \\
    objectives.masked_language=null
```

`base: other.yaml` at the top of a file starts from another one, whose keys are replaced one by one; `null` switches an
objective off. An unknown key is refused, with the nearest valid one. `RUN/config.yaml` is a run's configuration with
all defaults written out.
"""
NAMES = {
    int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", dict: "mapping",
    types.NoneType: "null",
}  # fmt: skip
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": ""}


class Section(NamedTuple):
    """The keys of one model."""

    name: str
    """Dotted, empty for the run itself"""
    model: type[BaseModel]
    default: BaseModel | None
    """What stands in its place if it is not given"""


RUN = Section("", RunConfig, None)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page as it should be."""
    return "\n".join([INTRODUCTION, *(described(section) for section in sections())])


def sections(section: Section = RUN) -> Iterator[Section]:
    """A section and those below it."""
    yield section
    for name, field in section.model.model_fields.items():
        if below := model_of(field):
            default = None if field.is_required() else field.get_default()
            yield from sections(Section(".".join(filter(None, [section.name, name])), below, default))


def undocumented() -> list[str]:
    """Keys without a docstring. A section has its model's."""
    return [
        f"{section.name}.{name}".lstrip(".")
        for section in sections()
        for name, field in section.model.model_fields.items()
        if not (field.description or model_of(field))
    ]


def described(section: Section) -> str:
    """Heading, the model's docstring and a table of the keys that are no sections themselves."""
    level = "###" if "." in section.name else "##"
    lines = [f"{level} {section.name or 'The run'}", "", one_line(inspect.getdoc(section.model) or "")]
    if section.default and (given := section.default.model_dump(exclude_defaults=True)):
        lines[-1] += f" Where the whole section is left out: `{as_yaml(given)}`."
    rows = [row(name, field) for name, field in section.model.model_fields.items() if not model_of(field)]
    if rows:
        lines += ["", "| key | value | default | what it does |", "|---|---|---|---|", *rows]
    return "\n".join([*lines, ""])


def row(name: str, field: FieldInfo) -> str:
    """A key in the table of its section."""
    default = "required" if field.is_required() else f"`{as_yaml(field.get_default(call_default_factory=True))}`"
    what = one_line(field.description or "")
    return f"| `{field.alias or name}` | {kind(field.annotation, field.metadata)} | {default} | {what} |"


def model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a key that is a section."""
    alternatives = typing.get_args(field.annotation) or (field.annotation,)
    return next((a for a in alternatives if isinstance(a, type) and issubclass(a, BaseModel)), None)


def as_yaml(value: Any) -> str:
    """A value as YAML prints it, on one line."""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def one_line(docstring: str) -> str:
    """For the cell of a table."""
    return " ".join(docstring.split()).replace("|", r"\|")


def kind(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """What a value may be, in words. limits: what stands beside the type in `Annotated` or `Field`."""
    limits = [bound for limit in limits for bound in (limit.metadata if isinstance(limit, FieldInfo) else [limit])]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(annotation.__origin__, annotation.__metadata__)
    if origin is typing.Literal:
        return ", ".join(f"`{as_yaml(choice)}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(kind(argument, limits) for argument in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        ascending = any(limit in typing.get_args(Range) for limit in limits)
        return f"{len(arguments)} × {kind(arguments[0])}" + ", ascending" * ascending
    if origin in (list, tuple):
        return f"list of {kind(arguments[0])}{bounds(limits)}"
    name = NAMES[origin or annotation]
    return name if annotation is types.NoneType else name + bounds(limits)


def bounds(limits: Iterable[Any]) -> str:
    """The bounds among the metadata of a type, in words."""
    found = {key: getattr(limit, key) for limit in limits for key in SIGNS if hasattr(limit, key)}
    if {"ge", "le"} <= found.keys():
        return f" from {found['ge']} to {found['le']}"
    if "min_length" in found:
        return ", not empty"
    return " and".join(f" {SIGNS[key]} {value}" for key, value in found.items())


if __name__ == "__main__":
    main()
