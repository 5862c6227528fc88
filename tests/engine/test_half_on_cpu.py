"""Half-precision products on processors that have no instructions for them."""

import pytest
import torch
import torch.nn.functional as F
from harmony_fast.engine.half_on_cpu import ProductsInFloat, products_for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_and_gradients_are_those_of_fp32_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(6, 40), torch.randn(24, 40), torch.randn(24)
    half = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    full = [t.detach().float().requires_grad_() for t in half]
    with ProductsInFloat():
        out = F.linear(*half)
        out.float().square().sum().backward()
    expected = F.linear(*full)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    expected.to(dtype).float().square().sum().backward()
    for ours, theirs in zip(half, full, strict=True):
        torch.testing.assert_close(
            ours.grad.float(), theirs.grad, rtol=0.02, atol=0.02 * theirs.grad.abs().max().item()
        )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_gradients(causal: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 2, 9, 16)
    half, full = qkv.bfloat16().requires_grad_(), qkv.bfloat16().float().requires_grad_()
    with ProductsInFloat():
        out = F.scaled_dot_product_attention(*half.unbind(0), is_causal=causal)
        out.float().sum().backward()
    expected = F.scaled_dot_product_attention(*full.unbind(0), is_causal=causal)
    expected.sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=0.02, atol=0.02)


def test_fp32_is_left_alone() -> None:
    assert not isinstance(products_for(torch.device("cpu"), torch.float32), ProductsInFloat)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert isinstance(products_for(torch.device("cpu"), torch.bfloat16), ProductsInFloat) == (not native)
