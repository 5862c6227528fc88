"""Operators on the meta device that are not run again give what they gave."""

import pytest
import torch
from harmony_fast.engine import meta_outputs
from torch import Tensor

aten = torch.ops.aten


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def made(func: object, *args: object, **kwargs: object) -> list[Tensor]:
    out = meta_outputs.call(func, args, kwargs)
    return [out] if isinstance(out, Tensor) else list(out)


def place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


CASES = {
    "sum of two forms": (aten.add.Tensor, (new(4, 1, 3), new(5, 1)), {}),
    "strides": (aten.clone.default, (new(4, 6, 8).permute(2, 0, 1),), {}),
    "another dtype": (aten._to_copy.default, (new(3),), {"dtype": torch.bfloat16}),
    "several outputs": (aten.native_layer_norm.default, (new(2, 8), [8], new(8), new(8), 1e-6), {}),
    "list of tensors": (aten.cat.default, ([new(2, 3), new(5, 3)],), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_new_tensors_of_the_same_form(case: str) -> None:
    func, args, kwargs = CASES[case]
    expected = func(*args, **kwargs)
    expected = [expected] if isinstance(expected, Tensor) else expected
    first, second = made(func, *args, **kwargs), made(func, *args, **kwargs)
    for x, y, right in zip(first, second, expected, strict=True):
        for one in (x, y):
            assert (one.shape, one.stride(), one.dtype) == (right.shape, right.stride(), right.dtype)
            assert one.untyped_storage().nbytes() == right.untyped_storage().nbytes()
        assert place(x) != place(y)


def test_numbers_that_are_equal_are_told_apart_by_type() -> None:
    whole = new(3, dtype=torch.int64)
    for _ in range(2):
        dtypes = [made(aten.mul.Scalar, whole, number)[0].dtype for number in (2, 2.0, True, 1, 1.0)]
        assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


def test_views_and_changes_in_place_stay_in_their_memory() -> None:
    for _ in range(2):
        x = new(4, 6)
        for func, args in (
            (aten.view.default, (x, [24])), (aten._unsafe_view.default, (x, [24])), (aten.transpose.int, (x, 0, 1)),
            (aten.add_.Tensor, (x, new(6))), (aten.split.Tensor, (x, 2)),
        ):  # fmt: skip
            assert {place(y) for y in made(func, *args)} == {place(x)}, func


def test_memory_that_outputs_share_is_shared_again() -> None:
    base = torch.library.Library("harmony_fast_test", "DEF")
    base.define("pair(Tensor x) -> (Tensor, Tensor)")
    base.impl("pair", lambda x: tuple(x.new_empty(2, 5)), "Meta")
    for _ in range(2):
        one, other = made(torch.ops.harmony_fast_test.pair.default, new(3))
        assert place(one) == place(other)


def test_on_the_cpu_operators_run() -> None:
    x = torch.ones(3)
    assert [made(aten.add.Tensor, x, y)[0].sum().item() for y in (x, 2 * x)] == [6, 9]
