"""Contrastive losses against float64 formulas written out, open_clip, and each other's backends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from harmony_fast.kernels import contrastive, contrastive_loss, contrastive_ops, contrastive_terms
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of gradients, relative to the largest. The half-precision ones are rounded on their way out, and so are the
gradients of logits that go into them. The losses are held to fp32."""

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink an example takes the interpreter minutes
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@contextmanager
def backend(name: str, tile: tuple[int, int] | None = None) -> Iterator[None]:
    """Compute with this backend, in tiles of this size, also what would fit in one piece."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARMONY_FAST_KERNELS", name)
        if tile is not None:
            patch.setattr(contrastive, "ONE_PIECE", 0)
            patch.setattr(contrastive_ops, "TORCH_TILE", tile)
            patch.setattr(contrastive_ops, "TRITON_TILE", tile)
        yield


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64, strided: bool = False) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = F.normalize(x, dim=1).to(dtype)
    return x.T.contiguous().T if strided else x


def problem(
    batch: int, more: int, width: int, teacher_width: int = 0, seed: int = 0, dtype: torch.dtype = torch.float64,
    strided: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Vectors by argument name: without `more` columns only the local ones, without teacher_width no teachers."""
    names = ["image", "text"] + (["teacher_image", "teacher_text"] if teacher_width else [])
    names += [f"all_{name}" for name in names] if more else []
    rows = {name: batch + more * name.startswith("all_") for name in names}
    widths = {name: teacher_width if "teacher" in name else width for name in names}
    return {name: unit(rows[name], widths[name], seed + i, dtype, strided) for i, name in enumerate(names)}


def formula(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, all_image: Tensor | None = None,
    all_text: Tensor | None = None, teacher_image: Tensor | None = None, teacher_text: Tensor | None = None,
    all_teacher_image: Tensor | None = None, all_teacher_text: Tensor | None = None, hard_weight: float = 1.0,
    soft_temperature: float = 0.1, row_offset: int = 0,
) -> Tensor:  # fmt: skip
    """The softmax loss as it is defined, in the inputs' dtype."""
    labels = torch.arange(len(image)) + row_offset
    by_image = logit_scale * image @ (text if all_text is None else all_text).T
    by_text = logit_scale * text @ (image if all_image is None else all_image).T
    hard = (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2
    if teacher_image is None:
        return hard
    texts = teacher_text if all_teacher_text is None else all_teacher_text
    images = teacher_image if all_teacher_image is None else all_teacher_image
    to_text = (teacher_image @ texts.T / soft_temperature).softmax(1)
    to_image = (teacher_text @ images.T / soft_temperature).softmax(1)
    soft = (F.cross_entropy(by_image, to_text) + F.cross_entropy(by_text, to_image)) / 2
    return hard_weight * hard + (1 - hard_weight) * soft


def sigmoid_formula(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, all_text: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:  # fmt: skip
    """The sigmoid loss as it is defined, one pair after the other."""
    texts = text if all_text is None else all_text
    terms = [
        F.logsigmoid((1 if j == i + row_offset else -1) * (logit_scale * image[i] @ texts[j] + logit_bias))
        for i in range(len(image))
        for j in range(len(texts))
    ]
    return -torch.stack(terms).sum() / len(image)


def compare(
    tensors: dict[str, Tensor], scale: float, expected: Callable[..., Tensor], bias: float | None = None,
    tolerance: float | None = None, **options: object,
) -> None:  # fmt: skip
    """Loss and gradients of `contrastive_loss` against a formula in float64."""
    dtype = tensors["image"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = {"logit_scale": scale} | ({} if bias is None else {"logit_bias": bias})
    ours, theirs = (
        {n: x.detach().to(d or x.dtype).requires_grad_("teacher" not in n) for n, x in tensors.items()}
        | {n: torch.tensor(x, dtype=d or wide, requires_grad=True) for n, x in numbers.items()}
        for d in (None, torch.float64)
    )
    kind = {} if bias is None else {"kind": "sigmoid"}
    loss, right = contrastive_loss(**ours, **options, **kind), expected(**theirs, **options)
    assert loss.dtype == wide and loss.shape == ()
    tolerance = tolerance or TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), right, rtol=min(tolerance, 5e-6), atol=min(tolerance, 5e-6))
    (-3 * loss).backward()  # not 1: the gradient that comes in counts
    (-3 * right).backward()
    for name, x in theirs.items():
        if x.grad is None or ours[name].grad is None:
            assert x.grad is None and ours[name].grad is None, name
            continue
        assert ours[name].grad.dtype == ours[name].dtype and ours[name].grad.shape == x.shape
        # Sums may cancel: then the error goes by their terms, about 1 for a scale and scale / batch for a vector.
        size = max(x.grad.abs().max().item(), 1.0 if name in numbers else scale / len(tensors["image"]))
        error = (ours[name].grad.double() - x.grad).abs().max().item() / size
        assert error <= tolerance, f"{name}: error {error:.1e} of {size:.1e}"


shapes = {
    "batch": st.sampled_from([1, 2, 7, 33, 128, 130]),
    "more": st.sampled_from([0, 0, 1, 37, 140]),
    "width": st.sampled_from([1, 7, 16, 33, 70]),
    "seed": st.integers(0, 99),
    "strided": st.booleans(),
    "scale": st.floats(0.5, 20),
}


@settings(max_examples=8, phases=QUICK)
@given(
    **shapes,
    dtype=dtypes,
    teacher_width=st.sampled_from([0, 24, 70]),
    hard_weight=st.floats(0, 0.9),
    at=st.floats(0, 1),
)
@example(2, 299, 16, 1, False, 10.0, torch.bfloat16, 16, 0.5, 1.0)  # columns split over programs
def test_triton_softmax(
    batch: int, more: int, width: int, seed: int, strided: bool, scale: float, dtype: torch.dtype, teacher_width: int,
    hard_weight: float, at: float,
) -> None:  # fmt: skip
    tensors = problem(batch, more, width, teacher_width, seed, dtype, strided)
    weight = hard_weight if teacher_width else 1.0
    with backend("triton"):
        compare(tensors, scale, formula, hard_weight=weight, soft_temperature=0.2, row_offset=int(at * more))


@settings(max_examples=8, phases=QUICK)
@given(
    **shapes | {"batch": st.integers(1, 20), "more": st.sampled_from([0, 11, 100])}, dtype=dtypes, at=st.floats(0, 1)
)
def test_triton_sigmoid(
    batch: int, more: int, width: int, seed: int, strided: bool, scale: float, dtype: torch.dtype, at: float
) -> None:
    tensors = problem(batch, more, width, 0, seed, dtype, strided)
    tensors.pop("all_image", None)
    with backend("triton"):
        compare(tensors, scale, sigmoid_formula, -3.0, row_offset=int(at * more))


@settings(max_examples=40)
@given(
    **shapes | {"batch": st.integers(1, 15), "more": st.sampled_from([0, 0, 1, 20])},
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), teacher_width=st.sampled_from([0, 7]),
    at=st.floats(0, 1), tile=st.sampled_from([None, (1, 1), (4, 6), (9, 100), (100, 5)]), sigmoid=st.booleans(),
)  # fmt: skip
def test_torch(
    batch: int, more: int, width: int, seed: int, strided: bool, scale: float, dtype: torch.dtype, teacher_width: int,
    at: float, tile: tuple[int, int] | None, sigmoid: bool,
) -> None:  # fmt: skip
    tensors = problem(batch, more, width, 0 if sigmoid else teacher_width, seed, dtype, strided)
    with backend("torch", tile):
        if sigmoid:
            tensors.pop("all_image", None)
            compare(tensors, scale, sigmoid_formula, -3.0, row_offset=int(at * more))
        else:
            weight = 0.3 if teacher_width else 1.0
            compare(tensors, scale, formula, hard_weight=weight, soft_temperature=0.2, row_offset=int(at * more))


@pytest.mark.parametrize("more", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_walks_over_tiles_of_gradients(more: int, dtype: torch.dtype) -> None:
    with backend("triton", (32, 48)):
        compare(problem(60, more, 16, 16, 5, dtype), 7.0, formula, hard_weight=0.4, row_offset=more // 2)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_extreme_logits(name: str, tile: tuple[int, int] | None) -> None:
    """Opposite, equal and repeated vectors at scale 100 and teacher's temperature 0.01."""
    tensors = {n: x.float() for n, x in problem(40, 0, 8, 8).items()}
    tensors["text"][:20] = tensors["image"][:20]
    tensors["text"][20:] = -tensors["image"][20:]
    tensors["teacher_text"][:] = tensors["teacher_image"][:1]
    with backend(name, tile):
        # A logit of 100 is known to 1e-5 in fp32, and its exponential to 1e-5 of itself.
        compare(tensors, 100.0, formula, tolerance=3e-5, hard_weight=0.5, soft_temperature=0.01)
        tensors = {n: tensors[n] for n in ("image", "text")}
        compare(tensors, 100.0, sigmoid_formula, -10.0, tolerance=3e-5)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_vanishing_gradient_survives_half_precision(name: str) -> None:
    """1/N of a softmax over many columns, and a loss scaled up or down, would leave the range of fp16."""
    tensors = problem(4, 1000, 16, dtype=torch.float16)
    with backend(name, (64, 512)):
        for factor in (2.0**14, 2.0**-8):
            ours = {n: x.clone().requires_grad_() for n, x in tensors.items()}
            theirs = {n: x.double().requires_grad_() for n, x in tensors.items()}
            (factor * contrastive_loss(**ours, logit_scale=1.0)).backward()
            (factor * formula(**theirs, logit_scale=torch.tensor(1.0))).backward()
            for n in ours:
                error = (ours[n].grad - theirs[n].grad).abs().max() / theirs[n].grad.abs().max()
                assert error < 2e-3, (n, factor, error)


def two_ranks(logit_scale: Tensor, tensors: dict[str, Tensor], options: dict) -> Tensor:
    """The mean over two ranks, each with half of the rows and all columns."""
    half = len(tensors["image"]) // 2
    columns = {f"all_{name}": x for name, x in tensors.items()}
    ranks = [{name: x[at : at + half] for name, x in tensors.items()} | {"row_offset": at} for at in (0, half)]
    return sum(contrastive_loss(**rank, **columns, **options, logit_scale=logit_scale) for rank in ranks) / 2


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_two_ranks_are_one(name: str, kind: str) -> None:
    options = {"kind": "sigmoid", "logit_bias": -2.0} if kind == "sigmoid" else {"hard_weight": 0.4}
    tensors = problem(26, 0, 12, 0 if kind == "sigmoid" else 12, dtype=torch.float32)
    results = []
    for ranks in (1, 2):
        inputs = {n: x.clone().requires_grad_("teacher" not in n) for n, x in tensors.items()}
        scale = torch.tensor(6.0, requires_grad=True)
        with backend(name, (20, 16)):
            if ranks == 2:
                loss = two_ranks(scale, inputs, options)
            else:
                loss = contrastive_loss(**inputs, **options, logit_scale=scale)
            loss.backward()
        results.append([loss.detach(), scale.grad, inputs["image"].grad, inputs["text"].grad])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [None, (3, 4)])
@pytest.mark.parametrize("more", [0, 3])
def test_gradcheck(more: int, tile: tuple[int, int] | None) -> None:
    tensors = problem(5, more, 4, 3)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    names = [name for name in tensors if "teacher" not in name]

    def terms(scale: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        given = tensors | dict(zip(names, vectors, strict=True))
        return contrastive_terms(**given, logit_scale=scale, row_offset=more // 2)

    def sigmoid(scale: Tensor, bias: Tensor, image: Tensor, text: Tensor) -> Tensor:
        return contrastive_loss(image, text, scale, logit_bias=bias, kind="sigmoid")

    leaves = [tensors[name].requires_grad_() for name in names]
    with backend("torch", tile):
        assert torch.autograd.gradcheck(terms, (scale, *leaves))
        assert torch.autograd.gradcheck(sigmoid, (scale, scale.detach().clone().requires_grad_(), *leaves[:2]))


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_open_clip(name: str) -> None:
    image, text = (unit(30, 16, seed, torch.float32) for seed in (0, 1))
    scale, bias = torch.tensor(9.0), torch.tensor(-4.0)
    with backend(name, (8, 9)):
        hard, soft = contrastive_terms(image, text, scale)
        sigmoid = contrastive_loss(image, text, scale, kind="sigmoid", logit_bias=bias)
    assert soft is None
    torch.testing.assert_close(hard, open_clip.loss.ClipLoss()(image, text, scale))
    torch.testing.assert_close(sigmoid, open_clip.loss.SigLipLoss()(image, text, scale, bias))


def test_terms_make_the_loss() -> None:
    tensors = problem(9, 4, 6, 6)
    with backend("torch"):
        hard, soft = contrastive_terms(**tensors, logit_scale=5.0, soft_temperature=0.3)
        loss = contrastive_loss(**tensors, logit_scale=5.0, soft_temperature=0.3, hard_weight=0.2)
        alone = contrastive_loss(**tensors, logit_scale=5.0)
    torch.testing.assert_close(loss, 0.2 * hard + 0.8 * soft)
    torch.testing.assert_close(alone, hard)


def test_gathered_by_one_rank_is_local() -> None:
    """all_image is image: the tiles are shared, and the gradient counts both uses."""
    results = []
    for columns in (False, True):
        image, text = (unit(9, 6, seed).requires_grad_() for seed in (0, 1))
        given = (
            {"all_image": image.clone(), "all_text": text.clone()}
            if columns
            else {"all_image": image, "all_text": text}
        )
        with backend("torch", (4, 4)):
            contrastive_loss(image, text, 5.0, **given).backward()
        results.append((image.grad, text.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tile", [None, (8, 8)])
def test_autocast_does_not_lower_the_precision(tile: tuple[int, int] | None) -> None:
    results = []
    for enabled in (False, True):
        inputs = {
            n: x.requires_grad_("teacher" not in n) for n, x in problem(20, 0, 16, 16, dtype=torch.float32).items()
        }
        with backend("torch", tile):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = contrastive_loss(**inputs, logit_scale=20.0, hard_weight=0.5)
            loss.backward()
        results.append((loss.detach(), inputs["image"].grad, inputs["text"].grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def largest_allocation(compute: Callable[[], Tensor]) -> int:
    """Bytes of the largest single allocation of a forward and backward pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute().backward()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_matrix_of_logits_is_allocated() -> None:
    """Of 300 x 900 inner products never more than a tile of 100 x 80, nor anything larger than the vectors in fp32."""
    vectors = problem(300, 600, 8, 8, dtype=torch.float32)
    inputs = {n: x.requires_grad_("teacher" not in n) for n, x in vectors.items()}
    for kind in ("softmax", "sigmoid"):
        extra = {"hard_weight": 0.5} if kind == "softmax" else {}
        given = inputs if kind == "softmax" else {n: x for n, x in inputs.items() if "teacher" not in n}
        with backend("torch", (100, 80)):
            loss = lambda g=given, e=extra, k=kind: contrastive_loss(**g, logit_scale=5.0, kind=k, **e)  # noqa: E731
            assert largest_allocation(loss) <= 4 * max(100 * 80, 900 * 8)
        with backend("torch"):  # one piece: the measure would see it
            assert largest_allocation(loss) >= 4 * 300 * 900


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_operators_are_registered_right(name: str) -> None:
    pair = problem(6, 3, 4, 4, dtype=torch.float32)
    order = ["image", "text", "all_image", "all_text", "teacher_image", "teacher_text"]
    order += ["all_teacher_image", "all_teacher_text"]
    vectors = [pair[n].requires_grad_("teacher" not in n) for n in order]
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (4.0, -1.0))
    torch.library.opcheck(contrastive_ops.softmax_terms, (*vectors, scale, 0.1, 2, name))
    torch.library.opcheck(contrastive_ops.softmax_terms, (*vectors[:2], *(None,) * 6, scale, 0.1, 0, name))
    torch.library.opcheck(contrastive_ops.sigmoid_loss, (vectors[0], vectors[3], scale, bias, 2, name))


@pytest.mark.parametrize(("name", "tile"), [("triton", None), ("torch", None), ("torch", (3, 3))])
def test_compiles_to_one_graph(name: str, tile: tuple[int, int] | None) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        teachers = {"teacher_image": text.detach(), "teacher_text": image.detach(), "hard_weight": 0.5}
        sigmoid = contrastive_loss(image, text, scale, kind="sigmoid", logit_bias=-1.0)
        return contrastive_loss(image, text, scale, **teachers) + sigmoid

    results = []
    with backend(name, tile):
        for compute in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            image, text = (unit(7, 5, seed, torch.float32).requires_grad_() for seed in (0, 1))
            scale = torch.tensor([3.0], requires_grad=True)
            compute(image, text, scale).backward()
            results.append((image.grad, text.grad, scale.grad))
    torch.testing.assert_close(*results)


x, y = unit(4, 8, 0), unit(4, 8, 1)
wide, many = unit(4, 9, 0), unit(6, 8, 0)
WRONG = {
    "image must be a matrix": {"image": x[0]},
    "image must be float16": {"image": x.long(), "text": y.long()},
    "image: the batch is empty": {"image": x[:0], "text": y[:0]},
    r"text must be \[4, 8\], not \[4, 9\]": {"text": wide},
    r"text must be \[4, 8\], not \[6, 8\]": {"text": many},
    "text must be float64 like image, not float32": {"text": y.float()},
    "text must be on cpu like image, not on meta": {"text": y.to("meta")},
    r"all_text must be \[any, 8\]": {"all_image": wide, "all_text": wide},
    r"all_image must be \[6, 8\]": {"all_text": many},
    "all_text must be a matrix, not list": {"all_image": many, "all_text": [1]},
    "teacher_text is missing": {"teacher_image": x},
    "teacher_image is missing: soft targets need": {"teacher_text": x},
    "teacher_image is missing, but all_teacher_text": {"all_teacher_text": many},
    "teacher_image is missing: hard_weight 0.5": {"hard_weight": 0.5},
    r"teacher_image must be \[4, any\]": {"teacher_image": many, "teacher_text": many},
    r"teacher_text must be \[4, 8\]": {"teacher_image": x, "teacher_text": wide},
    r"all_teacher_image must be \[6, 8\]": {"all_image": many, "all_text": many, "teacher_image": x, "teacher_text": x},
    "teacher_text must be float64 like teacher_image": {"teacher_image": x, "teacher_text": y.float()},
    "hard_weight must lie between 0 and 1": {"hard_weight": 1.5},
    "hard_weight must lie between 0 and 1, not -0.5": {"hard_weight": -0.5, "teacher_image": x, "teacher_text": x},
    "hard_weight must be 1 with kind 'sigmoid'": {"hard_weight": 0.5, "kind": "sigmoid"},
    "soft_temperature must be above 0": {"soft_temperature": -0.1},
    "soft_temperature must be above 0, not 0.0": {"soft_temperature": 0.0},
    "row_offset must lie between 0 and 0, not 1": {"row_offset": 1},
    "row_offset must lie between 0 and 2, not -1": {"all_image": many, "all_text": many, "row_offset": -1},
    "kind must be softmax or sigmoid": {"kind": "hinge"},
    "kind 'sigmoid' has no soft targets": {"kind": "sigmoid", "teacher_image": x, "teacher_text": x},
    "logit_bias: a softmax does not see it": {"logit_bias": 1.0},
    "logit_scale must be a number": {"logit_scale": torch.ones(2)},
    "logit_scale must be on cpu": {"logit_scale": torch.ones((), device="meta")},
    "logit_bias must be a number": {"kind": "sigmoid", "logit_bias": torch.ones(2)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_is_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{"image": x, "text": y, "logit_scale": 2.0} | WRONG[message])
