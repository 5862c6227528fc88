"""The forward and backward passes of one optimizer step, in any number of micro-batches.

packed: one pass per micro-batch over all views. split: one pass, with a backward pass of its own, for each group of
objectives that share no view, so that the activations of one group are held at a time; the teacher pass is shared.
Objectives that compare samples see all micro-batches at once (GradCache, Gao et al. 2021): their embeddings are made
first, the loss and its gradient with respect to them are taken once, and each micro-batch passes its part of that
gradient on. Where the graph of a micro-batch's embeddings was not kept, they are made once more. The gradient is the
same, to rounding, in every mode and for any number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..harmony.model import Embedded, Harmony, StepOutput, Taught
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


def accumulate(
    zero: Runner, step: MicroBatches, clock: Clock, ranks: Collectives, split: bool, kept: int = 1
) -> StepOutput:
    """Add up the gradient of one step. Returns the losses, detached.

    kept: of how many micro-batches, in packed passes, the graph of embeddings is kept until samples are compared.
    """
    count, model = len(step), zero.model
    passes, kept = (model.passes(), 0) if split else ([list(model.objectives)], kept)
    apart = [name for name, o in model.objectives.items() if o.compares_samples] if count > 1 else []

    def losses(views: Views, shared: Taught, names: list[str], made: Embedded | None) -> StepOutput:
        return zero.forward(lambda m: m.losses(views, shared, clock, ranks, names, apart, made))

    outputs: list[StepOutput] = []
    taught: list[Taught] = []
    embedded: list[Embedded] = []
    gradients: list[Gradients] = [{}] * count
    if apart:
        for k in range(count):
            views = step[k]
            taught.append(teach(zero, views))
            embedded.append(embed(zero, views, taught[k], clock, graph=k < kept))
        compared, gradients = _compare(zero, [e.embeddings for e in embedded], clock, ranks)
        outputs.append(compared)
    for k in range(count):
        views = step[k]
        shared = taught[k] if apart else teach(zero, views)
        for names in passes:
            output = losses(views, shared, names, embedded[k] if apart and k < kept else None)
            loss = output.loss / count
            for name, own in output.apart.items():
                loss = loss + sum((e * g).sum() for e, g in zip(own.student, gradients[k][name], strict=True))
            zero.backward(loss, last=k == count - 1 and names is passes[-1])
            outputs.append(StepOutput(loss.detach(), output.losses, output.metrics, {}))
    return _report(model, outputs)


def teach(zero: Runner, views: Views) -> Taught:
    """The teacher pass of one micro-batch."""
    return zero.forward(lambda m: m.teach(views))


def embed(zero: Runner, views: Views, shared: Taught, clock: Clock, graph: bool) -> Embedded:
    """What one micro-batch gives to objectives that compare samples, with or without a graph."""
    with torch.set_grad_enabled(graph):
        return zero.forward(lambda m: m.embed(views, shared, clock))


def _compare(
    zero: Runner, embedded: list[dict[str, Embeddings]], clock: Clock, ranks: Collectives
) -> tuple[StepOutput, list[Gradients]]:
    """The losses of objectives that compare samples, over all micro-batches; what each micro-batch must pass on."""
    whole = {name: _joined([e[name] for e in embedded]) for name in embedded[0]}
    output = zero.forward(lambda m: m.compare(whole, clock, ranks))
    zero.backward(output.loss, last=False)

    def pull(embedding: Tensor) -> tuple[Tensor, ...]:
        assert embedding.grad is not None
        return (embedding.grad / zero.loss_scale).chunk(len(embedded))  # it will be applied once more

    pulled = {name: [pull(embedding) for embedding in w.student] for name, w in whole.items()}
    return output, [{name: tuple(parts[k] for parts in p) for name, p in pulled.items()} for k in range(len(embedded))]


def _joined(parts: list[Embeddings]) -> Embeddings:
    """The embeddings of all micro-batches; the student's gather gradients."""
    student = tuple(torch.cat(p).detach().requires_grad_() for p in zip(*(e.student for e in parts), strict=True))
    return Embeddings(student, tuple(torch.cat(p) for p in zip(*(e.teacher for e in parts), strict=True)))


def _report(model: Harmony, outputs: list[StepOutput]) -> StepOutput:
    """Losses and metrics averaged over the passes that made them, and their weighted sum."""
    losses = _means([o.losses for o in outputs])
    total = cast(Tensor, sum(model.objectives[name].config.weight * loss for name, loss in losses.items()))
    return StepOutput(total, losses, _means([o.metrics for o in outputs]), {})


def _means(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each name over the mappings that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.stack([p[name].detach() for p in parts if name in p]).mean(0) for name in names}
