"""Operations counted by torch for our operators: those of the same work done by products."""

import torch
from harmony_fast.kernels import flops, masked_attention, prototype_cross_entropy
from torch.utils.flop_counter import FlopCounterMode

assert flops


def counted(compute: object, *arguments: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        compute(*arguments).sum().backward()
    return counter.get_total_flops()


def test_attention() -> None:
    """Without a mask: forward 2, backward 5 products of every pair in a sequence; causal: half of the pairs."""
    q, k, v = (torch.randn(30, 2, 16, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([0, 20, 30], dtype=torch.int32)
    for causal, pairs in ((False, 20**2 + 10**2), (True, 20 * 21 // 2 + 10 * 11 // 2)):
        found = counted(lambda *x, c=causal: masked_attention(*x, offsets, 20, causal=c), q, k, v)
        assert found == 7 * 2 * pairs * 2 * 16


def test_prototypes() -> None:
    student, teacher = torch.randn(12, 16, requires_grad=True), torch.randn(12, 16)
    weights = torch.randn(2, 40, 16)
    temperatures = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    found = counted(
        lambda s: prototype_cross_entropy(s, weights[0], teacher, weights[1], torch.zeros(40), **temperatures), student
    )
    assert found == 4 * 2 * 12 * 40 * 16
