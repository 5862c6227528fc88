"""The model: plan views -> teacher pass -> student pass -> losses.

Student and teacher are `Branch`es with the same parameter names, so a teacher parameter's twin is the student
parameter of that name. What no objective asks for is not built.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Mapping, Sequence, ValuesView
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from pydantic import create_model, model_validator
from torch import Tensor, nn

from .config import Config
from .image_encoder import ImageConfig, ImageEncoder
from .objectives import REGISTRY, Collectives, Embeddings, Features, Objective, ObjectiveConfig, Outcome, Surroundings
from .schedules import Clock
from .teacher import become_twin
from .text_encoder import CaptionFeatures, TextConfig, TextEncoder
from .views import Reads, Request, View, Views, ViewsConfig, union

T = TypeVar("T")


class ModelConfig(Config):
    """The two towers."""

    image: ImageConfig = ImageConfig(name="ViT-B/16")
    text: TextConfig = TextConfig()


class _Objectives(Config):
    """The objectives by name; one that is not named, or null, is off and nothing of it is built."""

    def active(self) -> dict[str, ObjectiveConfig]:
        """Those that are on, in the registry's order."""
        return {name: getattr(self, name) for name in REGISTRY if getattr(self, name) is not None}


# One optional key per registered objective, so that a new file in objectives/ is all that a new objective needs.
if TYPE_CHECKING:  # the keys are known at run time alone
    ObjectivesConfig = _Objectives
else:
    ObjectivesConfig = create_model(
        "ObjectivesConfig", __base__=_Objectives, **{name: (cls.Config | None, None) for name, cls in REGISTRY.items()}
    )


class MethodConfig(Config):
    """What is learned: the towers, the views, and the objectives."""

    model: ModelConfig = ModelConfig()
    views: ViewsConfig = ViewsConfig()
    objectives: ObjectivesConfig

    @model_validator(mode="after")
    def _sizes_fit(self) -> MethodConfig:
        patch = self.model.image.patch_size
        for key in ("global_size", "local_size"):
            if getattr(self.views, key) % patch:
                raise ValueError(f"views.{key} {getattr(self.views, key)} is not a multiple of the patch size {patch}")
        if not self.objectives.active():
            raise ValueError(f"objectives: name at least one of {', '.join(REGISTRY)}")
        for objective in self.objectives.active().values():
            objective.require(self.views)
        return self


class Branch(nn.Module):
    """One set of towers and heads, as far as they are asked for."""

    def __init__(self, config: MethodConfig, objectives: dict[str, Objective], request: Request, teacher: bool) -> None:
        super().__init__()
        asking = [o for o in objectives.values() if not teacher or o.teacher_views]
        embed_dim = next((o.embed_dim for o in asking if o.embed_dim), None)
        self.whole_captions = teacher and any(o.whole_captions for o in objectives.values())
        self.image: ImageEncoder | None = None
        self.text: TextEncoder | None = None
        if any(view.is_image for view in request):
            masked = View.GLOBAL_MASKED in request
            self.image = ImageEncoder(config.model.image, config.views.global_size, embed_dim, masked)
        if not all(view.is_image for view in request):
            self.text = TextEncoder(config.model.text, embed_dim)
        heads = {name: o.build_head() for name, o in objectives.items() if not teacher or o.teacher_views}
        self.heads = nn.ModuleDict({name: head for name, head in heads.items() if head is not None})

    def encode(
        self, views: Views, request: Request, reads: dict[View, Reads] | None = None, plain: Tensor | None = None
    ) -> tuple[dict, dict]:
        """One pass of each tower over the union of requested views. reads, plain: see `ImageEncoder.forward`."""
        images, captions = {}, {}
        if any(v.is_image for v in request):
            assert self.image is not None  # built for what the objectives ask for
            images = self.image(views, request, reads, plain)
        if not all(v.is_image for v in request):
            assert self.text is not None
            captions = self.text(views, request, self.whole_captions)
        return images, captions

    def features(self, encoded: tuple[dict, dict], name: str) -> Features:
        """What objective `name` gets to see."""
        head = self.heads[name] if name in self.heads else None  # noqa: SIM401 - ModuleDict has no get
        return Features(*encoded, self.image, self.text, head)


class Objectives(nn.ModuleDict):
    """The objectives that are on, by name: a `ModuleDict` whose types say what it holds."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Objective: ...

        def items(self) -> ItemsView[str, Objective]: ...  # noqa: D102

        def values(self) -> ValuesView[Objective]: ...  # noqa: D102


class StepOutput(NamedTuple):
    """The losses of one pass. A tuple for the same reason as `Outcome`."""

    loss: Tensor
    """Weighted sum, to be differentiated"""
    losses: dict[str, Tensor]
    """Unweighted, detached, by objective"""
    metrics: dict[str, Tensor]
    """Detached, by "objective/name" """
    apart: dict[str, Embeddings]
    """Of objectives that were asked for their embeddings instead"""


class Embedded(NamedTuple):
    """What objectives that compare samples need of one micro-batch."""

    embeddings: dict[str, Embeddings]
    """By objective"""
    plain: Tensor | None
    """[crops, B, D]: class tokens of the plain crops among the views they read"""


def most_read(objectives: list[tuple[Request, dict[View, Reads]]]) -> dict[View, Reads]:
    """What is read of each image view by any of some objectives, given as (views, what each reads of them)."""
    images = {view for request, _ in objectives for view in request if view.is_image}
    return {v: max(reads.get(v, Reads.ALL) for request, reads in objectives if v in request) for v in images}


Taught = tuple[dict[View, Tensor], dict[View, CaptionFeatures]]
"""What the teacher's towers made of a micro-batch: features by image view, and by caption view"""


class Harmony(nn.Module):
    """Joint pretraining of an image and a text transformer by any set of objectives (arXiv 2405.14239)."""

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        image, text = config.model.image, config.model.text
        around = Surroundings(image.width, image.patch_size, text.width, text.heads, text.vocabulary, config.views)
        self.config = config
        registered: Mapping[str, Callable[..., Objective]] = REGISTRY  # what is registered takes surroundings as well
        self.objectives = Objectives({n: registered[n](c, around) for n, c in config.objectives.active().items()})
        objectives = dict(self.objectives.items())
        self.student_views = union([o.student_views for o in objectives.values()])
        self.teacher_views = union([o.teacher_views for o in objectives.values()])
        self.student = Branch(config, objectives, self.student_views, teacher=False)
        self.teacher = Branch(config, objectives, self.teacher_views, teacher=True)
        become_twin(self.teacher, self.student)

    def train(self, mode: bool = True) -> Harmony:
        """The teacher never trains: no stochastic depth in it."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, call: Callable[[Harmony], T]) -> T:
        """Run one of the methods below: `model(lambda m: m.losses(...))`. Wrappers of the model (DeepSpeed) prepare it
        for whatever happens inside this call."""
        return call(self)

    @torch.no_grad()
    def teach(self, views: Views) -> Taught:
        """The one teacher pass of a micro-batch. What no objective reads is 0."""
        reads = most_read([(o.teacher_views, o.teacher_reads) for o in self.objectives.values()])
        return self.teacher.encode(views, self.teacher_views, reads)

    def losses(
        self, views: Views, taught: Taught, clock: Clock, collectives: Collectives, names: Sequence[str] | None = None,
        apart: Sequence[str] = (), made: Embedded | None = None,
    ) -> StepOutput:  # fmt: skip
        """The losses of one micro-batch: one student pass over the union of the views that the objectives ask for.

        names: the objectives of this pass (None: all). apart: those of which embeddings are wanted in the place of a
        loss, because samples of several micro-batches are to be compared (see `compare`). made: what `embed` has made
        for these already, with its graph.
        Raises KeyError if an objective uses a view it did not ask for.
        """
        embedded = {} if made is None else dict(made.embeddings)
        objectives = {n: self.objectives[n] for n in names or self.objectives if n not in embedded}
        learned = self._learn(views, list(objectives.values()), None if made is None else made.plain)
        outcomes: dict[str, Outcome] = {}
        for name, objective in objectives.items():
            student, teacher = self.student.features(learned, name), self.teacher.features(taught, name)
            if name in apart:
                embedded[name] = objective.embed(student, teacher, clock)
            else:
                outcomes[name] = objective(student, teacher, views, clock, collectives)
        return self._summed(outcomes, embedded)

    def embed(self, views: Views, taught: Taught, clock: Clock) -> Embedded:
        """What the objectives that compare samples need of one micro-batch."""
        objectives = {n: o for n, o in self.objectives.items() if o.compares_samples}
        learned = self._learn(views, list(objectives.values()))
        embeddings = {
            name: objective.embed(self.student.features(learned, name), self.teacher.features(taught, name), clock)
            for name, objective in objectives.items()
        }
        images, _ = learned
        return Embedded(embeddings, images[View.GLOBAL_PLAIN][:, :, 0] if View.GLOBAL_PLAIN in images else None)

    def compare(self, embeddings: dict[str, Embeddings], clock: Clock, collectives: Collectives) -> StepOutput:
        """The losses of objectives that compare samples, over the embeddings of all micro-batches."""
        outcomes = {n: self.objectives[n].compare(e, clock, collectives) for n, e in embeddings.items()}
        return self._summed(outcomes, {})

    def _learn(self, views: Views, objectives: list[Objective], plain: Tensor | None = None) -> tuple[dict, dict]:
        """The student's pass for some objectives. What none of them reads is 0. plain: see `ImageEncoder.forward`."""
        reads = most_read([(o.student_views, o.student_reads) for o in objectives])
        return self.student.encode(views, union([o.student_views for o in objectives]), reads, plain)

    def _summed(self, outcomes: dict[str, Outcome], apart: dict[str, Embeddings]) -> StepOutput:
        """The weighted sum of the objectives' losses, beside what they report."""
        total: Tensor | float = 0.0
        metrics = {}
        for name, outcome in outcomes.items():
            total = total + self.objectives[name].config.weight * outcome.loss
            metrics.update({f"{name}/{key}": value for key, value in outcome.metrics.items()})
        losses = {name: outcome.loss.detach() for name, outcome in outcomes.items()}
        return StepOutput(torch.as_tensor(total), losses, metrics, apart)

    def passes(self) -> list[list[str]]:
        """The smallest groups of objectives that share no student view: each can have a pass of its own."""
        groups: list[tuple[set[View], list[str]]] = []
        for name, objective in self.objectives.items():
            views, names = {view for view, crops in objective.student_views.items() if crops}, [name]
            for group in [g for g in groups if g[0] & views]:
                groups.remove(group)
                views, names = views | group[0], group[1] + names
            groups.append((views, names))
        return [names for _, names in groups]

    def end_step(self, collectives: Collectives) -> None:
        """After the optimizer step: objectives move their state (centers)."""
        for objective in self.objectives.values():
            objective.end_step(collectives)

    def forget_step(self) -> None:
        """Instead of `end_step` where the step was left out."""
        for objective in self.objectives.values():
            objective.forget_step()

    def frozen_parameters(self) -> list[tuple[list[nn.Parameter], int]]:
        """Student parameters that stay fixed at the start, with the number of epochs."""
        frozen = []
        for name, objective in self.objectives.items():
            if name in self.student.heads:
                frozen.append(objective.frozen_parameters(self.student.heads[name]))
        return [(parameters, epochs) for parameters, epochs in frozen if parameters and epochs]
