"""Operators on the meta device, quickly: the same arguments give the same shapes, which need not be found out again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """A tensor without its place in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """A new tensor of this form."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_known: dict[tuple, tuple[type, list[Form]] | None] = {}
"""By operator and arguments: what comes out, and its type; None where that must be found out every time"""


def call(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """func(*args, **kwargs); of what was called before, new tensors of the forms that came out then.

    For below autograd: whether tensors need gradients is not looked at.
    """
    if not _makes_new(func):
        return func(*args, **kwargs)
    values = _described(args)
    named = _described(kwargs.values()) if kwargs else ()
    if values is None or named is None:
        return func(*args, **kwargs)
    key = func, values, tuple(kwargs), named
    try:
        found = _known.get(key)
    except TypeError:  # an argument that cannot be hashed
        return func(*args, **kwargs)
    if found is not None:
        kind, forms = found
        return forms[0].make() if kind is Tensor else kind(form.make() for form in forms)
    out = func(*args, **kwargs)
    if key not in _known:
        _known[key] = _forms(out, [*_tensors(args), *_tensors(kwargs.values())])
    return out


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operator changes nothing, and what it returns is no view, by its schema."""
    return not func._schema.is_mutable and all(out.alias_info is None for out in func._schema.returns)


def _described(values: Any) -> tuple | None:
    """All that outputs may depend on; None if a tensor has contents.

    Types, because 1, 1.0 and True are equal but give different results.
    """
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            inside = _described(value)
            if inside is None:
                return None
            found.append((type(value), inside))
        else:
            found.append((type(value), value))
    return tuple(found)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _form(x: Tensor) -> Form:
    return Form(x.shape, x.stride(), x.dtype)


def _forms(out: Any, given: list[Tensor]) -> tuple[type, list[Form]] | None:
    """The forms of outputs, if each is new memory of just the size that it needs."""
    made = [out] if isinstance(out, Tensor) else out
    if type(made) not in (list, tuple) or not all(isinstance(x, Tensor) and x.is_meta for x in made):
        return None
    places = {x.untyped_storage()._cdata for x in given}
    for x in made:
        storage = x.untyped_storage()
        if storage._cdata in places or storage.nbytes() != _form(x).make().untyped_storage().nbytes():
            return None
        places.add(storage._cdata)
    return Tensor if isinstance(out, Tensor) else type(made), [_form(x) for x in made]
