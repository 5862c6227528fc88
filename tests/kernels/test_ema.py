import pytest
import torch
from harmony_fast.kernels import ema_update_
from hypothesis import given
from hypothesis import strategies as st


@given(n=st.integers(1, 300), momentum=st.floats(0, 1), seed=st.integers(0, 99))
def test_equals_the_formula(n: int, momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ema, source = torch.randn(2, n, generator=generator)
    expected = momentum * ema.double() + (1 - momentum) * source.double()
    copy = torch.empty(n, dtype=torch.bfloat16)
    ema_update_(ema, source, momentum, copy)
    torch.testing.assert_close(ema.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(copy, ema.bfloat16())


def test_small_updates_are_not_rounded_away() -> None:
    ema, source = torch.ones(8), torch.full((8,), 1.001)
    for _ in range(1000):
        ema_update_(ema, source, 0.999)
    torch.testing.assert_close(ema, torch.full((8,), 1.001 - 0.001 * 0.999**1000), rtol=1e-5, atol=0)


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="ema must be float32"):
        ema_update_(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3), 0.9)
    with pytest.raises(ValueError, match="one shape"):
        ema_update_(torch.zeros(3), torch.zeros(4), 0.9)
