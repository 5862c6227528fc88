"""The forward and backward passes of one optimizer step, in any number of micro-batches.

packed: one pass per micro-batch over all views. split: one pass, with a backward pass of its own, for each group of
objectives that share no view, so that the activations of one group are held at a time; the teacher pass is shared.
Objectives that compare samples see all micro-batches at once (GradCache, Gao et al. 2021): their embeddings are made
first without a graph, the loss and its gradient with respect to them are taken once, and each micro-batch passes its
part of that gradient on. The gradient is the same, to rounding, in every mode and for any number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..harmony.model import Harmony, StepOutput, Taught
from ..harmony.objectives import Collectives, Embeddings
from ..harmony.schedules import Clock
from ..harmony.views import Views

T = TypeVar("T")
Gradients = dict[str, tuple[Tensor, ...]]
"""By objective, the gradient of its loss with respect to each of its embeddings"""


class Runner(Protocol):
    """What runs the model: `zero.Zero` says what each part means."""

    model: Harmony

    @property
    def loss_scale(self) -> float:
        """Factor that backward passes multiply the loss with."""

    def forward(self, call: Callable[[Harmony], T]) -> T:
        """Run something with the model."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a gradient; `last`: the step comes next."""


class MicroBatches(Protocol):
    """The micro-batches of a step, of equal size; each may be made when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> Views: ...


def accumulate(zero: Runner, step: MicroBatches, clock: Clock, ranks: Collectives, split: bool) -> StepOutput:
    """Add up the gradient of one step. Returns the losses, detached."""
    count, model = len(step), zero.model
    passes = model.passes() if split else [list(model.objectives)]
    outputs: list[StepOutput] = []
    taught: list[Taught] = []
    gradients: Sequence[Gradients | None] = [None] * count
    if count > 1 and any(o.compares_samples for o in model.objectives.values()):
        compared, taught, gradients = _compare(zero, step, clock, ranks)
        outputs.append(compared)

    def forward(views: Views, shared: Taught, names: list[str], pulled: Gradients | None) -> StepOutput:
        return zero.forward(lambda m: m.losses(views, shared, clock, ranks, names, pulled))

    for k in range(count):
        views = step[k]
        shared = taught[k] if taught else teach(zero, views)
        for names in passes:
            output = forward(views, shared, names, gradients[k])
            zero.backward(output.loss / count, last=k == count - 1 and names is passes[-1])
            outputs.append(output)
    return _report(model, outputs)


def teach(zero: Runner, views: Views) -> Taught:
    """The teacher pass of one micro-batch."""
    return zero.forward(lambda m: m.teach(views))


def _compare(
    zero: Runner, step: MicroBatches, clock: Clock, ranks: Collectives
) -> tuple[StepOutput, list[Taught], list[Gradients]]:
    """The losses of objectives that compare samples, over all micro-batches; what each micro-batch must pass on."""

    def embed(views: Views) -> tuple[Taught, dict[str, Embeddings]]:
        shared = teach(zero, views)
        return shared, zero.forward(lambda m: m.embeddings(views, shared, clock))

    taught, embedded = zip(*(embed(step[k]) for k in range(len(step))), strict=True)
    whole = {name: _joined([e[name] for e in embedded]) for name in embedded[0]}
    output = zero.forward(lambda m: m.compare(whole, clock, ranks))
    zero.backward(output.loss, last=False)
    # Each micro-batch's loss is divided by their number, and the loss scale will be applied once more.
    factor = len(step) / zero.loss_scale

    def pull(embedding: Tensor) -> tuple[Tensor, ...]:
        assert embedding.grad is not None
        return (embedding.grad * factor).chunk(len(step))

    pulled = {name: [pull(embedding) for embedding in w.student] for name, w in whole.items()}
    gradients = [{name: tuple(parts[k] for parts in p) for name, p in pulled.items()} for k in range(len(step))]
    return output, list(taught), gradients


def _joined(parts: list[Embeddings]) -> Embeddings:
    """The embeddings of all micro-batches; the student's gather gradients."""
    student = tuple(torch.cat(p).requires_grad_() for p in zip(*(e.student for e in parts), strict=True))
    return Embeddings(student, tuple(torch.cat(p) for p in zip(*(e.teacher for e in parts), strict=True)))


def _report(model: Harmony, outputs: list[StepOutput]) -> StepOutput:
    """Losses and metrics averaged over the passes that made them, and their weighted sum."""
    losses = _means([o.losses for o in outputs])
    total = cast(Tensor, sum(model.objectives[name].config.weight * loss for name, loss in losses.items()))
    return StepOutput(total, losses, _means([o.metrics for o in outputs]))


def _means(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each name over the mappings that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([p[name].detach() for p in parts if name in p]).mean(0) for name in names}
