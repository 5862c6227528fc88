"""What is made again in the backward pass: the same numbers as if it had been kept, and it is not kept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harmony_fast.engine.live_bytes import LiveBytes
from harmony_fast.harmony.image_encoder import Block
from harmony_fast.harmony.packing import Layout, offsets_of
from harmony_fast.harmony.recompute import Linear, again, linear_of, run_block
from harmony_fast.harmony.text_encoder import TextBlock
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "double": lambda x: 2 * x}


@given(*[st.integers(1, 9)] * 3, st.sampled_from([*FUNCTIONS]), st.sets(st.integers(0, 2)))
def test_gradients_are_those_of_a_plain_layer(rows: int, width: int, out: int, name: str, frozen: set[int]) -> None:
    """Also where some of input, weight and bias have no gradient."""
    torch.manual_seed(rows * width * out)
    shapes = ((rows, width), (out, width), (out,))
    leaves = [torch.randn(s, dtype=torch.float64).requires_grad_(i not in frozen) for i, s in enumerate(shapes)]
    x, weight, bias = leaves
    make = FUNCTIONS[name]
    ours, plain = linear_of(make(x), x, make, weight, bias), F.linear(make(x), weight, bias)
    assert torch.equal(ours, plain)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if asked:
        direction = torch.randn_like(plain)
        expected = torch.autograd.grad(plain, asked, direction)
        for got, want in zip(torch.autograd.grad(ours, asked, direction), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


def test_under_autocast_a_layer_is_a_plain_one() -> None:
    """A user's own loop may run the model so: what is multiplied in bf16 has gradients in fp32."""
    layer, x = Linear(4, 3), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(F.gelu(x), source=x, make=F.gelu)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_blocks_have_the_gradients_of_their_formula(kind: str, every: int) -> None:
    """Against blocks written out with nothing recomputed, in float64; with and without checkpointing."""
    torch.manual_seed(0)
    block = (Block(16, 2, 4.0, 1e-6) if kind == "image" else TextBlock(16, 2)).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layout, x = Layout(offsets_of(torch.tensor([5, 4])), 5), torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    expected = _written_out(block, x)
    out = run_block(block, 0, every, x, layout)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves, direction = [x, *block.parameters()], torch.randn_like(out)
    got, wanted = (torch.autograd.grad(y, leaves, direction) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def _written_out(block: Block | TextBlock, x: Tensor) -> Tensor:
    """Two sequences of 5 and 4 tokens, two heads of 8."""
    if isinstance(block, Block):
        norms, mlp = (block.norm1, block.norm2), (block.mlp.fc1, block.mlp.fc2)
        weights, bias, last = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.proj
    else:
        norms, mlp = (block.ln_1, block.ln_2), (block.mlp.c_fc, block.mlp.c_proj)
        weights, bias, last = block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj
    mixed = []
    for part in F.linear(norms[0](x), weights, bias).split([5, 4]):
        q, k, v = part.unflatten(-1, (3, 2, 8)).permute(1, 2, 0, 3)
        scores = q @ k.mT / 8**0.5
        if isinstance(block, TextBlock):
            scores = scores.masked_fill(torch.ones(len(part), len(part)).triu(1).bool(), -torch.inf)
        mixed.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    x = x + last(torch.cat(mixed))
    hidden = F.linear(norms[1](x), mlp[0].weight, mlp[0].bias)
    hidden = F.gelu(hidden) if isinstance(block, Block) else hidden * torch.sigmoid(1.702 * hidden)
    return x + F.linear(hidden, mlp[1].weight, mlp[1].bias)


def test_what_is_made_again_is_not_kept() -> None:
    """Beside the norm's input and its statistics, 8 bytes a row."""
    norm, layer, held = nn.LayerNorm(64), Linear(64, 16), {}
    for remade in (False, True):
        with LiveBytes("cpu") as live:
            live.watch(nn.ModuleList([norm, layer]))
            x = torch.randn(1000, 64).requires_grad_()
            y = layer(norm(x), source=x, make=again(norm)) if remade else layer(norm(x))
            held[remade] = live.now.total() - x.nbytes - y.nbytes
    assert held == {False: 8 * 1000 + x.nbytes, True: 8 * 1000}
