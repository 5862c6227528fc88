"""Stochastic depth: the same numbers as multiplying branches by 0 or 1 / (1 - rate), without the dropped work."""

import pytest
import torch
from harmony_fast.harmony.image_encoder import Block
from harmony_fast.harmony.packing import Layout, offsets_of
from harmony_fast.harmony.randomness import Purpose, sample_keys
from harmony_fast.harmony.stochastic_depth import Kept, draw_kept
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")


def layout_for(lengths: list[int]) -> Layout:
    return Layout(offsets_of(torch.tensor(lengths, dtype=torch.int32)), max(lengths))


def keys_for(count: int, seed: int = 0) -> Tensor:
    return sample_keys(seed, 0, torch.arange(count), Purpose.DROP_PATH)


def factors(kept: Kept | None, tokens: int) -> Tensor:
    """What each token's branch is multiplied with: [T, 1]."""
    if kept is None:
        return torch.ones(tokens, 1, dtype=torch.float64)
    return torch.zeros(tokens, 1, dtype=torch.float64).index_fill(0, kept.places, kept.scale)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0, 0.95), st.integers(0, 10**6))
def test_equals_multiplied_branches(lengths: list[int], rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    block, layout = Block(16, 2, 2.0, eps=1e-6).double(), layout_for(lengths)
    kept = draw_kept(keys_for(len(lengths), seed), layout, rate, depth=2, device=CPU)[1]
    x = torch.randn(sum(lengths), 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)

    out = block(x, layout, kept)
    y = x + factors(kept[0], len(x)) * block.attn(x, block.norm1, layout)
    expected = y + factors(kept[1], len(x)) * block.mlp(y, block.norm2)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)

    leaves = [x, *block.parameters()]
    got, wanted = (torch.autograd.grad((o * weight).sum(), leaves) for o in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.floats(0.01, 0.95))
def test_a_sequence_is_kept_whole_and_by_its_own_key(lengths: list[int], rate: float) -> None:
    layout, keys = layout_for(lengths), keys_for(len(lengths))
    last = draw_kept(keys, layout, rate, depth=3, device=CPU)[-1][0]
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    alone = [draw_kept(keys[i : i + 1], layout_for([n]), rate, 3, CPU)[-1][0].scale > 0 for i, n in enumerate(lengths)]
    expected = torch.tensor(alone)[number].nonzero().squeeze(1)
    if len(expected):
        assert torch.equal(last.places, expected) and last.scale == pytest.approx(1 / (1 - rate))
        assert torch.equal(last.layout.offsets.diff(), torch.tensor(lengths, dtype=torch.int32)[torch.tensor(alone)])
    else:
        assert torch.equal(last.places, torch.arange(lengths[0])) and last.scale == 0


def test_rates_grow_linearly_with_depth() -> None:
    kept = draw_kept(keys_for(4000), layout_for([1] * 4000), 0.4, depth=5, device=CPU)
    assert kept[0] == (None, None)
    for block, rate in zip(kept[1:], (0.1, 0.2, 0.3, 0.4), strict=True):
        for branch in block:
            assert len(branch.places) / 4000 == pytest.approx(1 - rate, abs=0.03)
            assert branch.scale == pytest.approx(1 / (1 - rate))
    assert not torch.equal(kept[-1][0].places, kept[-1][1].places)


def test_dropped_branches_cost_nothing() -> None:
    torch.manual_seed(0)
    lengths = [17] * 12 + [5] * 30
    block, layout = Block(32, 2, 4.0, eps=1e-6), layout_for(lengths)
    x = torch.randn(sum(lengths), 32, requires_grad=True)
    attention, mlp = draw_kept(keys_for(len(lengths)), layout, 0.5, depth=2, device=CPU)[1]

    def flops(drawn: tuple) -> int:
        with FlopCounterMode(display=False) as counter:
            block(x, layout, drawn).sum().backward()
        return counter.get_total_flops()

    only_attention = flops((None, mlp)) - flops((attention, mlp))
    only_mlp = flops((attention, None)) - flops((attention, mlp))
    mlp_tokens = len(x) - len(mlp.places)
    assert only_mlp == 3 * 2 * mlp_tokens * 32 * (2 * 128)
    assert only_attention >= 3 * 2 * (len(x) - len(attention.places)) * 32 * (4 * 32)
