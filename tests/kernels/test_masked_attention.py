import pytest
import torch
from harmony_fast.kernels.masked_attention import equal_length_runs, masked_attention, reference
from hypothesis import given, settings
from hypothesis import strategies as st

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def packed(lengths: list[int], heads: int = 2, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return qkv, offsets


@settings(max_examples=30, deadline=None)
@given(lengths=lengths_lists, causal=st.booleans(), seed=st.integers(0, 99))
def test_forward_and_gradients_equal_the_reference(lengths: list[int], causal: bool, seed: int) -> None:
    qkv, offsets = packed(lengths, seed=seed)
    ours, theirs = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    weight = torch.randn_like(qkv[:, 0])
    out = masked_attention(*ours.unbind(1), offsets, max(lengths), causal=causal)
    expected = reference(*theirs.unbind(1), offsets, causal=causal)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@given(lengths=lengths_lists)
def test_runs_cover_every_sequence_once(lengths: list[int]) -> None:
    _, offsets = packed(lengths)
    runs = equal_length_runs(offsets)
    assert [length for _, count, length in runs for _ in range(count)] == lengths
    assert [start for start, _, _ in runs] == [
        sum(count * length for _, count, length in runs[:i]) for i in range(len(runs))
    ]


def test_a_sequence_does_not_see_another() -> None:
    qkv, offsets = packed([5, 7])
    before = masked_attention(*qkv.unbind(1), offsets, 7)
    qkv[5:] += 1
    after = masked_attention(*qkv.unbind(1), offsets, 7)
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_wrong_input_is_named() -> None:
    qkv, offsets = packed([5, 7])
    q, k, v = qkv.unbind(1)
    with pytest.raises(ValueError, match="offsets end at 12, but there are 11 tokens"):
        masked_attention(q[1:], k[1:], v[1:], offsets, 7)
    with pytest.raises(ValueError, match="one shape"):
        masked_attention(q, k[:, :1], v, offsets, 7)
