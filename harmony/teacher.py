"""The EMA twin: which parameters have one, and who is whose twin."""

from __future__ import annotations

from torch import nn


def become_twin(teacher: nn.Module, student: nn.Module) -> None:
    """Start the teacher equal to the student (shapes must agree) and take its parameters out of the optimizer."""
    own = teacher.state_dict()
    teacher.load_state_dict({name: value for name, value in student.state_dict().items() if name in own})
    teacher.requires_grad_(False)
    teacher.eval()


def twins(teacher: nn.Module, student: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs (teacher parameter, student parameter) of the same name. The student may have more, such as mask tokens."""
    students = dict(student.named_parameters())
    return [(parameter, students[name]) for name, parameter in teacher.named_parameters()]
